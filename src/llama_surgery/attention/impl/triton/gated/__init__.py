"""Attention in which far pages have biases by row and head, differentiable: what learning runs."""
