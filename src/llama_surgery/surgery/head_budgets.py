"""How much each head reads: offsets to log θ at which a further pair is worth the same in all heads."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from llama_surgery.attention.api import attend
from llama_surgery.attention.executor import build_layout
from llama_surgery.checkpoint import told
from llama_surgery.config import SurgeryConfig
from llama_surgery.surgery.interface import dense_attention
from llama_surgery.surgery.progress import Progress, counted
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules, head_shape, inner_model
from llama_surgery.topology.router import PageRouter

_log = logging.getLogger(__name__)
#: θ at which heads are measured, in equal steps of log θ, and into how many parts a step is divided.
#: No head gets a higher one than the first: running text does not say what a head will look up elsewhere.
THETAS = (0.4, 0.16, 0.064, 0.0256, 0.01024, 0.004096)
_PARTS = 8
#: Windows that are measured, and tokens of the first that gradients are taken on.
WINDOWS, GRADIENT_TOKENS = 2, 1024


class Budgets(NamedTuple):
    """What :func:`head_budgets` and :func:`budgets_where_none` return.

    Attributes:
        routers: By layer index, with offsets whose mean is 0.
        theta: The θ that belongs to them.
    """

    routers: dict[int, PageRouter]
    theta: float


def budgets_where_none(
    model: torch.nn.Module,
    windows: torch.Tensor,
    config: SurgeryConfig,
    routers: Mapping[int, PageRouter],
    density: float,
    progress: Progress | None = None,
) -> Budgets | None:
    """:func:`head_budgets`, or None where heads keep what they have.

    That is so in tiles of one row, where heads share their pages, where ``routers`` hold learned offsets, and
    where the model has no gradients: of that a warning tells.
    """
    if config.tile == 1 or any(router.offset is not None for router in routers.values()):
        return None
    passes = 1 + len(windows[:WINDOWS])
    try:
        with counted(inner_model(model), "budgets of heads", passes, progress):
            return head_budgets(model, windows, config, routers, density)
    except (RuntimeError, NotImplementedError) as error:  # of kernels without a backward pass, say
        _log.warning(f"all heads share one threshold, as no gradients could be had: {told(error)}.")
        return None


def head_budgets(
    model: torch.nn.Module,
    windows: torch.Tensor,
    config: SurgeryConfig,
    routers: Mapping[int, PageRouter],
    density: float,
) -> Budgets:
    """Offsets at which the divergence from the dense model is expected to be least at a density.

    Every head is operated alone, on the dense model's own states, at a few θ. What that does to the model is
    taken from the square of the change of its output and from the mean square g² of the gradient there, of
    losses of tokens that the model itself would write: KL ≈ ½·E[(g·change)²], and the change points anywhere.
    The sum over heads is minimised at equal reads, which makes the gain of a further pair the same in all.

    Args:
        model: A dense decoder.
        windows: (count, length) int64; the first ones are used.
        config: The topology, in tiles of several rows: in tiles of one row heads share their pages.
        routers: By layer index; all parts but offsets are kept.
        density: Executed far density at which that is so.
    """
    inner = inner_model(model)
    modules = attention_modules(inner)
    windows = windows[:WINDOWS].to(inner.device)
    gradients = _gradients(inner, windows[:1, :GRADIENT_TOKENS])
    change, pairs = dict[int, torch.Tensor](), dict[int, torch.Tensor]()
    attention = functools.partial(_beside, config, routers, change, pairs)
    with attention_replaced(inner, modules.values(), attention), torch.no_grad():
        for window in windows:
            inner(input_ids=window[None], use_cache=False, logits_to_keep=1)
    indices = list(modules)
    count, length = windows.shape
    harm = torch.cat([change[i] * gradients[i][:, None] / (2 * count * length) for i in indices])
    read = torch.cat([pairs[i] / (count * length * (length + 1) / 2) for i in indices])
    log_theta = _allocate(harm, read, density)
    mean = log_theta.mean()
    parts = (log_theta - mean).float().split([len(pairs[i]) for i in indices])
    found = {}
    for index, part in zip(indices, parts, strict=True):
        kv_heads, group, _ = head_shape(inner, modules[index])
        offset = part.view(kv_heads, group)
        found[index] = dataclasses.replace(routers.get(index, PageRouter()), offset=offset)
    return Budgets(found, math.exp(mean))


def _gradients(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Mean square, over rows and channels, of the gradient at every head's output: (heads,) by layer.

    The loss is that of tokens drawn from the model's own predictions, summed over positions.
    """
    modules = attention_modules(model)
    outs = dict[int, torch.Tensor]()

    def attention(base: str, module: Any, *states: Any, **keywords: Any) -> tuple[Any, Any]:
        out, weights = dense_attention(base, module, *states, **keywords)
        out = out if out.requires_grad else out.detach().requires_grad_()
        outs[module.layer_idx] = out
        return out, weights

    with (
        attention_replaced(model, modules.values(), attention),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        output = model(input_ids=ids.clone(), use_cache=False)
        if getattr(output, "logits", None) is None or output.logits.shape[:2] != ids.shape:
            raise NotImplementedError(f"{type(model).__name__} predicts no tokens")
        logits = output.logits[0].float()
        generator = torch.Generator(logits.device).manual_seed(0)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        found = torch.autograd.grad(loss, list(outs.values()))
    return {i: g[0].double().square().mean((0, 2)).cpu() for i, g in zip(outs, found, strict=True)}


def _beside(
    config: SurgeryConfig,
    routers: Mapping[int, PageRouter],
    changes: dict[int, torch.Tensor],
    read: dict[int, torch.Tensor],
    base: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    """Dense attention of a window, and beside it how operated attention would differ at every θ.

    Squared changes and pairs read are added to those of the layer: (heads, len(THETAS)) float64.
    """
    dense, weights = dense_attention(base, module, query, key, value, attention_mask, **keywords)
    index, kv_heads = module.layer_idx, key.shape[1]
    router = routers.get(index)
    router = None if router is None else dataclasses.replace(router.to(query.device), offset=None)
    keys, values = key[0], value[0]
    full = keys.shape[1] // config.chunk_size * config.chunk_size
    layout = build_layout(keys[:, :full], values[:, :full], config, router)
    sinks = keywords.get("s_aux")
    for place, theta in enumerate(THETAS):
        found = attend(
            query[0].unflatten(0, (kv_heads, -1)),
            keys,
            values,
            layout,
            config=dataclasses.replace(config, theta=theta, theta_decode=0.0, dense_until=0),
            start=0,
            scale=keywords.get("scaling"),
            softcap=keywords.get("softcap"),
            sink_logit=None if sinks is None else sinks.view(kv_heads, -1),
            router=router,
        )
        change = (found.out.flatten(0, 1).transpose(0, 1) - dense[0]).double().square().sum((0, 2))
        pairs = sum(plan.executed_pairs(config.page_size).double() for plan in found.plans)
        for held, new in ((changes, change), (read, pairs)):
            blank = torch.zeros(len(change), len(THETAS), dtype=torch.float64)
            held.setdefault(index, blank)[:, place] += new.cpu()
    return dense, weights


def _allocate(harm: torch.Tensor, read: torch.Tensor, density: float) -> torch.Tensor:
    """log θ of every head, (heads,), with the least harm in sum where they read ``density`` on average.

    Args:
        harm: (heads, len(THETAS)) float64, what a θ does to the model in a head.
        read: The same shape, far density.
    """

    def fine(values: torch.Tensor) -> torch.Tensor:
        steps = (len(THETAS) - 1) * _PARTS + 1
        return torch.nn.functional.interpolate(values[None], steps, mode="linear", align_corners=True)[0]

    # Between two θ on lines in logarithms; heads that nothing happens to have no logarithm.
    harm, read = (fine(values.clamp_min(1e-12 * float(values.max())).log()).exp() for values in (harm, read))
    low, high = -80.0, 80.0  # log of what a pair costs
    for _ in range(60):
        price = (low + high) / 2
        chosen = (harm + math.exp(price) * read).argmin(1, keepdim=True)
        low, high = (price, high) if float(read.gather(1, chosen).mean()) > density else (low, price)
    best = (harm + math.exp(high) * read).argmin(1)
    return fine(torch.tensor([THETAS], dtype=torch.float64).log())[0][best]
