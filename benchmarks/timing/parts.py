"""Parts of a model's time."""

FIRST, STEP, GRAPHED = "first token", "decode step", "decode step, CUDA graph"
PARTS = (FIRST, STEP, GRAPHED)
