"""How long a text a model was made for, and what is said about longer and about too short ones."""

import logging

import torch
from torch import nn

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.surgery.supported import inner_model
from llama_surgery.topology.geometry import first_far

#: Tokens of a window where nothing else is asked for, if the model's context allows.
USUAL_LENGTH = 8192
_log = logging.getLogger(__name__)


def context_length(model: nn.Module) -> int | None:
    """Tokens that a model was made for, by its configuration; None where that does not say."""
    text = inner_model(model).config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if longest and factor and original:
        longest = max(longest, int(factor * original))
    return longest


def usual_length(model: nn.Module) -> int:
    """Tokens of a window where none are asked for: the model's context, at most 8,192."""
    text = inner_model(model).config.get_text_config()
    return min(USUAL_LENGTH, getattr(text, "max_position_embeddings", None) or USUAL_LENGTH)


def check_length(model: nn.Module, longest: int, *, read: bool = True) -> None:
    """Warn of texts that are longer than a model was made for: what it loses there is its own doing.

    Args:
        model: A model, dense or operated, or one without weights.
        longest: Tokens of the longest text.
        read: The model will read it, and not just be reckoned with.

    Raises:
        SurgeryError: The model has a table of positions, which ends before.
    """
    context = context_length(model)
    if context is None or longest <= context:
        return
    told = (
        f"{longest:,} tokens: the model was made for {context:,} positions at most (max_position_embeddings)"
    )
    if read and _has_table(model):
        raise SurgeryError(f"{told} and knows no others. Ask for shorter texts.")
    _log.warning(f"{told}. Beyond them the dense model itself may fail, and what is measured says little.")


def check_vocabulary(model: nn.Module, ids: torch.Tensor) -> None:
    """Raise SurgeryError where a tokenizer made tokens that the model does not know: on a GPU, to look one up
    would end all work there."""
    known = getattr(inner_model(model).config.get_text_config(), "vocab_size", None)
    if known is not None and (last := int(ids.max())) >= known:
        raise SurgeryError(
            f"the tokenizer gives token {last}, but the model knows {known:,} (vocab_size): they do not "
            "belong together. Give the model's own tokenizer, or call resize_token_embeddings for tokens "
            "that were added."
        )


def check_far_field(length: int, config: SurgeryConfig) -> None:
    """Raise TextError where no row of a text of ``length`` tokens has a far field."""
    if length <= (least := first_far(config)):
        name = "dense_until" if config.dense_until == least else "window + chunk_size"
        raise TextError(
            f"length={length}: a window needs more than {name} = {least} tokens to have a far field."
        )


def _has_table(model: nn.Module) -> bool:
    """Whether positions are looked up in a table that was learned, as GPT-2's are."""
    names = (
        name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Embedding)
    )
    return any(name == "wpe" or "position" in name for name in names)
