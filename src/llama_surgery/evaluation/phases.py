"""What ``generate()`` reads in prefill and in decode, told apart."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from llama_surgery.surgery import operate as surgery
from llama_surgery.surgery.supported import inner_model

_DENSITIES = ("far_density", "near_density", "summary_density", "total_density", "visible_far_density")


@contextlib.contextmanager
def phases(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Read the statistics of an operated model, which are reset, after every call within a ``with`` block.

    A call of more than one token is a prefill, all others are decode steps.

    Yields:
        Densities of each phase that occurs, over its causal pairs: ``prefill`` and ``decode``; at the end.
    """
    surgery.reset_statistics(model)
    found: dict[str, dict[str, float]] = {}
    pairs: dict[str, Counter[str]] = defaultdict(Counter)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        read = surgery.statistics(model)
        counts = {name: getattr(read, name) * read.causal_pairs for name in _DENSITIES}
        new = Counter({**counts, "causal": read.causal_pairs})
        for earlier in pairs.values():
            new.subtract(earlier)
        pairs["prefill" if output[0].shape[1] > 1 else "decode"].update(new)

    handle = inner_model(model).get_decoder().register_forward_hook(after)
    try:
        yield found
    finally:
        handle.remove()
    for phase, read in pairs.items():
        found[phase] = {name: read[name] / max(1, read["causal"]) for name in _DENSITIES}
