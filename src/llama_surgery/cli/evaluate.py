"""``llama-surgery evaluate``."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, load_model, topology_of
from llama_surgery.cli.console import err, progress
from llama_surgery.cli.options import TOKENS, config_for, refuse, split_values, token_counts, topology_options

if TYPE_CHECKING:
    from llama_surgery.evaluation.ruler.materials import Materials

#: Exit code of a gate that does not let pass.
CLOSED = 3


_ruler = functools.partial(options.declared, "RULER")
_lm_eval = functools.partial(options.declared, "lm-evaluation-harness")
_against = functools.partial(options.declared, "Other rules")


@functools.partial(topology_options, gumbel=True)
def evaluate(
    *,
    model: options.Model,
    text: options.own(
        Path | None, "Text to measure on: a .txt file or a folder of them. Not the calibration text."
    ) = None,
    out_folder: options.own(
        Path | None,
        "Folder for results.json (for 'report'), tables as CSV, and all that is finished: the same command "
        "goes on there.",
        "--out",
    ) = None,
    gate: options.own(
        Path | None,
        "Exit with 3 unless all losses stay within these limits: a JSON file with one or more of perplexity, "
        "needles, ruler, ruler_single (docs/evaluation.md).",
    ) = None,
    seconds: options.own(
        float | None,
        "Begin no RULER samples and no other rules after this many; the same command goes on.",
        min=0,
    ) = None,
    adapter: options.Adapter = None,
    calibration_text: options.CalibrationText = None,
    density: options.Density = None,
    decode_density: options.DecodeDensity = None,
    tile: options.Tile = 64,
    also_tile: options.of_topology(
        list[int] | None, "Measure this tile size too, against the same dense run. May be repeated.", min=1
    ) = None,
    length: options.of_samples(int, "Tokens of a perplexity window.", **TOKENS) = 8192,
    windows: options.of_samples(
        int | None, "Perplexity windows. 16 if left out (24 --against), or as many as the text holds.", min=1
    ) = None,
    needles: options.of_samples(
        int | None, "Planted facts to ask for, by real generation. None if left out, 200 --against.", min=0
    ) = None,
    needle_length: options.of_samples(
        list[int] | None, "Tokens of a needle prompt. May be repeated. --length if left out.", **TOKENS
    ) = None,
    needle_variant: options.of_samples(
        list[str] | None,
        "Harder needles: one-fact (the default), four-facts, sixteen-facts, two-asked, alike-names, or all "
        "(the default --against). May be repeated.",
    ) = None,
    batch: options.Batch = 1,
    continuations: options.of_samples(
        int,
        "Windows of --length tokens whose end the models write themselves, greedily: agreement with the "
        "dense text, repetition, length. 0 for none.",
        min=0,
    ) = 0,
    continuation_tokens: options.of_samples(int, "Tokens of such an end.", min=1) = 1024,
    seed: options.Seed = 0,
    ruler: _ruler(bool, "Answer RULER's long-context tasks, sample by sample.", "--ruler") = False,
    ruler_length: _ruler(
        list[str] | None,
        "Tokens of prompt and answer: 4096 or 4k, several after commas. May be repeated. --length if left "
        "out.",
    ) = None,
    ruler_samples: _ruler(int, "Samples of each task at each length.", min=1) = 100,
    ruler_task: _ruler(
        list[str] | None,
        "Tasks, several after commas. May be repeated. All if left out; those that read documents only where "
        "their question file is given.",
    ) = None,
    qa_1: _ruler(Path | None, "Question file for qa_1, as SQuAD's or HotpotQA's.", "--qa-1") = None,
    qa_2: _ruler(Path | None, "Question file for qa_2, as SQuAD's or HotpotQA's.", "--qa-2") = None,
    haystack: _ruler(
        Path | None,
        "Prose that facts are hidden in: a .txt file or a folder of them. A book in the public domain if "
        "left out.",
    ) = None,
    chat: _ruler(
        bool | None,
        "Use the tokenizer's chat template. If it has one, unless told otherwise.",
        "--chat/--no-chat",
    ) = None,
    lm_eval: _lm_eval(
        str | None, "Names of tasks, groups or tags after commas, or paths of tasks' YAML files.", "--lm-eval"
    ) = None,
    lm_eval_include: _lm_eval(Path | None, "Folder with YAML files of further tasks.") = None,
    lm_eval_limit: _lm_eval(
        int | None, "Samples of each task, the first ones. All if left out.", min=1
    ) = None,
    lm_eval_shots: _lm_eval(
        int | None, "Examples before each question. The task's own number if left out.", min=0
    ) = None,
    against: _against(
        list[str] | None,
        "Compare this package's topology with published selection rules instead, at equal density: all, or "
        "names after commas (docs/compare.md).",
    ) = None,
    total_density: _against(
        list[float] | None, "Total density wanted of every rule, near field included. May be repeated."
    ) = None,
    tf32: options.of_model(bool, "Multiply float32 matrices in TF32 on a GPU.", "--tf32") = False,
    device: options.Device = "auto",
    dtype: options.Precision = Dtype.auto,
    json: options.Json = False,
    settings: dict[str, Any],
) -> None:
    """Measure what an operated model loses to the dense one, in one run on the same samples.

    Perplexity, divergence, densities and times on --text, and what is asked for besides: planted facts, long
    texts, RULER, tasks of lm-evaluation-harness; --against compares selection rules. The topology comes from
    --adapter, or from the options below. With --density its thresholds are set first, on --calibration-text
    or on the first quarter of each document, which is then not measured on. Example:

    llama-surgery evaluate demo/books-26m --text demo/text/evaluation.txt --windows 4
    --calibration-text demo/text/calibration.txt --density 0.06 --out out/evaluated
    """
    began = time.monotonic()
    if text is None and not ruler and lm_eval is None:
        raise typer.BadParameter("give --text, --ruler or --lm-eval: what to measure on.")
    wanting = [n for n, v in (("--needles", needles), ("--against", against)) if v]
    if text is None and (wanting or continuations or (density is not None and calibration_text is None)):
        raise typer.BadParameter(f"{', '.join(wanting) or '--density'}: give --text too.")
    if against and (density is not None or also_tile or gate or continuations):
        raise typer.BadParameter(
            "--against sets thresholds for every density, and has samples of its own: leave --density, "
            "--also-tile, --gate and --continuations out."
        )
    if against and needles == 0:
        raise typer.BadParameter("--against asks for planted facts too: give --needles of 1 or more.")
    if against and adapter is not None and (ruler or lm_eval is not None):
        raise typer.BadParameter(
            "--against compares an adapter's topology with others, --ruler and --lm-eval answer with it: "
            "give two commands."
        )
    if adapter is not None and not against:
        topology = (*options.TOPOLOGY, "also_tile", "density", "decode_density", "calibration_text")
        refuse(topology, "--adapter holds a topology already, leave it out.")
    of_ruler = ("ruler_length", "ruler_samples", "ruler_task", "qa_1", "qa_2", "haystack", "chat")
    for needed, asked, idle in (
        ("--ruler", ruler, of_ruler),
        ("--lm-eval", lm_eval, ("lm_eval_include", "lm_eval_limit", "lm_eval_shots")),
        ("--against", against, ("total_density",)),
        ("--density", density is not None, ("decode_density",)),
        ("--density or --against", density is not None or against, ("calibration_text",)),
        ("--needles", needles or against, ("needle_length", "needle_variant")),
        ("--continuations", continuations, ("continuation_tokens",)),
    ):
        if not asked:
            refuse(idle, f"give {needed} too.")
    from llama_surgery.evaluation.needle_facts import PLAIN, VARIANTS, check_variants
    from llama_surgery.evaluation.verdict import read_limits
    from llama_surgery.text import read_texts, split_texts

    variants = list(dict.fromkeys(needle_variant or (["all"] if against else [PLAIN])))
    variants = list(VARIANTS) if "all" in variants else variants
    check_variants(variants)
    configs = {f"T = {t}": config_for(settings, t) for t in [tile, *(also_tile or [])]}
    texts = [] if text is None else read_texts(text)
    calibration = [] if calibration_text is None else read_texts(calibration_text)
    limits = None if gate is None else read_limits(gate)
    ruler_lengths = token_counts(ruler_length or [str(length)])
    if ruler:
        materials, tasks = _read_ruler(split_values(ruler_task or []), {"qa_1": qa_1, "qa_2": qa_2}, haystack)
    if (against or density is not None) and not calibration:
        calibration, texts = split_texts(texts)
    if tf32:
        import torch

        torch.set_float32_matmul_precision("high")
    # RULER and the harness have lengths of their own.
    longest = max([0 if text is None else length, *(needle_length or [])])
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter, longest=longest)
    from llama_surgery.cli.evaluate_parts import Parts, show
    from llama_surgery.evaluation.long_generation import check_tokens

    learned = None if adapter is None else topology_of(llm, adapter)
    routers: dict[str, Any] = {}
    if learned is not None and not against:
        name = f"T = {learned[0].tile}"
        configs, routers = {name: learned[0]}, {name: learned[1]}
    parts = Parts(
        model=llm,
        tokenizer=tokenizer,
        folder=out_folder,
        configs=configs,
        routers=routers,
        texts=texts,
        calibration=calibration,
        length=length,
        windows=windows,
        needles=needles,
        needle_lengths=needle_length,
        needle_variants=variants,
        batch=batch,
        seed=seed,
        deadline=None if seconds is None else began + seconds,
        conditions={
            name: path.resolve().name  # where a text lies on one machine says nothing on another
            for name, path in (("text", text), ("adapter", adapter), ("calibration text", calibration_text))
            if path is not None
        },
    )
    if ruler:
        parts.prepare_ruler(materials, chat, tasks=tasks, lengths=ruler_lengths, samples=ruler_samples)
    if continuations:
        check_tokens(continuation_tokens, length)
    if lm_eval is not None:
        parts.prepare_tasks(split_values([lm_eval]), lm_eval_include)
    with progress() as parts.tell:
        if density is not None:
            parts.calibrate(density, decode_density)
        if against:
            rules = split_values(against)
            parts.compare(learned, None if "all" in rules else rules, total_density)
        elif parts.texts:
            parts.measure_texts()
            if continuations:
                parts.write_on(continuations, continuation_tokens)
        if ruler:
            parts.answer_ruler()
        if lm_eval is not None:
            parts.answer_tasks(lm_eval_include, lm_eval_limit, lm_eval_shots)
    if limits is not None:
        parts.judge(limits)
    show(parts, json)
    if limits is not None and parts.results["gate"]["verdict"] != "kept":
        raise typer.Exit(CLOSED)


def _read_ruler(
    tasks: list[str], questions: dict[str, Path | None], haystack: Path | None
) -> "tuple[Materials, list[str]]":
    """What RULER's samples are made of, and its tasks."""
    from llama_surgery.evaluation.ruler.materials import Materials, read_questions
    from llama_surgery.evaluation.ruler.tasks import READING, TASKS, task_of
    from llama_surgery.text import read_texts

    given = {name: read_questions(path) for name, path in questions.items() if path is not None}
    for name in tasks:
        task_of(name)
    left = [name for name in READING if name not in given]
    if not tasks and left:
        err.print(f"Left out: {', '.join(left)} (no question file, see --help).", highlight=False)
    materials = Materials.of(None if haystack is None else read_texts(haystack), given)
    return materials, tasks or [name for name in TASKS if name not in left]
