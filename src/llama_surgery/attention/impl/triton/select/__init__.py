"""Kernels that choose pages: row totals, lists, scores."""
