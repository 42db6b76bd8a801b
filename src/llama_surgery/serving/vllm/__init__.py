"""The plugin for vLLM. Nothing here is imported before the engine asks for it."""
