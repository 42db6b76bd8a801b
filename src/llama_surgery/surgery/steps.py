"""Decode steps of a whole operated model as replays of one CUDA graph."""

from collections.abc import Callable

import torch

from llama_surgery.errors import SurgeryError
from llama_surgery.surgery.cache import PagedCache
from llama_surgery.surgery.compat import cache_name
from llama_surgery.surgery.decoding import settle, tally_of
from llama_surgery.surgery.operation import surgery_of
from llama_surgery.surgery.supported import inner_model

#: Steps for which there is room before the graph has to be captured anew.
ROOM = 1024


class GraphedSteps:
    """Decode steps of an operated model on a cache that holds a prompt, captured once and replayed.

    Shapes never change and nothing is asked of the device, so that a step costs what its kernels cost. What
    the host knows anyway (lengths, chunks that are full) it does between replays. Without a GPU a step runs
    as it would have been recorded, for tests.

    Args:
        model: An operated model, all of whose attention layers are operated.
        cache: Its cache, after a prompt. Sequences may differ in length; every step adds to all of them.
        rows: Tokens of a step, 1 to 8.

    Raises:
        SurgeryError: The cache is empty or has layers of another kind.
    """

    def __init__(self, model: torch.nn.Module, cache: PagedCache, rows: int = 1) -> None:
        self._model, self._cache, self._rows = inner_model(model), cache, rows
        layers = surgery_of(model)
        if len(cache.paged) != len(cache.layers) or len(layers) != len(cache.layers):
            raise SurgeryError(
                "a step can be captured only if every attention layer is operated: this model has others "
                "(sliding windows, say), whose caches grow."
            )
        if not cache.get_seq_length():
            raise SurgeryError("an empty cache: run the prompt through the model first.")
        self._layers = [(layers[index], cache.layers[index]) for index in range(len(cache.layers))]
        self._ids = torch.zeros(cache.paged[0].batch, rows, dtype=torch.int64, device=self._model.device)
        self._positions = torch.zeros_like(self._ids)
        self._known_positions: list[int] = []  # first positions as the device holds them
        self._logits: torch.Tensor | None = None
        self._replay: Callable[[], object] | None = None
        self._recorded: tuple[object, ...] = ()

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed the next tokens.

        Args:
            ids: (batch, rows) int64.

        Returns:
            Logits (batch, rows, vocabulary). The next step overwrites them.

        Raises:
            SurgeryError: The decode kernels cannot run this model's steps.
        """
        self._prepare()
        self._ids.copy_(ids)
        if self._replay is None or self._recorded != self._state():
            self._record()
        assert self._replay is not None and self._logits is not None
        self._replay()
        for layer, paged in self._layers:
            paged.slots += self._rows
            settle(layer, paged, self._rows)
        return self._logits

    def _prepare(self) -> None:
        """Room for the step, and lengths and positions as the host knows them."""
        lengths = self._layers[0][1].lengths
        for _, paged in self._layers:
            paged.device_lengths()
            assert paged.buffers is not None
            if max(lengths) + self._rows > paged.buffers.capacity:
                paged.buffers.reserve(max(lengths) + ROOM)
        if lengths != self._known_positions:
            self._positions.copy_(torch.tensor(lengths)[:, None] + torch.arange(self._rows))
        self._known_positions = [length + self._rows for length in lengths]

    def _state(self) -> tuple[object, ...]:
        """What a graph holds the addresses of."""
        state: list[object] = []
        for layer, paged in self._layers:
            assert paged.buffers is not None
            held = (*paged.buffers.read_by_kernels(), paged.device_lengths(), tally_of(layer, paged))
            state += [*(tensor.data_ptr() for tensor in held), layer.config]
        return tuple(state)

    def _run(self) -> None:
        """One step, of which the host takes no notice."""
        slots = self._cache.get_seq_length()
        for _, paged in self._layers:
            paged.recording = True
        try:
            arguments = {cache_name(self._model): self._cache}
            out = self._model(self._ids, position_ids=self._positions, use_cache=True, **arguments)
        finally:
            for _, paged in self._layers:
                paged.recording = False
                paged.slots = slots
        self._logits = out.logits
        self._positions.add_(self._rows)

    def _try(self) -> None:
        """A run that changes nothing, but for the tokens it writes, which are written again."""
        held = [self._positions]
        for layer, paged in self._layers:
            held += [paged.device_lengths(), tally_of(layer, paged)]
        before = [tensor.clone() for tensor in held]
        self._run()
        for tensor, old in zip(held, before, strict=True):
            tensor.copy_(old)

    def _record(self) -> None:
        device = self._model.device
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
