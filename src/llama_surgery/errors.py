"""Errors the package raises on purpose. Each message says what was got, what is allowed and what to do."""


class SurgeryError(ValueError):
    """Base of every error this package raises on purpose."""


def check_version(what: str, version: object, newest: int, error: type[SurgeryError] = SurgeryError) -> None:
    """Raise ``error`` where a file is of a newer release, or says of none which it is."""
    if not isinstance(version, int) or isinstance(version, bool) or not 0 < version <= newest:
        raise error(f"{what} {version!r}; this release reads up to {newest}. Update llama-surgery.")


class UnsupportedModelError(SurgeryError):
    """The model, or the way it was called, cannot be operated."""


class AdapterError(SurgeryError):
    """An adapter folder is missing, damaged, of another version or of another model."""


class TextError(SurgeryError):
    """The text given is missing, empty, too short or not readable."""
