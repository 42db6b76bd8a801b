"""Kernels of decode steps."""
