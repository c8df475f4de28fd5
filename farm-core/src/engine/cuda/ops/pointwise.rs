//! Operations on values one by one, and the moving of values.
