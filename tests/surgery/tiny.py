"""Tiny random models, in float64 where a law is to be exact."""

import functools
import itertools
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from llama_surgery import SurgeryConfig, config_of
from llama_surgery.surgery.compat import CACHE_NAME

VOCABULARY = 97

#: Small chunks, so that a few hundred tokens have a far field; θ lets rows open some of the pages.
SPARSE = SurgeryConfig(
    chunk_size=64, page_size=16, window=32, tile=8, theta=0.15, theta_decode=0.15, backend="gather"
)
SINGLE = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=1, theta=0.15, backend="gather")
DENSE_LIMIT = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=8, theta=0.0, backend="gather")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A random model of transformers' architecture ``kind`` ("Llama"), sharp enough to attend unevenly."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "sinks" in name or (weight.dim() == 1 and "bias" in name):
                weight.normal_(0, 0.5)
            elif weight.dim() > 1:
                weight.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@functools.cache
def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float64 Llama, shared between tests: eject it. Its norms keep float64, unlike transformers'."""
    model = build("Llama", seed, **changes)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(_norm, module)
    return model


def _norm(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    mean = states.square().mean(-1, keepdim=True)
    return module.weight * states * torch.rsqrt(mean + module.variance_epsilon)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids, special ones left out."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[torch.Tensor], sides: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch of rows (1-D ids) of ``width`` columns, ``sides[b]`` columns of padding on the left of row b.

    Returns:
        ids and attention_mask, both (rows, width) int64.
    """
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, (row, left) in enumerate(zip(rows, sides, strict=True)):
        ids[b, left : left + len(row)] = row
        mask[b, left : left + len(row)] = 1
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids as generate() makes them for padded batches."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """(batch, columns, vocabulary) of one call."""
    return model(ids if ids.dim() == 2 else ids[None], **arguments).logits


def generation_cuts(model: PreTrainedModel, prompt: int, stop: int) -> list[int]:
    """Cuts of plain calls that say what generate() says: whole tiles of the prompt, then one by one."""
    return list(range(prompt - prompt % config_of(model).tile, stop))


@torch.no_grad()
def in_pieces(
    model: PreTrainedModel, ids: torch.Tensor, cuts: list[int], cache: Any = None, mask: Any = None
) -> tuple[torch.Tensor, Any]:
    """Logits of all columns, computed piece by piece on one cache, and the cache."""
    ids = ids if ids.dim() == 2 else ids[None]
    edges = sorted({0, ids.shape[1], *cuts})
    parts = []
    for start, stop in itertools.pairwise(edges):
        arguments = {}
        if mask is not None:
            arguments = {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
        out = model(ids[:, start:stop], **{CACHE_NAME: cache}, use_cache=True, **arguments)
        cache = out[CACHE_NAME]
        parts.append(out.logits)
    return torch.cat(parts, 1), cache
