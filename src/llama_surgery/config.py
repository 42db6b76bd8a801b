"""The one configuration of an operation: a frozen dataclass that checks itself."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

from llama_surgery.errors import SurgeryError, check_version
from llama_surgery.gumbel_config import GumbelConfig, whole

Topology = Literal["pages", "gumbel"]
Summary = Literal["none", "page"]
Backend = Literal["auto", "reference", "gather", "triton"]

CONFIG_VERSION = 1
#: Power of the position by which θ falls beyond ``theta_length``: about what real models need for one density
#: at several lengths (docs/evaluation.md).
FALL = 0.75
#: Fields of earlier versions, and the value at which a stored configuration means the same without them.
REMOVED: dict[str, Any] = {
    "arity": 2,
    "directions": "principal",
    "pages_per_row": None,
    "score_stride": 1,
    "coarse_to_fine": False,
    "coarse_totals": False,
    "variance_pool": 1,
    "alpha": 1.0,
}


#: Stands for a ``theta_decode`` that the constructor was not given at all: None is given, to have it derived.
_LEFT_OUT: Any = object()


class _ThetaDecode:
    """The default of ``theta_decode``: reading derives what was not given, storing keeps what was.

    ``dataclasses.replace`` hands on what it reads, which would look as if it were given. So the field is
    taken off the list that ``replace`` goes by, and ``given`` carries what was given to the copy.
    """

    def __get__(self, config: "SurgeryConfig | None", owner: type) -> float:
        if config is None:
            return _LEFT_OUT  # what a dataclass takes for the parameter's default
        given = config.__dict__["theta_decode"]
        return _derived_theta_decode(config) if given is None else given

    def __set__(self, config: "SurgeryConfig", value: float | None) -> None:
        config.__dict__["theta_decode"] = value


def _derived_theta_decode(config: "SurgeryConfig") -> float:
    """``theta_decode`` where it is not given."""
    return config.theta if config.tile == 1 else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurgeryConfig:
    """What every operated layer may see, and how it is executed.

    Attributes:
        topology: ``pages``, a balanced tree over each chunk's keys, or ``gumbel``, the preprint's content
            router, for which all options below but ``gumbel`` and ``backend`` are without meaning.
        chunk_size: Tokens of a chunk; a multiple of ``tile``, and ``page_size`` times a power of two. The
            kernels sort chunks of up to 8,192, less where heads are wider than 128 channels.
        page_size: Keys of a page, the contiguous block that is read as a whole; 128 at most for the kernels.
        window: Tokens that always stay in the near field; a multiple of ``tile``.
        tile: Consecutive queries of a head that share the pages read in prefill, anchored at multiples of
            ``tile``. A call of one token on a non-empty cache (a decode step) is a tile of one, whose pages
            all query heads of a KV head share.
        theta: A row opens a page for a head when its expected share of that head's attention exceeds this,
            in tiles of ``tile`` queries. 0 opens everything.
        theta_decode: The same for tiles of one query: decode steps, and the rows that end a prompt in
            ``generate()``. 0 unless given, so that they read everything: sparse rows there lose most of what
            real models look up. With ``tile=1`` it must equal ``theta``, and does unless given.
        theta_length: Tokens of the texts that thresholds were set on, as ``operate()`` and ``learn()`` note.
            At positions beyond θ is smaller, by ``(theta_length / position) ** 0.75``, so that a longer text
            is read at about the same density: shares fall as pages become more. 0 keeps one θ everywhere.
        summary: What stands in for the pages that a row does not see: a single key for each ``page``, with
            its expected weight and its mean value, or nothing (``none``).
        dense_until: Queries at positions below this see everything; a multiple of ``tile``. From the length
            of the longest text on, all attention is dense.
        backend: Who executes the plan. ``auto`` takes the kernels on a GPU where they can run a call, and
            plain PyTorch elsewhere. A backend asked for by name never falls back in silence: ``operate()``
            refuses what ``triton`` cannot run.
        gumbel: Options of ``topology="gumbel"``, or a mapping of them; None for other topologies.
        given: ``theta_decode`` as it was given, None where it follows from other fields, in a copy by
            ``dataclasses.replace`` from its own. Not to be set.

    Configurations are equal when they mean the same, whether a value was given or derived.

    Raises:
        SurgeryError: A value is out of range or values do not fit together.
    """

    topology: Topology = "pages"
    chunk_size: int = 512
    page_size: int = 32
    window: int = 192
    tile: int = 64
    theta: float = 0.1
    theta_decode: _ThetaDecode = _ThetaDecode()
    theta_length: int = 0
    summary: Summary = "page"
    dense_until: int = 0
    backend: Backend = "auto"
    gumbel: GumbelConfig | None = None
    given: float | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Numbers of NumPy and PyTorch become Python's own: these are written as JSON and compared.
        stored = self.__dict__
        stored.update({name: _plain(value) for name, value in stored.items()})
        if stored["theta_decode"] is _LEFT_OUT:
            stored["theta_decode"] = self.given
        stored["given"] = stored["theta_decode"]
        self._check_choices()
        self._check_gumbel()
        self._check_numbers()
        self._check_geometry()
        if self.tile == 1 and self.theta_decode != self.theta:
            raise SurgeryError(
                f"theta={self.theta} and theta_decode={self.theta_decode} differ with tile=1: prefill "
                "and decode then use the same tiles of one query. Give one value."
            )

    def _check_choices(self) -> None:
        for name, allowed in (("topology", Topology), ("summary", Summary), ("backend", Backend)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise SurgeryError(f"{name}={value!r}: allowed are {', '.join(get_args(allowed))}.")

    def _check_gumbel(self) -> None:
        gumbel = self.gumbel
        if isinstance(gumbel, Mapping):
            gumbel = GumbelConfig.from_dict(dict(gumbel))
        if self.topology != "gumbel" and gumbel is not None:
            raise SurgeryError(f"gumbel={gumbel}: options of topology='gumbel', not of {self.topology!r}.")
        if self.topology == "gumbel":
            gumbel = GumbelConfig() if gumbel is None else gumbel
            if self.backend not in ("auto", "reference"):
                raise SurgeryError(
                    f"backend={self.backend!r}: topology='gumbel' has auto and reference. Set backend='auto'."
                )
        if gumbel is not None and not isinstance(gumbel, GumbelConfig):
            raise SurgeryError(f"gumbel={gumbel!r}: must be a GumbelConfig, or a mapping of its fields.")
        self.__dict__["gumbel"] = gumbel

    def _check_numbers(self) -> None:
        for name, low in (
            ("chunk_size", 1),
            ("page_size", 1),
            ("window", 0),
            ("tile", 1),
            ("dense_until", 0),
            ("theta_length", 0),
        ):
            value = self.__dict__[name]
            if not whole(value, low):
                raise SurgeryError(f"{name}={value!r}: must be a whole number of at least {low}.")
        for name in ("theta", "theta_decode"):
            value = self.__dict__[name]
            if value is None and name == "theta_decode":
                continue
            known = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not known or not 0 <= value <= sys.float_info.max:
                raise SurgeryError(f"{name}={value!r}: must be a finite number of at least 0.")
            self.__dict__[name] = float(value)

    def _check_geometry(self) -> None:
        for name in ("chunk_size", "window", "dense_until"):
            if getattr(self, name) % self.tile:
                raise SurgeryError(
                    f"{name}={getattr(self, name)} is not a multiple of tile={self.tile}: "
                    f"a tile would straddle a boundary. Choose multiples of {self.tile}."
                )
        if self.chunk_size > 2**15:
            raise SurgeryError(
                f"chunk_size={self.chunk_size}: at most {2**15}, since offsets are kept in 16 bits."
            )
        for name in ("dense_until", "theta_length"):
            if getattr(self, name) >= 2**31:
                raise SurgeryError(
                    f"{name}={getattr(self, name)}: at most {2**31 - 1}, since positions are kept in 32 bits."
                )
        if self.page_size * 2**self.depth != self.chunk_size:
            raise SurgeryError(
                f"chunk_size={self.chunk_size} is not page_size={self.page_size} times a power of "
                "two: pages would not be whole balls of the tree."
            )

    def theta_for(self, tile: int) -> float:
        """θ for tiles of ``tile`` queries: calibrated separately, since one θ does not serve both."""
        return self.theta if tile == self.tile else self.theta_decode

    @property
    def depth(self) -> int:
        """Digits of a page's path: splits from the chunk down to a page."""
        return (-(-self.chunk_size // self.page_size) - 1).bit_length()

    def summarises(self, tile: int) -> bool:
        """Do mean values stand in for pages, where rows in tiles of ``tile`` queries do not see them all?"""
        return self.summary == "page" and self.theta_for(tile) > 0

    @property
    def pages_per_chunk(self) -> int:
        return self.chunk_size // self.page_size

    @property
    def summaries_per_chunk(self) -> int:
        """Mean values that are kept of a chunk: one a page, none without summaries."""
        return self.pages_per_chunk if self.summary == "page" else 0

    def to_dict(self) -> dict[str, Any]:
        """All values and the format version, ready for JSON.

        Derived ones too: they say what was executed, also where a later release derives others.
        """
        values = {"version": CONFIG_VERSION, **{name: getattr(self, name) for name in FIELDS}}
        gumbel = values.pop("gumbel")  # older releases read all other topologies
        if not self.theta_length:
            del values["theta_length"]  # and all other thresholds
        return values if gumbel is None else {**values, "gumbel": gumbel.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SurgeryConfig":
        """Inverse of :meth:`to_dict`.

        A value that is what would be derived counts as derived: ``dataclasses.replace`` then derives it anew.
        Fields may be left out; where there is a version, it is what was executed before there were summaries.

        Raises:
            SurgeryError: No fields, unknown ones, a newer version, or something that is gone (``REMOVED``).
        """
        if not isinstance(values, dict):
            raise SurgeryError(f"a configuration is a table of fields, not {values!r}.")
        values = {"summary": "none", **values} if "version" in values else dict(values)
        version = values.pop("version", CONFIG_VERSION)
        check_version("configuration version", version, CONFIG_VERSION)
        values.pop("moment_size", None)  # pages were scored by balls of so many keys
        for name, default in REMOVED.items():
            if (value := values.pop(name, default)) != default:
                raise SurgeryError(
                    f"{name}={value!r} is no longer supported, as real models lost more by it than it saved. "
                    "Operate and calibrate the model again."
                )
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise SurgeryError(f"unknown configuration fields: {', '.join(unknown)}.")
        config = cls(**values)
        if config.theta_decode == _derived_theta_decode(config):
            return dataclasses.replace(config, theta_decode=None)
        return config

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle: one of an older state is read as its JSON would be."""
        if state.keys() != SurgeryConfig().__dict__.keys():
            stored = {name: value for name, value in state.items() if name != "given"}
            state = SurgeryConfig.from_dict({"version": CONFIG_VERSION, **stored}).__dict__
        self.__dict__.update(state)


def _plain(value: Any) -> Any:
    """A number of NumPy or a tensor of one element without dimensions as Python's own; all else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


#: Names of what is configured, as in JSON.
FIELDS = tuple(field.name for field in dataclasses.fields(SurgeryConfig) if field.name != "given")
del SurgeryConfig.__dataclass_fields__["theta_decode"]
