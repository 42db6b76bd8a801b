"""Tensors that are written in place, with gradients and without."""

from typing import Any

import torch


def writable(tensor: torch.Tensor) -> bool:
    """Can it be written in place here? What was made in inference mode cannot be outside of it."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class Written(torch.autograd.Function):
    """A tensor after a write in place, as a new tensor on the same memory, for the sake of gradients.

    Those of the written part go to what was written, all others to the tensor as it was. Nothing is copied
    but what is written: autograd's own in-place copy would not let an earlier call keep a view of the rest.
    """

    @staticmethod
    def forward(ctx: Any, held: torch.Tensor, new: torch.Tensor, streams: slice, start: int) -> torch.Tensor:
        ctx.streams, ctx.start, ctx.length = streams, start, new.shape[-2]
        memory = held.data
        memory[streams].narrow(-2, start, ctx.length).copy_(new)
        return memory

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        held = new = None
        if ctx.needs_input_grad[1]:
            new = gradient[ctx.streams].narrow(-2, ctx.start, ctx.length)
        if ctx.needs_input_grad[0]:
            held = gradient.clone()
            held[ctx.streams].narrow(-2, ctx.start, ctx.length).zero_()
        return held, new, None, None
