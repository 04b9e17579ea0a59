"""Export of captured graphs to ONNX files."""
