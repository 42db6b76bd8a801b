"""What a comparison measures on: made once, and kept, since long texts take a while to tokenise."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llama_surgery.errors import TextError
from llama_surgery.evaluation.needle import NeedlePrompt, needle_prompts
from llama_surgery.files import write_atomically
from llama_surgery.text import windows as cut_windows

#: Perplexity windows, unless others are asked for.
WINDOWS = 24
#: Most calibration windows, for rules that learn, and fewest.
TRAINING_WINDOWS, FEWEST_WINDOWS = 16, 2


@dataclasses.dataclass(frozen=True)
class Samples:
    """Token windows and prompts.

    Attributes:
        windows: (windows, length) int64, for perplexity.
        calibration: (up to 16, length) int64, of other text.
        prompts: Needles.
    """

    windows: torch.Tensor
    calibration: torch.Tensor
    prompts: list[NeedlePrompt]


def digest(*texts: str) -> str:
    """Short fingerprint of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def make_samples(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    calibration: Sequence[str],
    folder: Path,
    *,
    length: int,
    windows: int | None,
    needles: int,
    needle_lengths: Sequence[int],
    needle_variants: Sequence[str],
    seed: int,
) -> Samples:
    """Cuts windows and plants needles, or reads what the same call made before.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents to measure on.
        calibration: Other documents.
        folder: Where samples are kept, in a file named after all that they depend on.
        length: Tokens of a window.
        windows: Perplexity windows; 24, or as many as the texts hold, if None.
        needles: Prompts.
        needle_lengths: Their lengths.
        needle_variants: Their variants.
        seed: Of all of them.

    Raises:
        TextError: The texts are too short.
    """
    asked = [length, windows, needles, list(needle_lengths), list(needle_variants), seed]
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    file = folder / f"samples-{digest(digest(*texts), digest(*calibration), vocabulary, repr(asked))}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Samples(
            torch.tensor(kept["windows"]),
            torch.tensor(kept["calibration"]),
            [NeedlePrompt(**{key: _tuples(value) for key, value in p.items()}) for p in kept["prompts"]],
        )
    samples = Samples(
        cut_windows(tokenizer, texts, length, windows, seed, usual=WINDOWS),
        _calibration_windows(tokenizer, calibration, length, seed),
        needle_prompts(
            tokenizer, texts, count=needles, lengths=needle_lengths, variants=needle_variants, seed=seed
        ),
    )
    content = {
        "windows": samples.windows.tolist(),
        "calibration": samples.calibration.tolist(),
        "prompts": [dataclasses.asdict(prompt) for prompt in samples.prompts],
    }
    write_atomically(file, lambda path: path.write_text(json.dumps(content), encoding="utf-8"))
    return samples


def _calibration_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, seed: int
) -> torch.Tensor:
    """As many windows as the texts hold, in powers of two."""
    count = TRAINING_WINDOWS
    while True:
        try:
            return cut_windows(tokenizer, texts, length, count, seed)
        except TextError:
            if count <= FEWEST_WINDOWS:
                raise
            count //= 2


def _tuples(value: Any) -> Any:
    """Tuples for lists, as prompts have them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
