"""What ``llama-surgery bench`` and ``llama-surgery doctor`` measure."""
