// Operations on rows: norms, gates, rotations.
