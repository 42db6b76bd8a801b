"""Keeping calls from cuDNN's attention, PyTorch's first choice on Hopper, which plans for every new shape."""

import threading
from typing import Any

import torch

#: Most (row, key) pairs of a call that is kept from it: to plan takes the host longer than such a call takes,
#: and each decode step has a new shape.
PLANNED = 1 << 24


class _Without:
    """A context in which PyTorch's attention leaves cuDNN out, whatever other threads are in it.

    The switch is the process's: who comes first turns it, and who leaves last turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


without_cudnn = _Without()
