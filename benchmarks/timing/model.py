"""A model of given shapes with random weights, and thresholds that give it a density."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_surgery.checkpoint import without_weights
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache
from llama_surgery.surgery.compat import CACHE_NAME, cache_name
from llama_surgery.surgery.operate import operated
from llama_surgery.surgery.operation import config_of, paged_cache, reset_statistics, set_config, statistics
from llama_surgery.surgery.supported import attention_modules

from .measure import nearest_theta

#: Layers that are run to find θ of a prefill.
LAYERS = 2

#: Of the difference between two dense backends, how much an operated model's may be, and what is nothing.
FACTOR, NEGLIGIBLE = 2.5, 1e-4


#: Decode steps that are compared after a prompt.
STEPS = 4


class _Stop(Exception):
    """Ends a forward pass early."""


def random_model(path: Path, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model with random weights.

    Args:
        path: A ``config.json``, a folder with one, or a GGUF file.

    Raises:
        SurgeryError: No configuration is there, or it is of a model whose attention is not full and causal.
    """
    config = without_weights(path, attn_implementation="sdpa").config
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    check_layers(model, str(path))
    return model


def check_layers(model: PreTrainedModel, name: str) -> None:
    """
    Raises:
        SurgeryError: Not all layers have full attention: the dense side would compute something else.
    """
    if sorted(attention_modules(model)) != list(range(model.config.get_text_config().num_hidden_layers)):
        raise SurgeryError(f"{name}: only some layers have full attention; this comparison needs all.")


def random_ids(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def random_states(model: PreTrainedModel, batch: int, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """Random queries (batch, heads, rows, dim), keys and values (batch, kv_heads, length, dim) of a layer."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    dtype = next(model.parameters()).dtype

    def normal(heads: int, n: int) -> torch.Tensor:
        return torch.randn(batch, heads, n, dim, device=model.device, dtype=dtype)

    return normal(heads, rows), normal(kv_heads, length), normal(kv_heads, length)


def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits (batch, 1, vocabulary) after the prompt."""
    return model(ids, logits_to_keep=1, use_cache=True, **{cache_name(model): cache}).logits


def prefill_theta(model: PreTrainedModel, ids: torch.Tensor, density: float) -> float:
    """θ of tiles that gives the first layers of an operated model an executed far density.

    Leaves the model's configuration changed.
    """
    config = config_of(model)

    def measured(theta: float) -> float:
        set_config(model, dataclasses.replace(config, theta=theta, theta_decode=theta))
        reset_statistics(model)
        with _first_layers(model), contextlib.suppress(_Stop):
            model(ids, logits_to_keep=1, use_cache=False)
        return statistics(model).far_density

    return nearest_theta(measured, density, "in prefill")


def decode_theta(model: PreTrainedModel, ids: torch.Tensor, cache: PagedCache, density: float) -> float:
    """θ of decode steps that gives one after the cache's content an executed far density.

    The cache is left as it was, but for its configuration, which is set on the model too.
    """

    def measured(theta: float) -> float:
        set_decode_theta(model, cache, theta)
        reset_statistics(model)
        model(ids, use_cache=True, **{cache_name(model): cache})
        cache.crop(-ids.shape[1])
        return statistics(model).far_density

    theta = nearest_theta(measured, density, "in decode")
    set_decode_theta(model, cache, theta)
    return theta


def set_decode_theta(model: PreTrainedModel, cache: PagedCache, theta: float) -> None:
    """Change θ of decode steps; what the cache holds does not depend on it."""
    config = dataclasses.replace(cache.surgery, theta_decode=theta)
    cache.surgery = config
    set_config(model, config)
    for paged in cache.paged:
        paged.config = config


@contextlib.contextmanager
def _first_layers(model: PreTrainedModel) -> Iterator[None]:
    """Forward passes end before the attention of layer LAYERS."""

    def stop(*_: object) -> None:
        raise _Stop

    module = attention_modules(model).get(LAYERS)
    handle = None if module is None else module.register_forward_pre_hook(stop, prepend=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def check_against_dense(
    model: PreTrainedModel, config: SurgeryConfig, ids: torch.Tensor, routers: Mapping[int, Any] | None = None
) -> tuple[float, float]:
    """Relative difference of the operated model's logits to the dense model's, everything open.

    The last token of a prompt and some decode steps; the model is dense before and after.

    Args:
        model: Dense.
        config: The topology.
        ids: (1, length + STEPS) int64, a prompt and what follows it.
        routers: As :func:`~llama_surgery.operate` takes them.

    Returns:
        The difference, and that between two of PyTorch's own backends.

    Raises:
        SurgeryError: The first exceeds the second by more than FACTOR.
    """
    opened = dataclasses.replace(config, theta=0.0, theta_decode=0.0)
    length = ids.shape[1] - STEPS

    def run() -> torch.Tensor:
        out = model(ids[:, :length], use_cache=True, logits_to_keep=1)
        cache, logits = out[CACHE_NAME], [out.logits]
        for at in range(length, length + STEPS):
            logits.append(model(ids[:, at : at + 1], use_cache=True, **{cache_name(model): cache}).logits)
        return torch.cat(logits, 1).float()

    with sdpa_kernel(SDPBackend.MATH):
        expected = run()
    other = run()
    with operated(model, opened, routers=routers):
        got = run()
    error, own = (float((x - expected).norm() / expected.norm()) for x in (got, other))
    if not error <= max(FACTOR * own, NEGLIGIBLE):
        raise SurgeryError(
            f"operated with everything open, the model's logits differ from the dense ones by {error:.2e}, "
            f"and those of two dense backends by {own:.2e}: something is wrong, nothing is timed."
        )
    return error, own


def fresh_cache(model: PreTrainedModel, tokens: int) -> PagedCache:
    """An empty paged cache with room for ``tokens`` and no more."""
    cache = paged_cache(model)
    cache.expect_length(tokens)
    return cache
