"""What summaries of unseen pages cost."""

import dataclasses

import pytest

from llama_surgery import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks, summary_density, summary_pairs

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, dense_until=128)


@pytest.mark.parametrize("length", [1, 100, 1000])
def test_half_a_pair_for_every_page_of_a_closed_chunk(length: int) -> None:
    pages = sum(closed_chunks(row, CONFIG, 16) * 4 for row in range(length))
    assert summary_density(CONFIG, length) == pytest.approx(pages / 2 / sum(range(1, length + 1)))


def test_decode_steps_have_tiles_of_their_own() -> None:
    config = dataclasses.replace(CONFIG, theta_decode=0.01)
    # Row 168 lies in the tile of row 160: two chunks are closed for it alone, and for the tile as well.
    assert summary_pairs(168, 169, config, 1) == 2 * 4 / 2
    # From 160 on, 128 + 32, the second chunk is closed; row 159 is in the tile of 144.
    assert summary_pairs(159, 161, config, 16) == (1 + 2) * 4 / 2


def test_nothing_is_summarised_without_a_summary_or_with_everything_open() -> None:
    assert summary_density(dataclasses.replace(CONFIG, summary="none"), 1000) == 0
    everything = dataclasses.replace(CONFIG, theta=0.0)
    assert summary_density(everything, 1000) == 0
    assert summary_pairs(999, 1000, dataclasses.replace(everything, theta_decode=0.1), 1) > 0
