"""``llama-surgery learn --topology gumbel``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from llama_surgery.cli.common import Dtype, err, load_model, out, print_json, progress
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from llama_surgery.gumbel.learn import GumbelStep


def learn_routers(
    model: str,
    text: Path,
    config: SurgeryConfig,
    folder: Path,
    *,
    length: int | None,
    steps: int,
    rate: float | None,
    windows: int | None,
    usual: int,
    seed: int,
    checkpoint_seconds: float,
    device: str,
    dtype: Dtype,
    json: bool,
) -> None:
    """Train content routers on a text and save the adapter. Arguments are those of the command,
    ``usual`` its windows where none are asked for.

    Raises:
        SurgeryError: Windows longer than the routers' trees are for, or a checkpoint of another run.
    """
    from llama_surgery.learning.processes import launched
    from llama_surgery.text import read_texts

    if (count := launched(device).count) > 1:
        raise SurgeryError(f"{count} processes: content routers learn in one. Start it without a launcher.")
    texts = read_texts(text)
    llm, tokenizer = load_model(model, device, dtype, longest=length)
    from llama_surgery.gumbel.learn import GumbelLearning, learn_gumbel
    from llama_surgery.surgery.adapter import save_adapter
    from llama_surgery.surgery.context import usual_length
    from llama_surgery.surgery.operate import operated
    from llama_surgery.text import windows as cut_windows

    settings = GumbelLearning(steps=steps, rate=GumbelLearning.rate if rate is None else rate, seed=seed)
    length = usual_length(llm) if length is None else length
    ids = cut_windows(tokenizer, texts, length, windows, seed, usual=usual)
    seen: list[GumbelStep] = []
    with progress() as tell:

        def report(step: "GumbelStep") -> None:
            seen.append(step)
            tell("learning (gumbel)", step.step, steps)
            if step.step % max(1, steps // 10) == 0:
                err.print(f"{step.step}/{steps}: {_described(step)}", highlight=False)

        routers = learn_gumbel(
            llm,
            config,
            ids,
            settings,
            report,
            checkpoint_file=folder / "checkpoint-gumbel.pt",
            every_seconds=checkpoint_seconds,
        )
    with operated(llm, config, routers=routers):
        save_adapter(llm, folder)
    if json:
        last = dataclasses.asdict(seen[-1]) if seen else None
        print_json({"adapter": str(folder), "config": config.to_dict(), "last_step": last})
        return
    if seen:
        out.print(_described(seen[-1]), highlight=False)
    out.print(f"Adapter: {folder.resolve()}", soft_wrap=True, highlight=False)


def _described(step: "GumbelStep") -> str:
    return f"loss {step.loss:.5f}, load balance {step.balance:.3f}, rows see {step.density:.2%} of all pairs"
