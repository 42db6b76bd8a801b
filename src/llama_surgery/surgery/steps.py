"""Decode steps of a whole operated model as replays of one CUDA graph."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from llama_surgery.attention.impl.triton import MOST_QUERIES
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache, PagedLayer
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.decoding import sees_everything, settle, tally_of
from llama_surgery.surgery.layer import LayerSurgery
from llama_surgery.surgery.operation import surgery_of
from llama_surgery.surgery.supported import inner_model

#: Steps for which there is room before the graph has to be captured anew.
ROOM = 1024


class GraphedSteps:
    """Decode steps of an operated model on a cache that holds a prompt, captured once and replayed.

    Shapes never change and nothing is asked of the device, so that a step costs what its kernels cost. What
    the host knows anyway (lengths, chunks that are full) it does between replays. Before each replay it
    compares what the graph was recorded with: tensors of the cache and of the model, learned corrections,
    configuration, counters. Where anything was replaced the step is recorded anew. Hooks of the model run
    while a step is recorded, not when it is replayed. Without a GPU a step runs as it would have been
    recorded, for tests.

    Args:
        model: An operated model, all of whose attention layers are operated.
        cache: Its cache, after a prompt. Sequences may differ in length; every step adds to all of them.
        rows: Tokens of a step, 1 to 8.

    Raises:
        SurgeryError: The cache is empty or has layers of another kind, or a step of so many tokens cannot be.
    """

    def __init__(self, model: torch.nn.Module, cache: PagedCache, rows: int = 1) -> None:
        if not 1 <= rows <= MOST_QUERIES:
            raise SurgeryError(f"rows={rows}: a step has 1 to {MOST_QUERIES} tokens.")
        if not isinstance(cache, PagedCache):
            raise SurgeryError(
                f"a step on a {type(cache).__name__} cannot be captured: take a model operated with "
                "topology='pages', and its cache."
            )
        self._model, self._cache, self._rows = inner_model(model), cache, rows
        if len(cache.paged) != len(cache.layers) or len(surgery_of(model)) != len(cache.layers):
            raise SurgeryError(
                "a step can be captured only if every attention layer is operated: this model has others "
                "(sliding windows, say), whose caches grow."
            )
        if not cache.get_seq_length():
            raise SurgeryError("an empty cache: run the prompt through the model first.")
        self._ids = torch.zeros(cache.paged[0].batch, rows, dtype=torch.int64, device=self._model.device)
        self._positions = torch.zeros_like(self._ids)
        self._known_positions: list[int] = []  # first positions as the device holds them
        self._logits: torch.Tensor | None = None
        self._replay: Callable[[], object] | None = None
        self._recorded: list[object] = []
        self._whole = False  # does every row of the next step see everything?
        #: Of the model's modules, when a step was last recorded: their parts, parameters and buffers, and all
        #: that those have which PEFT's decide by.
        self._parts: list[dict[str, Any]] = []
        self._tensors: list[dict[str, Any]] = []
        self._adapters: list[dict[str, Any]] = []

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed the next tokens.

        Args:
            ids: (batch, rows) int64.

        Returns:
            Logits (batch, rows, vocabulary). The next step overwrites them.

        Raises:
            SurgeryError: The decode kernels cannot run this model's steps, the ids do not fit, the model is
                no longer operated, or a padded cache was cropped.
        """
        self._prepare(ids)
        self._ids.copy_(ids)
        if self._replay is None or self._recorded != self._state():
            self._record()
        assert self._replay is not None and self._logits is not None
        self._replay()
        for paged in self._cache.paged:
            paged.slots += self._rows
        settle(self._layers(), self._rows)
        return self._logits

    def _layers(self) -> list[tuple[LayerSurgery, PagedLayer]]:
        """What the operated layers carry now, and their caches."""
        layers = surgery_of(self._model)
        return [(layers[index], paged) for index, paged in enumerate(self._cache.paged)]

    def _prepare(self, ids: torch.Tensor) -> None:
        """Room for the step, and lengths and positions as the host knows them."""
        self._apply_crop()
        paged_layers = self._cache.paged
        batch = paged_layers[0].batch
        if ids.shape != (batch, self._rows) or ids.dtype not in (torch.int64, torch.int32):
            raise SurgeryError(
                f"ids {tuple(ids.shape)} {ids.dtype}: a step of this cache takes {(batch, self._rows)} int64."
            )
        if self._ids.shape != ids.shape:  # sequences were chosen or repeated
            self._ids, self._replay = torch.zeros_like(ids, dtype=torch.int64, device=self._ids.device), None
            self._positions, self._known_positions = torch.zeros_like(self._ids), []
        lengths = paged_layers[0].lengths
        self._whole = sees_everything(paged_layers[0], self._rows)
        for layer, paged in self._layers():
            if not self._whole:
                paged.lay_out(layer.router)
            assert paged.buffers is not None
            if max(lengths) + self._rows > paged.buffers.capacity:
                paged.buffers.reserve(max(lengths) + ROOM)
        if lengths != self._known_positions:
            self._positions.copy_(torch.tensor(lengths)[:, None] + torch.arange(self._rows))
        self._known_positions = [length + self._rows for length in lengths]

    def _apply_crop(self) -> None:
        """Forget what was cropped since the last step: other calls do so when they look at the mask."""
        for paged in self._cache.paged:
            if not paged.stores:
                raise SurgeryError("the cache was reset: run a prompt through the model first.")
            if len(paged.stores) == 1:
                paged.stores[0].truncate(paged.slots)
                paged.cropped = 0
            elif paged.cropped:
                raise SurgeryError(
                    "a cropped cache of sequences of several lengths: which tokens are left is known from "
                    "the attention mask alone. Take the next tokens in a call of the model, with its mask."
                )

    def _changed_by_steps(self, layer: LayerSurgery, paged: PagedLayer) -> list[torch.Tensor]:
        """Tensors of a layer that every step adds to."""
        lengths = paged.device_lengths()
        return [lengths] if self._whole else [lengths, tally_of(layer, paged)]

    def _state(self) -> list[object]:
        """What a graph holds on to: addresses of tensors, and everything that its launches hung on.

        Before every step, while the device waits: models have hundreds of modules.
        """
        state: list[object] = [
            self._whole,
            self._model.training,
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled(self._ids.device.type),
            torch.get_autocast_dtype(self._ids.device.type),
        ]
        for layer, paged in self._layers():
            assert paged.buffers is not None
            learned = {} if layer.router is None or self._whole else layer.router.tensors()
            held = paged.buffers.read_by_kernels(whole=self._whole)
            state += map(_place, (*held, *self._changed_by_steps(layer, paged), *learned.values()))
            state += [layer.config, *learned]
        state += chain.from_iterable(map(dict.values, self._parts))
        state += (str(attributes.get(name)) for attributes in self._adapters for name in _SWITCHES)
        weights = [w for w in chain.from_iterable(map(dict.values, self._tensors)) if w is not None]
        return [*state, *_addresses(weights), *(weight.dtype for weight in weights)]

    def _run(self) -> None:
        """One step, of which the host takes no notice."""
        slots = self._cache.get_seq_length()
        for paged in self._cache.paged:
            paged.recording = True
        try:
            arguments = {cache_name(self._model): self._cache}
            out = self._model(self._ids, position_ids=self._positions, use_cache=True, **arguments)
        finally:
            for paged in self._cache.paged:
                paged.recording = False
                paged.slots = slots
            self._cache.end()  # nothing was added
        self._logits = out.logits
        self._positions.add_(self._rows)

    def _try(self) -> None:
        """A run that changes nothing, but for the tokens it writes, which are written again."""
        held = [self._positions]
        for layer, paged in self._layers():
            held += self._changed_by_steps(layer, paged)
        before = [tensor.clone() for tensor in held]
        try:
            self._run()
        finally:
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(old)

    def _record(self) -> None:
        self._replay = None  # should this fail, nothing is replayed that was recorded before
        device = self._model.device
        modules = list(self._model.modules())
        self._parts = [module._modules for module in modules]
        self._tensors = [held for module in modules for held in (module._parameters, module._buffers)]
        self._adapters = [module.__dict__ for module in modules if "merged_adapters" in module.__dict__]
        self._recorded = self._state()
        if device.type != "cuda":
            self._try()
            self._replay = self._run
            return
        # Kernels compile and libraries allocate in a first run, beside the current stream.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._try()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._replay = graph.replay


#: Attributes by which PEFT's layers decide what they compute.
_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a launch knows of a tensor beside its contents."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _addresses(weights: list[torch.Tensor]) -> list[int]:
    try:
        return [weight.data_ptr() for weight in weights]
    except RuntimeError:  # quantised weights that are made of several tensors
        if len(weights) == 1:
            return [id(weights[0])]
        return [address for weight in weights for address in _addresses([weight])]
