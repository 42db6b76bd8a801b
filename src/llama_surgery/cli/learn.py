"""``llama-surgery learn``."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, _device, load_model, load_tokenizer, precision
from llama_surgery.cli.console import progress, say, speed_told, status
from llama_surgery.cli.learn_report import Asked, reporter, silent, told
from llama_surgery.cli.options import SEED, SHARE, STEPS, TOKENS, config_for, learned_parts, topology_options
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from llama_surgery.learning.settings import LearningSettings

#: Windows whose attention states are kept on disk unless more are asked for: at 8,192 tokens a window of a
#: model of 70 billion parameters takes about 24 GB.
STREAMED_WINDOWS = 16


_learning = functools.partial(options.declared, "Learning")


@functools.partial(topology_options, gumbel=True)
def learn(
    *,
    model: options.Model,
    out_folder: options.own(Path, "Folder for the adapter and its checkpoints.", "--out"),
    text: options.own(Path, "Text like what the model will read: a .txt file or a folder of them."),
    density: options.of_topology(
        float | None,
        "Largest share of all (query, key) pairs that may be read from the far field, such as 6% or 0.06. "
        "--topology gumbel has none, all else needs it.",
        **SHARE,
    ) = None,
    length: options.own(
        int | None, "Tokens of a window. The model's context, at most 8192, if left out.", **TOKENS
    ) = None,
    dense_until: options.DenseUntil = None,
    tile: options.Tile = 64,
    steps: _learning(int, "Steps, each on one window.", min=1) = STEPS,
    stream: _learning(
        bool,
        "Keep the model on disk, load it layer by layer, and learn from the output of every attention layer "
        "instead of the predictions: for models larger than memory. Needs the folder of a checkpoint.",
        "--stream",
    ) = False,
    part: _learning(
        list[str] | None,
        "What is learned beside the heads' budgets: channels, tree, summary. May be repeated. channels, and "
        "summary unless --summary none, if left out.",
    ) = None,
    rate: _learning(
        float | None, "Learning rate: 0.03, or 0.001 with --topology gumbel, if left out."
    ) = None,
    windows: _learning(
        int | None,
        "Training windows, taken in turn. 200 if left out, 16 with --stream, which keeps their states on "
        "disk; or as many as the text holds.",
        min=1,
    ) = None,
    seed: _learning(int, "Of windows and starting values.", **SEED) = 0,
    checkpoint_seconds: _learning(float, "Time between checkpoints.", min=0) = 30.0,
    device: options.Device = "auto",
    dtype: options.Precision = Dtype.auto,
    json: options.Json = False,
    settings: dict[str, Any],
) -> None:
    """Learn a topology for a model and save it as a small adapter folder.

    The model's weights stay as they are. What is learned are corrections to the training-free topology: how
    much every head may read, how pages are scored, which keys share a page; at one density for the whole
    model. The same command goes on where it was interrupted. 'accelerate launch --num_processes 4 -m
    llama_surgery learn …' learns on four GPUs, four windows a step. Use the adapter with 'evaluate
    --adapter', 'generate --adapter' or load_adapter() in Python.
    """
    config = config_for({**settings, "dense_until": dense_until or 0}, tile)
    asked = Asked(
        model, text, config, out_folder, length, steps, rate, windows, seed, checkpoint_seconds, device,
        dtype, json,
    )  # fmt: skip
    if config.topology == "gumbel":
        if density is not None or part or stream:
            raise SurgeryError(
                "--topology gumbel learns from the language model's loss alone: leave --density, --part "
                "and --stream out."
            )
        _routers(asked)
        return
    if density is None:
        raise typer.BadParameter("--density is needed: how much may be read.", param_hint="--density")
    with status("Loading PyTorch …"):
        from llama_surgery.learning.processes import launched
        from llama_surgery.learning.settings import LearningSettings
    from llama_surgery.text import read_texts, refuse_pipes

    planned = LearningSettings(
        density=density,
        steps=steps,
        parts=learned_parts(part, config),
        rate=LearningSettings.rate if rate is None else rate,
        seed=seed,
    )
    processes = launched(device)
    if processes.count > 1 and (stream or device == "split"):
        raise SurgeryError(
            f"{processes.count} processes: each has the whole model on a device of its own. Start one for "
            "--stream and for --device split."
        )
    if processes.count > 1:
        refuse_pipes(text)
    texts = read_texts(text)
    if stream:
        told(out_folder, *_streamed(asked, texts, planned), json)
        return
    llm, tokenizer = load_model(model, device, dtype, longest=length)
    from llama_surgery.learning.learned import learn as learn_on
    from llama_surgery.surgery.adapter import save_adapter
    from llama_surgery.surgery.context import context_length
    from llama_surgery.surgery.operation import config_of

    with progress() if processes.main else contextlib.nullcontext(silent) as tell:
        report, seen = reporter("logits", steps)
        learn_on(
            llm,
            config,
            density=density,
            text=texts,
            tokenizer=tokenizer,
            length=length,
            steps=steps,
            parts=planned.parts,
            rate=planned.rate,
            windows=windows,
            seed=seed,
            measure_speed=dense_until is None,
            progress=tell,
            report=report,
            processes=processes,
            **asked.keeping("logits"),
        )
    if not processes.main:
        return
    config = config_of(llm)
    save_adapter(llm, out_folder)
    if config.dense_until and not json:
        say(speed_told(config.dense_until, context_length(llm)))
    told(out_folder, config, seen, json)


def _routers(asked: Asked) -> None:
    """Train content routers on a text and save the adapter."""
    with status("Loading PyTorch …"):
        from llama_surgery.learning.processes import launched
    from llama_surgery.text import read_texts

    if (count := launched(asked.device).count) > 1:
        raise SurgeryError(f"{count} processes: content routers learn in one. Start it without a launcher.")
    texts = read_texts(asked.text)
    llm, tokenizer = load_model(asked.model, asked.device, asked.dtype, longest=asked.length)
    from llama_surgery.gumbel.learn import GumbelLearning, learn_gumbel
    from llama_surgery.learning.learned import WINDOWS
    from llama_surgery.surgery.adapter import save_adapter
    from llama_surgery.surgery.context import check_vocabulary, usual_length
    from llama_surgery.surgery.operate import operated
    from llama_surgery.text import windows as cut_windows

    rate = GumbelLearning.rate if asked.rate is None else asked.rate
    settings = GumbelLearning(steps=asked.steps, rate=rate, seed=asked.seed)
    length = usual_length(llm) if asked.length is None else asked.length
    ids = cut_windows(tokenizer, texts, length, asked.windows, asked.seed, usual=WINDOWS)
    check_vocabulary(llm, ids)
    with progress() as tell:
        report, seen = reporter("gumbel", asked.steps, tell)
        routers = learn_gumbel(llm, asked.config, ids, settings, report, **asked.keeping("gumbel"))
    with operated(llm, asked.config, routers=routers):
        save_adapter(llm, asked.folder)
    told(asked.folder, asked.config, seen, asked.json)


def _streamed(asked: Asked, texts: list[str], planned: "LearningSettings") -> tuple[SurgeryConfig, list[Any]]:
    """Learn with the model on disk and write the adapter: its configuration and the steps taken.

    θ of tiles is where learning held the density; decode steps read everything, as by default: no text passes
    through an operated model that is not in memory.
    """
    import torch

    from llama_surgery.learning.corrections import scorer_parameters
    from llama_surgery.learning.streaming import Captured, learn_streamed
    from llama_surgery.learning.weights import Weights, loaded, skeleton
    from llama_surgery.surgery.adapter import write_adapter
    from llama_surgery.surgery.context import check_length, check_vocabulary, usual_length
    from llama_surgery.surgery.supported import attention_modules
    from llama_surgery.text import windows as cut_windows

    config, target = asked.config, _device(asked.device)
    weights, bones = Weights(asked.model), skeleton(asked.model)
    wanted = precision(asked.dtype, target, bones.config.dtype or torch.bfloat16)
    length = usual_length(bones) if asked.length is None else asked.length
    check_length(bones, length)
    length -= length % config.tile
    planned = dataclasses.replace(planned, length=length)
    tokenizer = load_tokenizer(asked.model)
    ids = cut_windows(tokenizer, texts, length, asked.windows, planned.seed, usual=STREAMED_WINDOWS)
    check_vocabulary(bones, ids)
    with progress() as tell:
        report, seen = reporter("local", planned.steps, tell)
        corrections, theta = learn_streamed(
            bones,
            weights,
            config,
            ids,
            planned,
            Captured(asked.folder / "states"),
            device=target,
            dtype=wanted,
            capturing=lambda done, total: tell("running the dense model", done, total),
            progress=report,
            **asked.keeping("local"),
        )
    config = dataclasses.replace(config, theta=theta, theta_decode=None, theta_length=length)
    first = next(iter(attention_modules(bones).values()))
    name = next(name for name, module in bones.named_modules() if module is first)
    with loaded(first, name, weights, torch.device("cpu"), wanted):
        write_adapter(asked.folder, bones, config, scorer_parameters(corrections))
    return config, seen
