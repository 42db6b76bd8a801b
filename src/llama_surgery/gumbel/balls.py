"""What a row sees under the ``gumbel`` topology, and attention over exactly that.

A row sees position 0, its window, and the tokens of its own ball. Nothing is skipped: rows are multiplied
with all keys before them, some rows at a time, and masked, token by token as in training.
"""

import torch

from llama_surgery.attention.impl.reference import masked_softmax

#: Logits that are held at once, in elements.
ELEMENTS = 1 << 26


def ball_ids(digits: torch.Tensor, arity: int, radius: int) -> torch.Tensor:
    """The ball of radius ``radius`` that every token is in, below ``arity ** max(0, levels - radius)``.

    The distance of two tokens is levels less the number of *last* digits they share, so a ball is named by
    the last levels − radius digits; radius ≥ levels leaves one ball. ``digits`` are (..., levels) int64, and
    the result (...) int64.
    """
    naming = digits[..., radius:]
    places = arity ** torch.arange(naming.shape[-1], device=digits.device)
    return (naming * places).sum(-1)


def always_visible(rows: torch.Tensor, keys: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, keys) masks: what every row sees (position 0 and its window), and what it may see at all.

    ``rows`` and ``keys`` are positions, (rows,) and (keys,); ``window`` counts the row's own.
    """
    causal = keys <= rows[:, None]
    return causal & ((keys == 0) | (rows[:, None] - keys < window)), causal


def ball_mask(balls: torch.Tensor, rows: torch.Tensor, window: int) -> torch.Tensor:
    """What rows at positions (rows,) see, as a boolean matrix (..., rows, n): the oracle.

    ``balls`` are (..., n) int64 of all tokens up to the last row at least.
    """
    keys = torch.arange(balls.shape[-1], device=balls.device)
    always, causal = always_visible(rows, keys, window)
    return always | (causal & (balls[..., rows].unsqueeze(-1) == balls.unsqueeze(-2)))


def always_pairs(rows: int, window: int) -> int:
    """(Query, key) pairs of position 0 and window, of the first ``rows`` rows of a text."""
    full = min(rows, window)
    return full * (full + 1) // 2 + (rows - full) * (window + 1)


def attend_balls(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    balls: torch.Tensor,
    *,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of a text's last rows over what :func:`ball_mask` shows them, in at least float32.

    Args:
        queries: (batch, heads, rows, head_dim), rows at the last positions.
        keys, values: (batch, kv_heads, n, head_dim or value_dim), all positions in order.
        balls: (batch, heads, n) int64, the ball of every token, for each query head.

    Returns:
        (batch, heads, rows, value_dim), the queries' dtype; and (heads,) int64, summed over the batch, the
        (query, key) pairs that rows see and those that are multiplied.
    """
    (batch, kv_heads, count, _), (heads, rows) = keys.shape, queries.shape[1:3]
    grouped, group_balls = (x.unflatten(1, (kv_heads, -1)).flatten(0, 1) for x in (queries, balls))
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    strip = max(1, ELEMENTS // (batch * heads * count))
    outs, seen, read = [], balls.new_zeros(heads), balls.new_zeros(heads)
    for start in range(0, rows, strip):
        stop = min(start + strip, rows)
        end = count - rows + stop
        position = torch.arange(count - rows + start, end, device=queries.device)
        visible = ball_mask(group_balls[..., :end], position, window)
        out, _ = masked_softmax(
            grouped[:, :, start:stop], keys[:, :end], values[:, :end], visible, scale, None
        )
        outs.append(out.to(queries.dtype))
        seen += visible.sum((-1, -2)).view(batch, heads).sum(0)
        read += batch * (stop - start) * end
    return torch.cat(outs, 2).unflatten(0, (batch, kv_heads)).flatten(1, 2), seen, read
