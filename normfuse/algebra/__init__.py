"""What passes do to weights: kernels, channels, scales, means, other bases."""
