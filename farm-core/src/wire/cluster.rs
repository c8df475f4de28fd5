//! Carries wire messages between processes over ractor_cluster.
