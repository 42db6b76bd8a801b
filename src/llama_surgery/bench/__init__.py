"""What ``llama-surgery bench`` and ``llama-surgery doctor`` measure. Only scripts import it."""
