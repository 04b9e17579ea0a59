"""Analysis of quantized models: fidelity and latency."""
