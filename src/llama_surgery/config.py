"""The one configuration of an operation: a frozen dataclass that checks itself."""

import dataclasses
import math
from typing import Any, Literal, get_args

from llama_surgery.errors import SurgeryError

Topology = Literal["pages", "dense"]
Directions = Literal["principal", "subspace", "position"]
Summary = Literal["none", "chunk", "page", "ball"]
Backend = Literal["auto", "reference", "gather", "flex", "triton"]

CONFIG_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurgeryConfig:
    """What every operated layer may see, and how it is executed.

    Attributes:
        topology: ``pages`` (balanced tree over each chunk's keys) or ``dense`` (everything visible).
        chunk_size: Tokens of a chunk; a multiple of ``tile`` and ``page_size * arity**n``.
        page_size: Keys of a page, the contiguous block that is read as a whole.
        window: Tokens that always stay in the near field; a multiple of ``tile``.
        tile: Consecutive queries that share the pages read in prefill, anchored at multiples of
            ``tile``. A call of one token on a non-empty cache (a decode step) is a tile of one.
        arity: Children of a tree node.
        directions: How a node's keys are ordered before they are split: along their own first
            ``principal`` direction; along their principal direction in the ``subspace`` of their chunk's
            four leading directions, for which a chunk's keys are read twice, not twice a level; or by
            ``position`` (pages in original order).
        theta: A row opens a page whose expected share of some head's attention exceeds this, in
            tiles of ``tile`` queries. 0 opens everything.
        theta_decode: The same for tiles of one query. With ``tile=1`` it must equal ``theta``.
        pages_per_row: Instead of ``theta``: every scored row opens this many pages. For comparison.
        moment_size: Keys of the balls whose moments are kept, two levels below a page unless given: a page's
            score is the log-sum-exp of its balls' scores. Smaller balls score more sharply and cost more.
        score_stride: Only every ``score_stride``-th row of a tile is scored (1: all rows). The
            first row of a tile or of a call always is; later rows see what earlier scored rows opened.
        coarse_to_fine: Score balls of several pages first, and pages and their balls only where a coarser
            ball promises enough, instead of scoring everything.
        coarse_totals: In tiles of several queries, estimate what a row's far field adds up to from balls of
            several pages (``coarse_fan``), which costs less, instead of from what pages are scored by.
            Included in ``coarse_to_fine``.
        alpha: Weight of the variance term of the page score.
        variance_pool: Channels whose variances are averaged for page scores: half of them neighbours, half
            their rotary partners. 1 keeps every channel's; 8 nearly halves what scoring costs.
        summary: What stands in for pages that a row does not see: nothing (``none``), or a single key for
            each ``page`` or ``ball``, with its expected weight and its mean value, or for what is unseen
            of each ``chunk``, with the mean value of the whole chunk.
        dense_until: Queries at positions below this see everything; a multiple of ``tile``.
        backend: Who executes the plan. ``auto`` takes the kernels on a GPU where they can run a call, and
            plain PyTorch elsewhere. A backend asked for by name never falls back in silence.

    Raises:
        SurgeryError: A value is out of range or values do not fit together.
    """

    topology: Topology = "pages"
    chunk_size: int = 512
    page_size: int = 32
    window: int = 192
    tile: int = 32
    arity: int = 2
    directions: Directions = "principal"
    theta: float = 0.046
    theta_decode: float | None = None
    pages_per_row: int | None = None
    moment_size: int | None = None
    score_stride: int = 1
    coarse_to_fine: bool = False
    coarse_totals: bool = False
    alpha: float = 1.0
    variance_pool: int = 1
    summary: Summary = "none"
    dense_until: int = 0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.theta_decode is None and isinstance(self.theta, (int, float)):
            decode = self.theta if self.tile == 1 else self.theta * DECODE_SHARE
            object.__setattr__(self, "theta_decode", decode)
        self._check_choices()
        self._check_numbers()
        if self.moment_size is None:
            quarter, rest = divmod(self.page_size, self.arity**2)
            object.__setattr__(self, "moment_size", self.page_size if rest else quarter)
        self._check_geometry()
        if self.tile == 1 and self.theta_decode != self.theta:
            raise SurgeryError(
                f"theta={self.theta} and theta_decode={self.theta_decode} differ with tile=1: prefill "
                "and decode then use the same tiles of one query. Give one value."
            )
        if self.pages_per_row is not None and self.coarse_to_fine:
            raise SurgeryError("coarse_to_fine needs a threshold: leave pages_per_row out.")

    def _check_choices(self) -> None:
        for name, allowed in (
            ("topology", Topology),
            ("directions", Directions),
            ("summary", Summary),
            ("backend", Backend),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise SurgeryError(f"{name}={value!r}: allowed are {', '.join(get_args(allowed))}.")

    def _check_numbers(self) -> None:
        for name, low in (
            ("chunk_size", 1),
            ("page_size", 1),
            ("window", 0),
            ("tile", 1),
            ("arity", 2),
            ("score_stride", 1),
            ("dense_until", 0),
            ("pages_per_row", 1),
            ("moment_size", 1),
            ("variance_pool", 1),
        ):
            value = getattr(self, name)
            if name in ("pages_per_row", "moment_size") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise SurgeryError(f"{name}={value!r}: must be a whole number of at least {low}.")
        for name in ("theta", "theta_decode", "alpha"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise SurgeryError(f"{name}={value!r}: must be a finite number of at least 0.")

    def _check_geometry(self) -> None:
        for name in ("chunk_size", "window", "dense_until"):
            if getattr(self, name) % self.tile:
                raise SurgeryError(
                    f"{name}={getattr(self, name)} is not a multiple of tile={self.tile}: "
                    f"a tile would straddle a boundary. Choose multiples of {self.tile}."
                )
        if self.tile % self.score_stride:
            raise SurgeryError(
                f"score_stride={self.score_stride} does not divide tile={self.tile}: "
                "the first row of every tile must be a scored one."
            )
        if self.variance_pool > 1 and self.variance_pool % 2:
            raise SurgeryError(
                f"variance_pool={self.variance_pool}: 1 or an even number, since channels are pooled with "
                "their rotary partners."
            )
        if self.chunk_size > 2**15:
            raise SurgeryError(
                f"chunk_size={self.chunk_size}: at most {2**15}, since offsets are kept in 16 bits."
            )
        ball = self.moment_size or 0
        while 0 < ball < self.page_size:
            ball *= self.arity
        if ball != self.page_size:
            raise SurgeryError(
                f"moment_size={self.moment_size}: page_size={self.page_size} must be it times a power of "
                f"arity={self.arity}."
            )
        if self.page_size * self.arity**self.depth != self.chunk_size:
            raise SurgeryError(
                f"chunk_size={self.chunk_size} is not page_size={self.page_size} times a power of "
                f"arity={self.arity}: pages would not be whole balls of the tree."
            )

    def theta_for(self, tile: int) -> float:
        """θ for tiles of ``tile`` queries: calibrated separately, since one θ does not serve both."""
        return self.theta if tile == self.tile else (self.theta_decode or 0.0)

    @property
    def depth(self) -> int:
        """Digits of a page's path: splits from the chunk down to a page."""
        return self.levels(self.page_size)

    def levels(self, size: int) -> int:
        """Splits from the chunk down to balls of ``size`` keys."""
        levels = 0
        while size < self.chunk_size:
            size *= self.arity
            levels += 1
        return levels

    @property
    def ball_size(self) -> int:
        """``moment_size``, which is always set once the configuration stands."""
        return self.moment_size or self.page_size

    @property
    def summarised(self) -> int:
        """Keys that one term of a summary stands for; 0 without summaries."""
        sizes = {"none": 0, "ball": self.ball_size, "page": self.page_size, "chunk": self.chunk_size}
        return sizes[self.summary]

    @property
    def balls_per_page(self) -> int:
        return self.page_size // self.ball_size

    @property
    def coarse_fan(self) -> int:
        """Pages of a coarse ball: two levels of the tree, or as many as the chunk has."""
        return self.arity ** min(2, self.depth)

    @property
    def pages_per_chunk(self) -> int:
        return self.chunk_size // self.page_size

    def to_dict(self) -> dict[str, Any]:
        """All fields and the format version, ready for JSON."""
        return {"version": CONFIG_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SurgeryConfig":
        """Inverse of :meth:`to_dict`.

        Raises:
            SurgeryError: Unknown fields or a newer version.
        """
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if not isinstance(version, int) or version > CONFIG_VERSION:
            raise SurgeryError(
                f"configuration version {version!r}: this release reads up to {CONFIG_VERSION}. "
                "Update llama-surgery."
            )
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise SurgeryError(f"unknown configuration fields: {', '.join(unknown)}.")
        return cls(**values)


#: Default θ for single queries as a share of the tile's θ, for users without calibration text.
#: On the demo model the two then read about equally much of a whole text (docs/log.md).
DECODE_SHARE = 0.23
