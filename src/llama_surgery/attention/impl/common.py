"""Small things that the ways of executing a plan share."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32, everything else as it comes."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def differentiable(*tensors: torch.Tensor | None) -> bool:
    """Does a call on these tensors have to leave a graph for gradients?"""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """``c·tanh(logits / c)``, in place where no gradient needs the tanh; unchanged without a cap."""
    if softcap is None:
        return logits
    if logits.requires_grad:
        return torch.tanh(logits / softcap) * softcap
    return logits.div_(softcap).tanh_().mul_(softcap)


def softmax_matmul(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of ``logits`` (batch, rows, keys), consumed, times ``values``; and its log-sum-exp.

    Of a row that sees no key the output is zero and the log-sum-exp the lowest number: it weighs nothing
    beside other keys, and gradients stay finite.
    """
    # The maximum only shifts the exponents, so no gradient passes through it.
    top = logits.detach().amax(-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    return (weights @ values).div_(total), (total.log() + top).squeeze(-1)


def merge(
    out: torch.Tensor, lse: torch.Tensor, more_out: torch.Tensor, more_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention results over disjoint keys by their log-sum-exp.

    Args:
        out, more_out: (..., rows, value_dim), each normalised over its own keys.
        lse, more_lse: (..., rows).

    Returns:
        Output and log-sum-exp over the union of the keys.
    """
    total = torch.logaddexp(lse, more_lse)
    share = (lse - total).exp().unsqueeze(-1)
    more_share = (more_lse - total).exp().unsqueeze(-1)
    return torch.addcmul(out * share, more_out, more_share), total
