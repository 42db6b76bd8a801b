"""Thresholds for a density: one θ for tiles, one for decode steps, found on a little text."""

import dataclasses
import logging
import math
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.surgery.context import check_far_field, check_length, usual_length
from llama_surgery.surgery.layer import listening
from llama_surgery.surgery.operation import config_of, reset_statistics, set_config, statistics, surgery_of
from llama_surgery.surgery.supported import inner_model
from llama_surgery.text import windows
from llama_surgery.topology.geometry import Block, first_far

_log = logging.getLogger(__name__)
#: Windows of calibration text, spread over the documents.
WINDOWS = 4
#: Passes over the windows: each reads the shares that arise under the previous pass's θ. Budgets by head come
#: with a θ that is near already.
PASSES, PASSES_FROM_NEAR = 3, 2
#: Share of the budget that is aimed at: texts differ, and another one should keep the budget too.
AIM = 0.98
#: Decode steps come after a prompt: their rows are those of this last part of a window.
LAST_PART = 0.25
#: Resolution of log θ, in nats, and the smallest and the largest share told apart. Shares are ratios of two
#: estimates, of which the upper one may be far too high: keys with large biases take θ beyond 1.
_BIN, _LOWEST, _HIGHEST = 0.01, -14.0, 12.0


class ShareHistogram:
    """Weighted histogram of tiles' largest log shares: executed pairs as a function of θ.

    A tile of r rows that opens a page executes r × page_size pairs, and it opens the page when its largest
    share exceeds θ.
    """

    def __init__(self) -> None:
        self.bins = torch.zeros(round((_HIGHEST - _LOWEST) / _BIN) + 1, dtype=torch.float64)

    def add(self, shares: torch.Tensor, pairs: torch.Tensor) -> None:
        """Count log shares (…, tiles, pages), each standing for ``pairs`` (tiles,) pairs.

        Raises:
            SurgeryError: A share is NaN.
        """
        if bool(shares.isnan().any()):
            raise SurgeryError(
                "the queries hold NaN or infinity: no page can be weighed. Check the weights, and that the "
                "dtype has the range the model needs."
            )
        index = ((shares.double() - _LOWEST) / _BIN).ceil().clamp(0, len(self.bins) - 1).long()
        weight = pairs.to(shares.device, torch.float64)[:, None].expand(shares.shape)
        self.bins += torch.bincount(index.flatten(), weight.flatten(), len(self.bins)).cpu()

    def theta(self, pairs: float) -> float:
        """Smallest θ at which at most ``pairs`` are executed.

        Raises:
            SurgeryError: What is always open is more than that.
        """
        above = self.bins.flip(0).cumsum(0).flip(0) - self.bins  # shares in higher bins than this
        if self.bins[-1] > pairs:
            raise SurgeryError(
                "the density is out of reach: the page that holds the first token is always open and takes "
                f"{float(self.bins[-1] / max(pairs, 1e-9)):.1f} times the budget. Ask for more, or take "
                "smaller pages."
            )
        return math.exp(_LOWEST + _BIN * int((above <= pairs).nonzero()[0]))


def calibrate(
    model: torch.nn.Module,
    ids: torch.Tensor,
    density: float,
    passes: int = PASSES,
    *,
    decode_density: float | None = None,
) -> SurgeryConfig:
    """Configuration of an operated model with θ set for an executed far density.

    Tiles and decode steps see different shares, so each has its own θ; both are read off the same prefill,
    as decode steps follow one: θ of tiles off all rows, θ of decode steps off the last ones. Shares depend on
    the hidden states, which depend on θ: a few passes settle it.

    Args:
        model: An operated model.
        ids: (windows, length) int64, those of :func:`calibration_windows`.
        density: Executed far pairs over causal pairs, at most.
        passes: Fewer do where the model's θ is near already.
        decode_density: The same for decode steps. Without, their θ stays as it is: by default they read
            everything.

    Raises:
        SurgeryError: ``density`` is out of reach. The model keeps its configuration.
    """
    given = config = config_of(model)
    ids = ids.to(inner_model(model).device)
    try:
        for _ in range(passes):
            # Kernels do not hand out shares: plain PyTorch does, from what they would score pages by.
            listened = "gather" if config.backend == "triton" else config.backend
            set_config(model, dataclasses.replace(config, backend=listened))
            by_tile, tile_pairs, by_row, row_pairs = _listen(model, ids, config)
            theta = by_tile.theta(AIM * density * tile_pairs)
            found = {"theta": theta}
            if config.tile == 1:
                found["theta_decode"] = theta
            elif decode_density is not None:
                found["theta_decode"] = by_row.theta(AIM * decode_density * row_pairs)
            config = dataclasses.replace(config, **found)
            set_config(model, config)
    except BaseException:
        set_config(model, given)
        raise
    finally:
        reset_statistics(model)
    return config


def check_densities(config: SurgeryConfig, density: float, decode_density: float | None) -> None:
    """Raise SurgeryError where a density is out of range, or there is one too many."""
    for name, value in (("density", density), ("decode_density", decode_density)):
        if value is not None and not 0 < value < 1:
            raise SurgeryError(f"{name}={value}: must lie between 0 and 1.")
    if config.tile == 1 and decode_density not in (None, density):
        raise SurgeryError(
            f"decode_density={decode_density} with tile=1: one threshold serves prompts and decode steps. "
            "Leave it out."
        )


def calibration_windows(
    model: torch.nn.Module,
    tokenizer: Any,
    text: list[str],
    length: int | None,
    config: SurgeryConfig,
    count: int = WINDOWS,
) -> torch.Tensor:
    """Windows of text that thresholds of ``config`` are set on: (at most ``count``, length) int64.

    Args:
        model: Dense or operated.
        text: Documents.
        length: Tokens of a window; the model's context, at most 8,192 and what the text holds, if None.
        count: Windows wanted; fewer where the text holds fewer, with a warning.

    Raises:
        SurgeryError: The topology has no threshold, or there is no tokenizer.
        TextError: The text or the length is too short.
    """
    if config.topology != "pages":
        raise SurgeryError(
            f"topology={config.topology!r} has no threshold that a density or a loss could set: leave them "
            "out."
        )
    if tokenizer is None:
        raise SurgeryError("tokenizer=None: calibration text needs the model's tokenizer.")
    usual = length is None
    length = usual_length(model) if length is None else length
    check_length(model, length)
    check_far_field(length, config)
    shorter = [length >> halved for halved in range(1, length.bit_length())] if usual else []
    lengths = [n for n in (length, *shorter) if n > first_far(config)]
    errors = []
    for length in lengths:
        try:
            found = windows(tokenizer, text, length, None, seed=0, usual=count)
        except TextError as error:
            errors.append(error)
            continue
        if errors:
            _log.warning(
                f"no document holds {lengths[0]:,} tokens: thresholds are set on windows of {length:,}. Give "
                "longer text, or the length that you mean."
            )
        return found
    raise errors[0]


def _listen(
    model: torch.nn.Module, ids: torch.Tensor, config: SurgeryConfig
) -> tuple[ShareHistogram, int, ShareHistogram, float]:
    """Histogram over tiles and the causal pairs that it is a part of, and the same over single rows."""
    by_tile, by_row = ShareHistogram(), ShareHistogram()
    length = ids.shape[1]
    first = round(length * (1 - LAST_PART))  # row from which rows stand for decode steps

    def hear(layer: int, tile: int, shares: torch.Tensor, block: Block) -> None:
        row = torch.arange(block.start, block.stop)
        number = row // tile - block.start // tile
        pairs = torch.bincount(number) * config.page_size
        if tile == 1:  # a row opens a page for all heads
            by_tile.add(shares.amax(1).squeeze(2), pairs)
            return
        # Density is a mean over heads, each of which opens pages for itself.
        by_tile.add(shares.amax(3), pairs / shares.shape[1])
        if block.stop > first:
            rows = torch.bincount(number, (row >= first).double())
            by_row.add(shares.amax(1).flatten(1, 2), (rows * config.page_size / tile).repeat_interleave(tile))

    reset_statistics(model)
    with listening(surgery_of(model), hear, config), torch.inference_mode():
        for window in ids:
            inner_model(model)(window[None], use_cache=False, logits_to_keep=1)
    pairs = statistics(model).causal_pairs
    earlier = first * (first + 1) / (length * (length + 1))
    return by_tile, pairs, by_row, pairs * (1 - earlier)
