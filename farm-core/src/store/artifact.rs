//! Put, get and create-once over `object_store`.
