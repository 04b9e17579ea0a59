"""Training of quantized networks. Nothing yet."""
