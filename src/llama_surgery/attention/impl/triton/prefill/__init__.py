"""Kernels of prompts: near field, listed pages, means of the others."""
