"""The tree over a chunk's keys: balls, distances, pages, ties, determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_surgery.topology.tree import (
    distances,
    paths,
    principal_direction,
    tree_order,
)

#: (depth, page_size): chunks of 6 to 64 keys.
SHAPES = [(1, 3), (3, 4), (4, 1), (2, 5), (3, 3), (4, 4), (3, 2), (0, 6)]


@st.composite
def chunks(draw):
    """Keys (streams, chunk_size, head_dim) and the tree's shape; few distinct values make ties."""
    depth, page = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dim = draw(st.sampled_from([1, 2, 8]))
    keys = torch.randn(2, page * 2**depth, dim, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        keys = keys.round()
    return keys, depth, page


@given(chunks())
def test_every_key_is_in_exactly_one_full_page_and_offsets_ascend_inside(chunk):
    keys, _, page = chunk
    order = tree_order(keys, page)
    assert torch.equal(order.sort(-1).values, torch.arange(keys.shape[1]).expand_as(order))
    inside = order.unflatten(-1, (-1, page))
    assert (inside.diff(dim=-1) > 0).all()


@given(chunks())
def test_balls_are_intervals_of_the_tree_order(chunk):
    keys, depth, page = chunk
    order = tree_order(keys, page)
    digits = paths(order, page)
    assert digits.shape == (*order.shape, depth)
    for stream in range(order.shape[0]):
        in_order = digits[stream, order[stream]].tolist()
        for length in range(depth + 1):
            prefixes = [tuple(path[:length]) for path in in_order]
            # Sorted prefixes: all keys of a ball are neighbours, and balls follow one another.
            assert prefixes == sorted(prefixes)
            sizes = {prefixes.count(prefix) for prefix in prefixes}
            assert sizes == {page * 2 ** (depth - length)}


@given(chunks())
def test_distances_are_an_ultrametric(chunk):
    keys, depth, page = chunk
    d = distances(paths(tree_order(keys, page), page))
    assert (d.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert torch.equal(d, d.transpose(-1, -2))
    assert d.min() == 0 and d.max() == depth
    # d(i, k) <= max(d(i, j), d(j, k)) for all i, j, k.
    through = torch.maximum(d[:, :, :, None], d[:, None, :, :]).amin(2)
    assert (d <= through).all()


@given(chunks())
def test_the_order_is_deterministic_and_a_chunk_does_not_see_its_neighbours(chunk):
    keys, _, page = chunk
    order = tree_order(keys, page)
    assert torch.equal(order, tree_order(keys.clone(), page))
    for stream in range(len(keys)):
        assert torch.equal(order[stream], tree_order(keys[stream], page))


@given(chunks())
def test_equal_keys_are_split_by_position(chunk):
    keys, _, page = chunk
    leaf = paths(tree_order(keys, page), page)
    weights = 2 ** torch.arange(leaf.shape[-1] - 1, -1, -1)
    leaf = (leaf * weights).sum(-1)
    for stream in range(len(keys)):
        for i in range(keys.shape[1]):
            same = (keys[stream, i + 1 :] == keys[stream, i]).all(-1)
            assert (leaf[stream, i + 1 :][same] >= leaf[stream, i]).all()


@pytest.mark.parametrize(("depth", "page"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keys_that_are_all_equal_stay_in_order(depth, page, dtype):
    size = page * 2**depth
    keys = torch.full((1, size, 5), 0.75, dtype=dtype)
    assert tree_order(keys, page).tolist() == [list(range(size))]


@given(chunks())
def test_every_split_orders_children_along_the_principal_direction(chunk):
    keys, depth, page = chunk
    if not depth:
        return
    order = tree_order(keys, page)
    # All streams at once, as the tree has them: where two directions tie, rounding decides between them.
    nodes = keys.unsqueeze(-3)
    centred = nodes - nodes.mean(-2, keepdim=True)
    projections = (centred @ principal_direction(centred).unsqueeze(-1)).flatten(1)
    for projection, by_path in zip(projections, order, strict=True):
        children = projection[by_path].unflatten(0, (2, -1))
        assert (children[:-1].amax(-1) <= children[1:].amin(-1) + 1e-12).all()


@given(st.integers(0, 2**31), st.sampled_from([2, 5, 16]))
def test_principal_direction_finds_the_largest_spread(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    axis = torch.nn.functional.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    along = 10 * torch.randn(64, 1, generator=generator, dtype=torch.float64)
    keys = along * axis + 0.1 * torch.randn(64, dim, generator=generator, dtype=torch.float64)
    direction = principal_direction(keys - keys.mean(0))
    assert direction.norm() == pytest.approx(1)
    assert (direction @ axis).abs() > 0.999


def test_principal_direction_of_equal_keys_is_zero():
    assert principal_direction(torch.zeros(3, 4, 2)).abs().max() == 0


def test_half_precision_keys_are_ordered_as_their_float32_copies():
    keys = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(tree_order(keys, 4), tree_order(keys.float(), 4))


def test_large_half_precision_keys_do_not_overflow():
    keys = (6e4 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)).half()
    order = tree_order(keys, 8)
    assert not torch.equal(order, torch.arange(64)), "the keys differ, so position alone cannot order them"
