"""Needles: a fact planted in a long text, asked for at its end, answered by real generation."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_surgery.errors import TextError
from llama_surgery.evaluation.generation import continue_greedily
from llama_surgery.evaluation.needle_facts import (
    FORMS,
    PLAIN,
    VARIANTS,
    check_variants,
    facts_behind,
    invent_name,
    invent_value,
    other_facts,
)
from llama_surgery.evaluation.needle_haystack import SPARE, Document, choose_haystack
from llama_surgery.surgery.progress import Progress
from llama_surgery.text import encode, leading_tokens, shared_start

#: Depths of the fact, as shares of the context before it.
DEPTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


@dataclasses.dataclass(frozen=True)
class NeedlePrompt:
    """One question to answer.

    Attributes:
        input_ids: The prompt's tokens: haystack, fact, haystack, question, unfinished answer.
        answer_ids: The tokens that must come next.
        form: Key of :data:`~llama_surgery.evaluation.needle_facts.FORMS`.
        depth: Where the fact stands, as a share of the context.
        length: Tokens of prompt and answer together, further questions included.
        name: Whom the fact is about.
        variant: Key of :data:`~llama_surgery.evaluation.needle_facts.VARIANTS`.
        then: Further questions: tokens of a prompt in which those before it are answered, and of the answer.
    """

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    form: str
    depth: float
    length: int
    name: str
    variant: str = PLAIN
    then: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def kind(self) -> str:
        """What the value is: ``number`` or ``word``."""
        return "number" if FORMS[self.form].numeric else "word"


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    count: int,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    variants: Sequence[str] = (PLAIN,),
    seed: int,
) -> list[NeedlePrompt]:
    """Plants facts in windows of the texts.

    Every form, length, depth and variant occurs equally often (to within one), combined at random but for
    variants, which share out the prompts of each form and length. Names are invented and, like the values, do
    not occur in the haystack around them. Facts that the texts hold already stay as distractors.

    Args:
        texts: Documents; a haystack is a window of one of them.
        count: Prompts wanted.
        lengths: Context lengths, in tokens, each counting prompt and answer.
        depths: Shares in 0…1 of the context that stand before the fact. Other facts stand anywhere.
        variants: Keys of :data:`~llama_surgery.evaluation.needle_facts.VARIANTS`.
        seed: The same seed gives the same prompts.

    Raises:
        TextError: No document is long enough, or a depth, length or variant makes no sense.
    """
    if not lengths or not depths or not all(0 <= depth <= 1 for depth in depths) or count < 1:
        raise TextError(
            f"count={count}, lengths={list(lengths)}, depths={list(depths)}: at least one of each is "
            "needed, and depths are shares between 0 and 1."
        )
    check_variants(variants)
    rng, others = random.Random(seed), random.Random(f"{seed} others")
    lead = leading_tokens(tokenizer)
    documents = [Document(tokenizer, text) for text in texts]
    forms, wanted, places = (_balanced(values, count, rng) for values in (list(FORMS), lengths, depths))
    # In turn over prompts of one form and length: variants are compared on equally hard ones.
    alike = sorted(range(count), key=lambda index: (forms[index], wanted[index]))
    kinds = dict(zip(alike, itertools.cycle(variants), strict=False))
    plans = [(forms[index], wanted[index], places[index], kinds[index]) for index in range(count)]
    return [_plant(tokenizer, documents, lead, plan, rng, others) for plan in plans]


def _balanced(values: Sequence, count: int, rng: random.Random) -> list:
    chosen = [values[index % len(values)] for index in range(count)]
    rng.shuffle(chosen)
    return chosen


def _plant(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    lead: list[int],
    plan: tuple[str, int, float, str],
    rng: random.Random,
    others: random.Random,
) -> NeedlePrompt:
    """One prompt; ``rng`` decides text and fact, ``others`` all facts beside it."""
    form, length, depth, kind = plan
    wording, variant = FORMS[form], VARIANTS[kind]
    # Any name and value will do to see how much room facts and questions take.
    sample = {"name": "Bosera", "value": "48213" if wording.numeric else "garnet"}
    fact_tokens = len(encode(tokenizer, wording.fact.format(**sample)))
    asked = _asked(wording.question, [(sample["name"], sample["value"])] * variant.asked)
    tail_tokens = len(encode(tokenizer, asked[-1] + " " + sample["value"]))
    room = length - len(lead) - fact_tokens - tail_tokens
    if room < 2 * SPARE:
        raise TextError(
            f"{length} tokens leave {room} for the haystack: use contexts of at least "
            f"{length - room + 2 * SPARE} tokens."
        )
    behind = max(0, min(round((1 - depth) * length) - tail_tokens, room - SPARE))
    later = facts_behind(others, variant.facts - 1, depth, room - behind, behind, fact_tokens)
    front = room - behind - (variant.facts - 1 - later) * fact_tokens
    haystack = choose_haystack(documents, front, behind - later * fact_tokens, rng)
    name = invent_name(rng, (), haystack.text)
    value = invent_value(rng, wording, (), haystack.text)
    further = other_facts(others, variant, wording, name, value, haystack.text)
    fact, *written = [wording.fact.format(name=n, value=v) for n, v in ((name, value), *further)]
    parts, first_fact = haystack.parts(fact, written[later:], written[:later], others)
    answered = [(name, value), *others.sample(further, variant.asked - 1)]
    prompts = []
    for question, (_, said) in zip(_asked(wording.question, answered), answered, strict=True):
        whole = encode(tokenizer, "\n\n".join([*parts, question]) + f" {said}")
        before, after = encode(tokenizer, question), encode(tokenizer, f"{question} {said}")
        # Where a tokenizer joins the end of the prompt and the start of the answer, the prompt ends
        # before the joint, so that the answer is always tokenised as in running text.
        prompts.append((whole, len(after) - shared_start(before, after)))
    excess = len(prompts[-1][0]) + len(lead) - length
    if not 0 <= excess <= len(encode(tokenizer, "".join(parts[:first_fact]))):
        raise TextError(
            f"the haystack of {length} tokens came out with {excess} too many, or would lose a fact: this "
            "tokenizer counts parts of a text very differently from the whole. Use longer contexts."
        )
    first, *then = [((*lead, *whole[excess:-answer]), tuple(whole[-answer:])) for whole, answer in prompts]
    return NeedlePrompt(*first, form, depth, length, name, kind, tuple(then))


def _asked(question: str, facts: Sequence[tuple[str, str]]) -> list[str]:
    """Ends of the prompts: each asks for one fact, after those before it were answered."""
    asked, before = [], ""
    for name, value in facts:
        asked.append(before + question.format(name=name))
        before = f"{asked[-1]} {value}.\n\n"
    return asked


def score_needles(
    model: nn.Module, prompts: Sequence[NeedlePrompt], batch_size: int = 1, progress: Progress | None = None
) -> list[bool]:
    """Whether the model answers each prompt by greedy ``generate()``: every token, of all its questions.

    A model that ends its text earlier has not answered. ``batch_size`` prompts of the shortest length are
    answered together, without padding, of longer ones fewer; ``progress`` is told after each batch.
    """

    asked = [
        (number, *question)
        for number, prompt in enumerate(prompts)
        for question in ((prompt.input_ids, prompt.answer_ids), *prompt.then)
    ]

    def shape(index: int) -> tuple[int, int]:
        return len(asked[index][1]), len(asked[index][2])

    correct = [True] * len(prompts)
    done, shortest = 0, min((len(ids) for _, ids, _ in asked), default=0)
    for (length, answer), group in itertools.groupby(sorted(range(len(asked)), key=shape), key=shape):
        indices, size = list(group), max(1, batch_size * shortest // length)
        for start in range(0, len(indices), size):
            batch = [asked[index] for index in indices[start : start + size]]
            rows = continue_greedily(model, [ids for _, ids, _ in batch], answer)
            for (number, _, wanted), row in zip(batch, rows, strict=True):
                correct[number] &= tuple(row) == wanted
            done += len(batch)
            if progress is not None:
                progress("needles", done, len(asked))
    return correct
