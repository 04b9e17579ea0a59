"""Model-level quantization: a captured graph, batch norms folded, quantizers placed on its tensors."""
