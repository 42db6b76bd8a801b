"""Thresholds for a density: one θ for tiles, one for decode steps, found on a little text."""

import dataclasses
import math
from typing import Any

import torch

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.surgery.interface import listening
from llama_surgery.surgery.operate import (
    config_of,
    inner_model,
    reset_statistics,
    set_config,
    statistics,
    surgery_of,
)
from llama_surgery.surgery.statistics import Statistics
from llama_surgery.topology.geometry import Block

#: Windows of calibration text, spread over the documents.
WINDOWS = 6
#: Passes over the windows: each reads the shares that arise under the previous pass's θ.
PASSES = 5
#: The budget is aimed at a little below, so that a pass whose θ is a bin off still keeps it.
AIM = 0.985
#: Resolution of log θ, in nats, and the smallest share told apart.
_BIN, _LOWEST = 0.02, -14.0


class ShareHistogram:
    """Weighted histogram of tiles' largest log shares: executed pairs as a function of θ.

    A tile of r rows that opens a page executes r × page_size pairs, and it opens the page when its largest
    share exceeds θ.
    """

    def __init__(self) -> None:
        self.bins = torch.zeros(round(-_LOWEST / _BIN), dtype=torch.float64)

    def add(self, shares: torch.Tensor, block: Block, tile: int, page_size: int) -> None:
        """Count shares (streams, tiles, scored rows, pages) of a block."""
        top = shares.amax(2)
        row = torch.arange(block.start, block.stop)
        rows = torch.bincount(row // tile - block.start // tile).to(top.device, torch.float64)
        weight = (rows * page_size)[None, :, None].expand(top.shape)
        index = ((top.double() - _LOWEST) / _BIN).long().clamp(0, len(self.bins) - 1)
        counts = torch.bincount(index.flatten(), weight.flatten(), minlength=len(self.bins))
        self.bins += counts.cpu()

    def pairs_above(self, theta: float) -> float:
        """Pairs executed at ``theta``, always open pages left out."""
        first = math.ceil((math.log(max(theta, 1e-30)) - _LOWEST) / _BIN)
        return float(self.bins[max(0, first) :].sum())

    def theta(self, pairs: float) -> float:
        """Smallest θ at which at most ``pairs`` are executed."""
        above = torch.cat((self.bins.flip(0).cumsum(0).flip(0), torch.zeros(1)))
        return math.exp(_LOWEST + _BIN * int((above <= max(pairs, 0.0)).nonzero()[0]))


def calibrate(
    model: torch.nn.Module, tokenizer: Any, text: list[str], density: float, length: int | None
) -> SurgeryConfig:
    """Configuration of an operated model with θ set for an executed far density.

    Tiles and decode steps see different shares, so each has its own θ. Shares depend on the hidden
    states, which depend on θ: a few passes settle it, and the θ that comes closest from below is kept.

    Args:
        model: An operated model.
        tokenizer: Its tokenizer.
        text: Documents.
        density: Executed far pairs over causal pairs, at most.
        length: Tokens of a window, or None.

    Raises:
        SurgeryError: ``density`` is out of range or no threshold reaches it.
        TextError: No document is long enough for a window.
    """
    from llama_surgery.evaluation.text import windows

    if tokenizer is None:
        raise SurgeryError("tokenizer=None: calibration text needs the model's tokenizer.")
    if not 0 < density < 1:
        raise SurgeryError(f"density={density}: must lie between 0 and 1.")
    config = config_of(model)
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
    theta = _settle(model, ids, config, density)
    if config.tile == 1:
        config = dataclasses.replace(config, theta=theta, theta_decode=theta)
    else:
        single = dataclasses.replace(
            config, tile=1, score_stride=1, theta=config.theta_decode, theta_decode=None
        )
        theta_decode = _settle(model, ids, single, density)
        config = dataclasses.replace(config, theta=theta, theta_decode=theta_decode)
    reset_statistics(model)
    return config


def _settle(
    model: torch.nn.Module, ids: torch.Tensor, config: SurgeryConfig, density: float
) -> float:
    """θ of ``config``'s tile at which the executed far density is ``density`` or just below."""
    fitting: dict[float, float] = {}  # density by θ, of those that keep the budget
    for _ in range(PASSES):
        set_config(model, config)
        histogram, measured = _measure(model, ids, config)
        if measured.far_density <= density:
            fitting[config.theta] = measured.far_density
        # What the histogram does not count, the sink page above all, is read at any θ.
        executed = measured.far_density * measured.causal_pairs
        fixed = executed - histogram.pairs_above(config.theta)
        theta = histogram.theta(AIM * density * measured.causal_pairs - fixed)
        config = dataclasses.replace(
            config, theta=theta, theta_decode=theta if config.tile == 1 else config.theta_decode
        )
    if not fitting:
        raise SurgeryError(
            f"density={density}: not reached; the least measured is {measured.far_density:.4f}. The page that "
            "holds the first token is always open: ask for more, or take smaller pages."
        )
    return max(fitting, key=lambda theta: fitting[theta])


def _measure(
    model: torch.nn.Module, ids: torch.Tensor, config: SurgeryConfig
) -> tuple[ShareHistogram, Statistics]:
    histogram = ShareHistogram()

    def hear(layer: int, tile: int, shares: torch.Tensor, block: Block) -> None:
        histogram.add(shares, block, tile, config.page_size)

    reset_statistics(model)
    with listening(surgery_of(model), hear), torch.inference_mode():
        for window in ids:
            inner_model(model)(window[None], use_cache=False, logits_to_keep=1)
    return histogram, statistics(model)
