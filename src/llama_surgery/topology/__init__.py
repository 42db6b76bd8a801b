"""What a query may see: tree, layout, moments, selection. Pure tensors, no model, no kernels."""
