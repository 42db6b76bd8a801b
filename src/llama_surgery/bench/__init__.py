"""What ``llama-surgery bench`` and ``llama-surgery crossover`` measure. Only scripts import it."""
