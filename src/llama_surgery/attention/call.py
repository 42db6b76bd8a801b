"""What is decided about the calls of one layer on one cache before any of them is executed."""

import dataclasses

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.router import PageRouter


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """How rows in tiles of one size are executed; made by :func:`llama_surgery.attention.executor.resolve`.

    Attributes:
        executor: ``triton``, ``gather`` or ``reference``.
        tile: Queries of a tile: ``config.tile`` or, in decode steps, 1.
        scale: Scaling of q·k.
        softcap: Cap of the logits, or None.
        router: Learned corrections, one for every KV head, or None.
    """

    config: SurgeryConfig
    executor: str
    tile: int
    scale: float
    softcap: float | None = None
    router: PageRouter | None = None
