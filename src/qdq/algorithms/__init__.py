"""What makes post-training quantization better: one published method a file."""
