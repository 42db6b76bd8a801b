"""Kernels that lay chunks out: the tree, pages, what pages are scored by."""
