"""What the summary of unseen pages costs, which densities of (query, key) pairs do not count."""

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import query_blocks


def summary_pairs(start: int, stop: int, config: SurgeryConfig, tile: int) -> float:
    """What rows ``start … stop - 1`` multiply with means at most, in (query, key) pairs.

    Every page or ball of a closed chunk is taken to be one term. A term costs one product with a mean
    value, half of what a (query, key) pair costs; its score is made for the selection in any case. With θ = 0
    nothing is unseen.

    Args:
        start: Position.
        stop: Position.
        config: The topology.
        tile: Queries of a tile: ``config.tile`` in prefill, 1 in decode steps.
    """
    if not config.summarised or config.theta_for(tile) == 0:
        return 0.0
    closed = sum(
        (block.stop - block.start) * block.closed for block in query_blocks(start, stop, config, tile)
    )
    return closed * config.chunk_size / config.summarised / 2


def summary_density(config: SurgeryConfig, length: int) -> float:
    """:func:`summary_pairs` of a prefill of ``length`` tokens, over its causal pairs as densities are."""
    return summary_pairs(0, length, config, config.tile) / (length * (length + 1) / 2)
