"""Pages with soft digits: the layout's values, and gradients for the map of the keys."""

import pytest
import torch

from llama_surgery import SurgeryConfig
from llama_surgery.learning.soft_tree import pages_of
from llama_surgery.topology.layout import build_layout
from llama_surgery.topology.router import PageRouter

CONFIG = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8)


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 64, 5, dtype=torch.float64, generator=generator)
    key_map = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)
    return keys, key_map


@pytest.mark.parametrize("learned", [True, False])
def test_values_are_those_of_the_layout(learned: bool) -> None:
    keys, key_map = case(0)
    router = PageRouter(key_map=key_map.requires_grad_(learned))
    tree = pages_of(keys, router.map_keys(keys.unflatten(1, (2, 32))), CONFIG)
    layout = build_layout(keys, keys, CONFIG, router)
    torch.testing.assert_close(tree.moments.mean, layout.moments.mean)
    torch.testing.assert_close(tree.moments.variance, layout.moments.variance)
    slots = tree.member.detach().round().argmax(-1)
    expected = torch.empty_like(slots)
    expected.scatter_(-1, layout.order.long(), (torch.arange(32) // 8).expand_as(slots))
    assert torch.equal(slots, expected)


def test_soft_digits_agree_with_hard_ones() -> None:
    keys, key_map = case(1)
    mapped = PageRouter(key_map=key_map.requires_grad_()).map_keys(keys.unflatten(1, (2, 32)))
    tree = pages_of(keys, mapped, CONFIG)
    # The gradient of a key's membership of its own ball in anything that raises its probability is positive.
    own = (tree.member * tree.member.detach().round()).sum()
    (gradient,) = torch.autograd.grad(own, key_map)
    with torch.no_grad():
        moved = PageRouter(key_map=key_map + 0.01 * gradient).map_keys(keys.unflatten(1, (2, 32)))
        again = pages_of(keys, moved, CONFIG)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert ((tree.member - again.member).abs() > 0.5).double().mean() < 0.1


def test_the_gradient_of_moments_is_that_of_soft_membership() -> None:
    keys, key_map = case(2)
    mapped = PageRouter(key_map=key_map.requires_grad_()).map_keys(keys.unflatten(1, (2, 32)))
    moments = pages_of(keys, mapped, CONFIG).moments
    for part in (moments.mean, moments.variance):
        (gradient,) = torch.autograd.grad(part.square().sum(), key_map, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
