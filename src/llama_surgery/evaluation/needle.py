"""Needles: a fact planted in a long text, asked for at its end, answered by real generation."""

import bisect
import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llama_surgery.errors import TextError
from llama_surgery.evaluation.io import Progress
from llama_surgery.evaluation.needle_forms import FORMS, SYLLABLES, WORDS, Form
from llama_surgery.surgery.operate import inner_model
from llama_surgery.text import encode, leading_tokens

#: Depths of the fact, as shares of the context before it.
DEPTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


# A haystack is made of pieces of at most this many characters, so that it ends within a sentence or two
# of where it should.
_PIECE = 200

# Pieces tokenised alone may count more tokens than the whole text does, and names differ in length: a
# haystack has this share and this number of tokens too many, which are cut off at the front.
_SPARE_SHARE, _SPARE = 0.05, 32


@dataclasses.dataclass(frozen=True)
class NeedlePrompt:
    """One question to answer.

    Attributes:
        input_ids: The prompt's tokens: haystack, fact, haystack, question, unfinished answer.
        answer_ids: The tokens that must come next.
        form: Key of :data:`~llama_surgery.evaluation.needle_forms.FORMS`.
        depth: Where the fact stands, as a share of the context.
        length: Tokens of prompt and answer together.
        name: Whom the fact is about.
    """

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    form: str
    depth: float
    length: int
    name: str


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    count: int,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    seed: int,
) -> list[NeedlePrompt]:
    """Plants facts in windows of the texts.

    Every form, length and depth occurs equally often (to within one), combined at random. Names are
    invented and, like the values, do not occur in the haystack around them. Facts that the texts
    hold already stay as distractors.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents; a haystack is a window of one of them.
        count: Prompts wanted.
        lengths: Context lengths, in tokens, each counting prompt and answer.
        depths: Shares in 0…1 of the context that stand before the fact.
        seed: The same seed gives the same prompts.

    Raises:
        TextError: No document is long enough, or a depth or length makes no sense.
    """
    if not lengths or not depths or not all(0 <= depth <= 1 for depth in depths) or count < 1:
        raise TextError(
            f"count={count}, lengths={list(lengths)}, depths={list(depths)}: at least one of each is "
            "needed, and depths are shares between 0 and 1."
        )
    rng = random.Random(seed)
    lead = leading_tokens(tokenizer)
    documents = [_Document(tokenizer, text) for text in texts]
    plans = zip(
        _balanced(list(FORMS), count, rng),
        _balanced(lengths, count, rng),
        _balanced(depths, count, rng),
        strict=True,
    )
    return [_plant(tokenizer, documents, lead, form, length, depth, rng) for form, length, depth in plans]


def _balanced(values: Sequence, count: int, rng: random.Random) -> list:
    chosen = [values[index % len(values)] for index in range(count)]
    rng.shuffle(chosen)
    return chosen


class _Document:
    """A document in pieces: sentences, several where they are short, parts where they are long.

    Attributes:
        pieces: Joined, they are the document.
        ends: Tokens before each piece, and of all.
        paragraphs: Indices of the pieces that begin a paragraph.
        largest: Tokens of the largest piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        paragraphs = [list(_pieces(paragraph)) for paragraph in re.split(r"(?<!\n)(?=\n\n)", text)]
        self.pieces = list(itertools.chain.from_iterable(paragraphs))
        self.paragraphs = [0, *itertools.accumulate(map(len, paragraphs[:-1]))]
        encoded = tokenizer(self.pieces, add_special_tokens=False, verbose=False).input_ids
        self.ends = [0, *itertools.accumulate(map(len, encoded))]
        self.largest = max(map(len, encoded), default=0)

    def places(self, front: int, behind: int) -> list[int]:
        """Pieces with at least so many tokens before and from them on: paragraphs, if there are any."""
        for indices in (self.paragraphs, range(len(self.pieces) + 1)):
            low = bisect.bisect_left(indices, front, key=self.ends.__getitem__)
            high = bisect.bisect_right(indices, self.ends[-1] - behind, key=self.ends.__getitem__)
            if low < high:
                return list(indices[low:high])
        return []


def _pieces(paragraph: str) -> Iterator[str]:
    """Cuts a text before white space, which most tokenizers join to what comes after it."""
    rest = paragraph
    while len(rest) > _PIECE:
        # After the last sentence that fits, else after the last word, else anywhere.
        head = rest[:_PIECE]
        sentences = [match.end() for match in re.finditer(r"[.!?;][\"'”’)]*(?=\s)", head)]
        words = [match.end() for match in re.finditer(r"\S(?=\s)", head)]
        cut = (sentences or words or [_PIECE])[-1]
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _plant(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[_Document],
    lead: list[int],
    form: str,
    length: int,
    depth: float,
    rng: random.Random,
) -> NeedlePrompt:
    wording = FORMS[form]
    # Any name and value will do to see how much room fact and question take.
    sample = {"name": "Bosera", "value": "48213" if wording.numeric else "garnet"}
    fact_tokens = len(encode(tokenizer, wording.fact.format(**sample)))
    tail_tokens = len(encode(tokenizer, wording.question.format(**sample) + " " + sample["value"]))
    room = length - len(lead) - fact_tokens - tail_tokens
    if room < 2 * _SPARE:
        raise TextError(
            f"{length} tokens leave {room} for the haystack: use contexts of at least "
            f"{length - room + 2 * _SPARE} tokens."
        )
    behind = max(0, min(round((1 - depth) * length) - tail_tokens, room - _SPARE))
    front_text, back_text = _haystack(documents, room - behind, behind, rng)
    name, value = _invent(wording, front_text + back_text, rng)
    parts = [
        front_text.strip(),
        wording.fact.format(name=name, value=value),
        back_text.strip(),
        wording.question.format(name=name),
    ]
    whole = encode(tokenizer, "\n\n".join(part for part in parts if part) + f" {value}")
    # Where a tokenizer joins the end of the prompt and the start of the answer, the prompt ends
    # before the joint, so that the answer is always tokenised as in running text.
    answer = _new_tokens(tokenizer, parts[-1], f"{parts[-1]} {value}")
    excess = len(whole) + len(lead) - length
    if excess < 0:
        raise TextError(
            f"the haystack came out {-excess} tokens short of {length}: this tokenizer counts parts of a "
            "text very differently from the whole, and cannot be used for needles."
        )
    return NeedlePrompt(
        input_ids=(*lead, *whole[excess:-answer]),
        answer_ids=tuple(whole[-answer:]),
        form=form,
        depth=depth,
        length=length,
        name=name,
    )


def _new_tokens(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> int:
    """How many tokens at the end of ``after`` are not yet those of ``before``."""
    old, new = encode(tokenizer, before), encode(tokenizer, after)
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(old))
    return len(new) - same


def _haystack(documents: Sequence[_Document], front: int, behind: int, rng: random.Random) -> tuple[str, str]:
    """Text of one document with somewhat more than ``front`` tokens, and the ``behind`` after it."""
    front += _SPARE + round((front + behind) * _SPARE_SHARE)
    places = [(document, document.places(front + document.largest, behind)) for document in documents]
    places = [(document, indices) for document, indices in places if indices]
    if not places:
        longest = max((document.ends[-1] for document in documents), default=0)
        raise TextError(
            f"a haystack of {front + behind} tokens is needed in one document, but the longest of "
            f"{len(documents)} has {longest}. Give a longer text or ask for shorter contexts."
        )
    document, indices = rng.choice(places)
    split, ends = rng.choice(indices), document.ends
    stop = bisect.bisect_right(ends, ends[split] + behind) - 1
    # What the last whole piece leaves of ``behind`` is made up for in front.
    start = bisect.bisect_right(ends, ends[stop] - behind - front) - 1
    return "".join(document.pieces[start:split]), "".join(document.pieces[split:stop])


def _invent(wording: Form, haystack: str, rng: random.Random) -> tuple[str, str]:
    """A name and a value that the haystack does not hold."""
    while True:
        name = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3, 3)))).capitalize()
        if name not in haystack:
            break
    if wording.numeric:
        while True:
            value = str(rng.randint(10_000, 99_999))
            if value not in haystack:
                return name, value
    present = set(re.findall(r"[a-z]+", haystack.lower()))
    # A very long haystack may hold all of them; the name still makes the answer unique.
    return name, rng.choice([word for word in WORDS if word not in present] or WORDS)


@torch.no_grad()
def score_needles(
    model: nn.Module,
    prompts: Sequence[NeedlePrompt],
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[bool]:
    """Lets the model answer by greedy ``generate()``.

    Args:
        model: A causal language model of transformers, dense or operated.
        prompts: What to answer.
        batch_size: Prompts of equal length that are answered together, without padding.
        progress: Told after each batch.

    Returns:
        For each prompt, whether every token of the answer was generated. A model that ends its
        text earlier has not answered.
    """

    def shape(index: int) -> tuple[int, int]:
        return len(prompts[index].input_ids), len(prompts[index].answer_ids)

    correct = [False] * len(prompts)
    done = 0
    for (_, answer), group in itertools.groupby(sorted(range(len(prompts)), key=shape), key=shape):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            ids = torch.tensor(
                [prompts[index].input_ids for index in batch], device=inner_model(model).device
            )
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_greedy(model, answer),
            )
            for index, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                correct[index] = tuple(row[:answer]) == prompts[index].answer_ids
            done += len(batch)
            if progress is not None:
                progress("needles", done, len(prompts))
    return correct


def _greedy(model: nn.Module, tokens: int) -> GenerationConfig:
    """Pins what a model's own generation settings could change (some penalise repetition)."""
    pad = inner_model(model).generation_config.pad_token_id
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        # Nothing is padded but rows that ended early; a value keeps transformers from asking.
        pad_token_id=0 if pad is None else pad,
    )
