"""Processes that learn together, each on windows and a GPU of its own."""

import atexit
import dataclasses
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch

from llama_surgery.errors import SurgeryError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of them this one is. All keep the same parameters: what moves these is averaged first.

    Attributes:
        index: 0 is the main process, which alone reports and writes files.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.index == 0

    def window(self, step: int, windows: int) -> int:
        """The window that this process takes in a step: each takes another."""
        return (step * self.count + self.index) % windows

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their means over all processes; one that is missing counts as zero."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        device = gradients[0].device
        mean = reduce(torch.cat([gradient.flatten().to(device) for gradient in gradients]), "mean")
        for parameter, part in zip(parameters, mean.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device)

    def average(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Means over all processes; ``device`` is that of the process's tensors."""
        if self.count == 1:
            return list(numbers)
        from accelerate.utils import reduce

        return reduce(torch.tensor(numbers, dtype=torch.float64, device=device), "mean").tolist()

    def agreed(self, value: T) -> T:
        """The main process's value, for all."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


#: A process that learns by itself.
ALONE = Processes()


def launched(device: str = "auto") -> Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` began; one where neither did.

    Afterwards ``cuda`` is this process's own GPU.

    Args:
        device: ``cpu``, or anything else for GPUs if there are any.

    Raises:
        SurgeryError: There are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if find_spec("accelerate") is None:
        raise SurgeryError("learning in several processes needs accelerate: pip install accelerate.")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)
    return Processes(state.process_index, state.num_processes)
