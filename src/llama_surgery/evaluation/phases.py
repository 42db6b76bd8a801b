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
    """Read the statistics of an operated model, which are reset, within a ``with`` block.

    A call of more than one token is a prefill, all others are decode steps. Statistics are read before and
    after a prefill and at the end alone: every read waits for the device.

    Yields:
        Densities of each phase that occurs, over its causal pairs: ``prefill`` and ``decode``; at the end.
    """
    surgery.reset_statistics(model)
    found: dict[str, dict[str, float]] = {}
    pairs: dict[str, Counter[str]] = defaultdict(Counter)

    def add(phase: str) -> None:
        """What was read since the last time."""
        read = surgery.statistics(model)
        counts = {name: getattr(read, name) * read.causal_pairs for name in _DENSITIES}
        new = Counter({**counts, "causal": read.causal_pairs})
        for earlier in pairs.values():
            new.subtract(earlier)
        pairs[phase].update(new)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _tokens(args, kwargs) > 1:
            add("decode")

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _tokens(args, kwargs) > 1:
            add("prefill")

    decoder = inner_model(model).get_decoder()
    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    add("decode")
    for phase, read in pairs.items():
        if read["causal"]:
            found[phase] = {name: read[name] / read["causal"] for name in _DENSITIES}


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that a call of a decoder is given, of each sequence."""
    given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return next((states.shape[1] for states in given if states is not None), 0)
