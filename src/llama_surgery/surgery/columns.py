"""Which columns of a padded batch are real: asked of the device once for a call, not once for every layer."""

import torch

#: Attribute of a mask under which the answer is kept for the call's other layers.
_ATTRIBUTE = "_llama_surgery_columns"


def columns_of(mask: torch.Tensor, slots: int) -> tuple[list[int], list[torch.Tensor | None]]:
    """Real tokens among the first ``slots`` columns, and indices of the real ones among the others.

    Args:
        mask: (batch, columns) bool, True for real tokens; the same object for all layers of a call.
        slots: Columns that earlier calls brought.

    Returns:
        For every sequence the number, and the indices (int64), None where all are real.
    """
    known = getattr(mask, _ATTRIBUTE, None)
    if known is None or known[0] != slots:
        new = mask[:, slots:]
        before, after = torch.stack((mask[:, :slots].sum(1), new.sum(1))).tolist()
        columns = [
            None if count == new.shape[1] else row.nonzero().squeeze(1)
            for count, row in zip(after, new, strict=True)
        ]
        known = slots, before, columns
        setattr(mask, _ATTRIBUTE, known)
    return list(known[1]), list(known[2])
