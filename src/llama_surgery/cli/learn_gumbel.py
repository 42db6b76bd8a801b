"""``llama-surgery learn --topology gumbel``."""

from llama_surgery.cli.common import load_model
from llama_surgery.cli.console import progress, status
from llama_surgery.cli.learn_report import Asked, reporter, told
from llama_surgery.errors import SurgeryError


def learn_routers(asked: Asked) -> None:
    """Train content routers on a text and save the adapter.

    Raises:
        SurgeryError: Windows longer than the routers' trees are for, or a checkpoint of another run.
    """
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
    from llama_surgery.surgery.context import usual_length
    from llama_surgery.surgery.operate import operated
    from llama_surgery.text import windows as cut_windows

    rate = GumbelLearning.rate if asked.rate is None else asked.rate
    settings = GumbelLearning(steps=asked.steps, rate=rate, seed=asked.seed)
    length = usual_length(llm) if asked.length is None else asked.length
    ids = cut_windows(tokenizer, texts, length, asked.windows, asked.seed, usual=WINDOWS)
    with progress() as tell:
        report, seen = reporter("gumbel", asked.steps, tell)
        routers = learn_gumbel(llm, asked.config, ids, settings, report, **asked.keeping("gumbel"))
    with operated(llm, asked.config, routers=routers):
        save_adapter(llm, asked.folder)
    told(asked.folder, asked.config, seen, asked.json)
