// Matrix products and causal convolutions.
