"""``llama-surgery learn --topology gumbel``."""

from pathlib import Path

from llama_surgery.cli.common import Dtype, load_model, progress
from llama_surgery.cli.learn_report import reporter, told
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError


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
    with progress() as tell:
        report, seen = reporter("gumbel", steps, tell)
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
    told(folder, config, seen, json)
