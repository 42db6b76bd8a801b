"""Putting a topology into a model and taking it out. The only room that knows transformers."""
