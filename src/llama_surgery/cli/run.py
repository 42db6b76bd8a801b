"""What commands measure beside an evaluation: thresholds, decode times, a tree."""

import statistics
import time
from typing import TYPE_CHECKING, Any

from llama_surgery.config import SurgeryConfig

if TYPE_CHECKING:
    import torch

    from llama_surgery.surgery.progress import Progress

#: Decode steps that are timed, after a few that are not.
STEPS, WARM_UP = 24, 4


def speed_told(until: int, context: int | None) -> str:
    """From where on prompts are sparse, and why not before."""
    if not until:
        return "Sparse prompts are read faster here at every length that was timed."
    if context is None or until < context:
        return (
            f"Prompts are dense below position {until:,}: up to there sparse ones were not read faster here."
        )
    return (
        f"On this device sparse prompts are not faster at any length that the model was made for ({context:,}"
        " tokens), so all is read densely. --dense-until 0 has them sparse all the same."
    )


def thresholds(config: SurgeryConfig) -> str:
    """The thresholds in words."""
    decode = f"{config.theta_decode:.3%} in decode" if config.theta_decode else "decode steps read everything"
    return f"θ = {config.theta:.3%} in prefill, {decode}"


def besides(
    model: Any,
    tokenizer: Any,
    result: Any,
    configs: dict[str, SurgeryConfig],
    routers: dict[str, Any],
    texts: list[str],
    progress: "Progress",
) -> dict[str, Any]:
    """What a report shows beside an evaluation's ``result``: times of decode steps, and a head's tree."""
    from llama_surgery.report.extract import head_tree
    from llama_surgery.surgery.operate import operated
    from llama_surgery.text import windows as cut_windows

    ids = cut_windows(tokenizer, texts, result.length, 1, result.seed)
    progress("decode times", 0, 1 + len(configs))
    decode, trees = {"dense": decode_ms(model, ids)}, []
    for number, (name, config) in enumerate(configs.items(), start=1):
        progress("decode times", number, 1 + len(configs))
        with operated(model, config, routers=routers.get(name)):
            decode[name] = decode_ms(model, ids)
            if number == 1 and config.topology == "pages":
                layer, head = _busiest(result.operated[0].density["by_layer"])
                trees.append(head_tree(model, tokenizer, texts[0], layer=layer, kv_head=head))
    progress("decode times", 1 + len(configs), 1 + len(configs))
    return {"decode_ms": decode, "trees": trees}


def decode_ms(model: Any, ids: "torch.Tensor") -> float:
    """Median milliseconds of a decode step after ``ids`` (1, length)."""
    import torch

    from llama_surgery.surgery.compat import CACHE_NAME

    ids = ids.to(model.device)
    last = STEPS + WARM_UP
    times = []
    with torch.inference_mode():
        state = model(ids[:, :-last], use_cache=True, logits_to_keep=1)
        cache = state[CACHE_NAME]
        for position in range(ids.shape[1] - last, ids.shape[1]):
            start = time.perf_counter()
            model(ids[:, position : position + 1], use_cache=True, **{CACHE_NAME: cache})
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[WARM_UP:])


def _busiest(by_layer: dict[int, dict[str, Any]]) -> tuple[int, int]:
    """Layer and KV head with the highest far density."""
    heads = [(d, layer, head) for layer, v in by_layer.items() for head, d in enumerate(v["far_density"])]
    _, layer, head = max(heads)
    return layer, head
