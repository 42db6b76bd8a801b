"""Plans and the boolean matrices they stand for."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.topology.key_mask import key_mask

from llama_surgery.topology.geometry import Block
from llama_surgery.topology.plan import page_mask, plan_from_first_open, plan_of_everything, tiles_of

PAGE = 4


@st.composite
def plans(draw):
    """A plan in which pages are opened by rows of the block, or (as the sink page is) from row 0."""
    tile = draw(st.sampled_from([1, 2, 4, 8]))
    start = draw(st.integers(0, 30))
    block = Block(start, start + draw(st.integers(1, 25)), 2)
    streams, pages = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    tiles = tiles_of(block, tile)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    first_open = torch.full((streams, tiles, pages), tile)
    for t in range(tiles):
        anchor = block.start // tile * tile + t * tile
        low, high = max(anchor, block.start) - anchor, min(anchor + tile, block.stop) - anchor
        opened = torch.rand(streams, pages, generator=generator) < 0.4
        row = torch.randint(low, high, (streams, pages), generator=generator)
        first_open[:, t] = torch.where(opened, row, tile)
    if draw(st.booleans()):
        first_open[..., 0] = 0
    return plan_from_first_open(first_open, block, tile), first_open


def rows_of(plan):
    """(tile of the block, row of the tile) of every row of the block."""
    first = plan.block.start // plan.tile
    return [(p // plan.tile - first, p % plan.tile) for p in range(plan.block.start, plan.block.stop)]


@given(plans())
def test_pages_are_ascending_left_packed_and_padded(case):
    plan, first_open = case
    assert plan.pages.shape[-1] == int(plan.counts.max())
    for stream in range(first_open.shape[0]):
        for tile in range(plan.tiles):
            opened = (first_open[stream, tile] < plan.tile).nonzero().flatten().tolist()
            count = int(plan.counts[stream, tile])
            assert plan.pages[stream, tile, :count].tolist() == opened
            assert (plan.pages[stream, tile, count:] == -1).all()
            assert (plan.first_open[stream, tile, count:] == plan.tile).all()


@given(plans())
def test_the_mask_shows_a_page_from_the_row_that_opened_it(case):
    plan, first_open = case
    mask = page_mask(plan, first_open.shape[-1])
    for r, (tile, row) in enumerate(rows_of(plan)):
        assert torch.equal(mask[:, r], first_open[:, tile] <= row)


@given(plans())
def test_a_plan_read_back_from_its_mask_is_the_same_plan(case):
    plan, first_open = case
    mask = page_mask(plan, first_open.shape[-1])
    again = torch.full_like(first_open, plan.tile)
    for r, (tile, row) in reversed(list(enumerate(rows_of(plan)))):
        again[:, tile] = torch.where(mask[:, r], row, again[:, tile])
    # A page open before the block's first row is seen from that row on: the rows are all the mask knows.
    lead = torch.zeros(plan.tiles, dtype=torch.int64)
    lead[0] = plan.lead
    expected = torch.where(first_open < plan.tile, torch.maximum(first_open, lead[:, None]), plan.tile)
    assert torch.equal(again, expected)
    read_back = plan_from_first_open(again, plan.block, plan.tile)
    assert torch.equal(read_back.pages, plan.pages)
    assert torch.equal(page_mask(read_back, mask.shape[-1]), mask)


@given(plans())
def test_pairs_are_those_counted_in_the_masks(case):
    plan, first_open = case
    mask = page_mask(plan, first_open.shape[-1])
    assert torch.equal(plan.visible_pairs(PAGE), mask.sum((1, 2)) * PAGE)
    tiles = torch.tensor([tile for tile, _ in rows_of(plan)])
    read = (first_open < plan.tile)[:, tiles]  # a tile reads its pages for all of its rows
    assert torch.equal(plan.executed_pairs(PAGE), read.sum((1, 2)) * PAGE)
    assert (plan.visible_pairs(PAGE) <= plan.executed_pairs(PAGE)).all()
    assert torch.equal(plan.rows_per_tile(), torch.bincount(tiles))


@given(plans(), st.integers(0, 2**31))
def test_the_key_mask_shows_whole_pages_at_their_keys_positions(case, seed):
    plan, first_open = case
    streams, _, pages = first_open.shape
    chunks, chunk = 2, pages * PAGE
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(chunk, generator=generator) for _ in range(streams * chunks)])
    order = order.view(streams, chunks, chunk).to(torch.int16)
    mask = key_mask(plan, order, PAGE)
    by_page = page_mask(plan, chunks * pages)
    assert mask.shape == (streams, plan.block.stop - plan.block.start, chunks * chunk)
    for stream in range(streams):
        for page in range(chunks * pages):
            slots = range(page * PAGE % chunk, page * PAGE % chunk + PAGE)
            keys = [page // pages * chunk + int(order[stream, page // pages, s]) for s in slots]
            assert torch.equal(mask[stream][:, keys], by_page[stream, :, page, None].expand(-1, PAGE))


def test_a_plan_of_everything_shows_all_pages_to_all_rows() -> None:
    block, sinks = Block(70, 90, 2), torch.tensor([0, 2, 3])
    plan = plan_of_everything(block, 8, 4, sinks)
    assert page_mask(plan, 4).all() and plan.everything
    first_open = torch.zeros(3, tiles_of(block, 8), 4, dtype=torch.long)
    first_open[:, 0] = 70 % 8  # the first row that there is; only what is always open was before
    first_open[torch.arange(3), 0, sinks] = 0
    opened = plan_from_first_open(first_open, block, 8)
    for name in ("pages", "first_open", "counts"):
        assert torch.equal(getattr(plan, name), getattr(opened, name))
    assert torch.equal(plan.executed_pairs(16), opened.executed_pairs(16))
