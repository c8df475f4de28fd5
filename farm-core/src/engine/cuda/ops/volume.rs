//! Operations on volumes.
