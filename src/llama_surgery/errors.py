"""Errors the package raises on purpose. Each message says what was got, what is allowed and what to do."""


class SurgeryError(ValueError):
    """Base of every error this package raises on purpose."""


class UnsupportedModelError(SurgeryError):
    """The model, or the way it was called, cannot be operated."""


class AdapterError(SurgeryError):
    """An adapter folder is missing, damaged, of another version or of another model."""


class TextError(SurgeryError):
    """The text given is missing, empty, too short or not readable."""
