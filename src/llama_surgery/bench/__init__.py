"""What ``llama-surgery doctor`` measures."""
