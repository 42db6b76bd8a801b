"""The options of the ``gumbel`` topology."""

import dataclasses
from typing import Any

from llama_surgery.errors import SurgeryError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GumbelConfig:
    """What rows see under ``topology="gumbel"``: position 0, a window, and their own ball.

    Attributes:
        arities: Children of a node of the tree, one for each of equally large groups of heads.
        radius: Largest visible distance; half the levels of each group's tree if None.
        window: Last tokens that are always visible, the row's own counted.
        length: Tokens of the longest text that trees are made for: they have as many leaves at least.

    Raises:
        SurgeryError: A value is out of range.
    """

    arities: tuple[int, ...] = (2,)
    radius: int | None = None
    window: int = 128
    length: int = 8192

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "arities", tuple(self.arities))
        except TypeError:
            raise SurgeryError(f"arities={self.arities!r}: must be a list of whole numbers.") from None
        if not self.arities or not all(whole(arity, 2) for arity in self.arities):
            raise SurgeryError(f"arities={self.arities}: must be whole numbers of at least 2, one or more.")
        for name, low in (("window", 1), ("length", 2)):
            if not whole(getattr(self, name), low):
                raise SurgeryError(
                    f"{name}={getattr(self, name)!r}: must be a whole number of at least {low}."
                )
        if self.radius is not None and not whole(self.radius, 0):
            raise SurgeryError(
                f"radius={self.radius!r}: must be a whole number of at least 0, or None for half the levels."
            )

    def radius_of(self, levels: int) -> int:
        """Radius of a group of heads whose trees have ``levels`` levels."""
        return levels // 2 if self.radius is None else self.radius

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {**dataclasses.asdict(self), "arities": list(self.arities)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GumbelConfig":
        """Inverse of :meth:`to_dict`.

        Raises:
            SurgeryError: Unknown fields.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise SurgeryError(f"unknown fields of gumbel: {', '.join(unknown)}.")
        return cls(**values)


def whole(value: Any, low: int) -> bool:
    """Whether a value is a whole number of at least ``low``, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
