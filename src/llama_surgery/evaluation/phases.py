"""What ``generate()`` reads in prefill and in decode, told apart."""

from collections import defaultdict
from types import TracebackType
from typing import Any

from torch import nn

from llama_surgery.surgery import operate as surgery
from llama_surgery.surgery.supported import inner_model

DENSITIES = ("far_density", "near_density", "summary_density", "total_density", "visible_far_density")


class Phases:
    """Context manager around calls of ``generate()`` of an operated model.

    The statistics of an operated model run through prompt and answer alike. They are read before and
    after every call of more than one token, which is a prefill; all the rest is decode. Entering resets
    them.

    Args:
        model: An operated model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._pairs: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._seen: dict[str, float] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Phases":
        surgery.reset_statistics(self._model)
        self._seen = self._counts()
        decoder = inner_model(self._model).get_decoder()
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._attribute("decode")

    def densities(self) -> dict[str, dict[str, float]]:
        """Densities of each phase that occurred: ``prefill`` and ``decode``, over its causal pairs."""
        return {
            phase: {name: pairs[name] / pairs["causal"] for name in DENSITIES}
            for phase, pairs in self._pairs.items()
        }

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        if next(tokens for tokens in given if tokens is not None).shape[1] > 1:
            self._attribute("decode")

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if output[0].shape[1] > 1:
            self._attribute("prefill")

    def _attribute(self, phase: str) -> None:
        """Counts what was read since the last call as part of ``phase``."""
        now = self._counts()
        if now["causal"] > self._seen["causal"]:
            for name, pairs in now.items():
                self._pairs[phase][name] += pairs - self._seen[name]
        self._seen = now

    def _counts(self) -> dict[str, float]:
        read = surgery.statistics(self._model)
        densities = {name: getattr(read, name) * read.causal_pairs for name in DENSITIES}
        return {"causal": read.causal_pairs, **densities}
