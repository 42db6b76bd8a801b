"""Thresholds for a density: one θ for tiles, one for decode steps, found on a little text."""

import dataclasses
import math
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.evaluation.text import windows
from llama_surgery.surgery.interface import listening
from llama_surgery.surgery.operate import (
    config_of,
    inner_model,
    reset_statistics,
    set_config,
    statistics,
    surgery_of,
)
from llama_surgery.topology.geometry import Block

#: Windows of calibration text, spread over the documents.
WINDOWS = 4
#: Passes over the windows: each reads the shares that arise under the previous pass's θ.
PASSES = 3
#: Resolution of log θ, in nats, and the smallest share told apart.
_BIN, _LOWEST = 0.01, -14.0


class ShareHistogram:
    """Weighted histogram of tiles' largest log shares: executed pairs as a function of θ.

    A tile of r rows that opens a page executes r × page_size pairs, and it opens the page when its largest
    share exceeds θ.
    """

    def __init__(self) -> None:
        self.bins = torch.zeros(round(-_LOWEST / _BIN) + 1, dtype=torch.float64)

    def add(self, shares: torch.Tensor, pairs: torch.Tensor) -> None:
        """Count log shares (streams, tiles, pages), each standing for ``pairs`` (tiles,) pairs."""
        index = ((shares.double() - _LOWEST) / _BIN).ceil().long().clamp(0, len(self.bins) - 1)
        weight = pairs.to(shares.device, torch.float64)[None, :, None].expand(shares.shape)
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
    model: torch.nn.Module, tokenizer: Any, text: list[str], density: float, length: int | None
) -> SurgeryConfig:
    """Configuration of an operated model with θ set for an executed far density.

    Tiles and decode steps see different shares, so each has its own θ; both are read off the same prefill,
    as decode steps follow one. Shares depend on the hidden states, which depend on θ: a few passes settle it.

    Args:
        model: An operated model.
        tokenizer: Its tokenizer.
        text: Documents.
        density: Executed far pairs over causal pairs, at most.
        length: Tokens of a window; the model's context, at most 8,192, if None.

    Raises:
        SurgeryError: ``density`` is out of range or out of reach.
        TextError: The text is too short.
    """
    config = config_of(model)
    if tokenizer is None:
        raise SurgeryError("tokenizer=None: calibration text needs the model's tokenizer.")
    if not 0 < density < 1:
        raise SurgeryError(f"density={density}: must lie between 0 and 1.")
    if config.pages_per_row is not None:
        raise SurgeryError("pages_per_row is set: there is no θ to calibrate. Leave it out.")
    inner = inner_model(model)
    if length is None:
        length = min(8192, getattr(inner.config.get_text_config(), "max_position_embeddings", 8192))
    if length <= config.window + config.chunk_size:
        raise TextError(
            f"length={length}: a window needs more than window + chunk_size = "
            f"{config.window + config.chunk_size} tokens to have a far field."
        )
    ids = windows(tokenizer, text, length, WINDOWS, seed=0).to(inner.device)
    for _ in range(PASSES):
        by_tile, by_row, pairs = _listen(model, ids, config)
        theta = by_tile.theta(density * pairs)
        theta_decode = theta if config.tile == 1 else by_row.theta(density * pairs)
        config = dataclasses.replace(config, theta=theta, theta_decode=theta_decode)
        set_config(model, config)
    reset_statistics(model)
    return config


def _listen(
    model: torch.nn.Module, ids: torch.Tensor, config: SurgeryConfig
) -> tuple[ShareHistogram, ShareHistogram, int]:
    """Histograms over tiles and over single rows, and the causal pairs they belong to."""
    by_tile, by_row = ShareHistogram(), ShareHistogram()

    def hear(layer: int, tile: int, shares: torch.Tensor, block: Block) -> None:
        row = torch.arange(block.start, block.stop)
        rows = torch.bincount(row // tile - block.start // tile)
        by_tile.add(shares.amax(2), rows * config.page_size)
        if tile > 1:
            scored = shares.shape[2]
            each = (rows * config.page_size / scored).repeat_interleave(scored)
            by_row.add(shares.flatten(1, 2), each)

    reset_statistics(model)
    with listening(surgery_of(model), hear), torch.inference_mode():
        for window in ids:
            inner_model(model)(window[None], use_cache=False, logits_to_keep=1)
    return by_tile, by_row, statistics(model).causal_pairs
