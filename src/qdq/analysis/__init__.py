"""Analysis of quantized models: fidelity, sensitivity and latency."""
