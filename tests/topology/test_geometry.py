"""Closed chunks, and the cutting of rows into blocks of equal closed chunks."""

from hypothesis import given
from hypothesis import strategies as st

from llama_surgery.config import SurgeryConfig
from llama_surgery.topology.geometry import closed_chunks, query_blocks


@st.composite
def cases(draw):
    tile = draw(st.sampled_from([1, 4, 8]))
    config = SurgeryConfig(
        chunk_size=16,
        page_size=4,
        window=draw(st.sampled_from([0, 8, 16, 40])),
        tile=tile,
        theta=0.01,
        theta_decode=0.01,
        dense_until=draw(st.sampled_from([0, 0, 8, 48, 160, 1 << 20])),
    )
    start = draw(st.integers(0, 200))
    return config, start, start + draw(st.integers(1, 150)), draw(st.sampled_from([1, tile]))


@given(cases())
def test_a_chunk_is_closed_when_it_ends_a_window_before_the_tile(case):
    config, start, _, tile = case
    first = start - start % tile
    by_definition = [c for c in range(first + 1) if (c + 1) * config.chunk_size <= first - config.window]
    if first < config.dense_until:
        by_definition = []
    assert closed_chunks(start, config, tile) == len(by_definition)


@given(cases())
def test_blocks_cover_the_rows_once_with_equal_closed_chunks(case):
    config, start, stop, tile = case
    blocks = list(query_blocks(start, stop, config, tile))
    rows = [row for block in blocks for row in range(block.start, block.stop)]
    assert rows == list(range(start, stop))
    for block in blocks:
        assert 0 < block.stop - block.start <= config.chunk_size
        assert block.start % tile == 0 or block.start == start
        for row in range(block.start, block.stop):
            assert closed_chunks(row, config, tile) == block.closed


@given(cases())
def test_the_near_field_is_as_long_as_promised(case):
    config, start, stop, tile = case
    for block in query_blocks(start, stop, config, tile):
        if block.start < config.dense_until:
            continue
        for row in range(block.start, block.stop):
            near = row + 1 - block.closed * config.chunk_size
            assert near <= config.window + config.chunk_size + tile
            assert block.closed == 0 or near > config.window
