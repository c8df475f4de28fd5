//! Matrix products and convolutions.
