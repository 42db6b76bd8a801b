"""Serving an operated model on an engine that others wrote: the exported folder and the engine's plugin."""
