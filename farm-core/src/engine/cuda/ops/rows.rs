//! Operations on rows.
