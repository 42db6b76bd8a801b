"""``llama-surgery generate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llama_surgery.cli import options
from llama_surgery.cli.common import Dtype, load_model
from llama_surgery.cli.console import out, print_json
from llama_surgery.cli.options import SEED, refuse
from llama_surgery.cli.tables import make_table
from llama_surgery.errors import SurgeryError

if TYPE_CHECKING:
    import torch


def generate(
    model: options.Model,
    prompt: options.own(str | None, "The text to go on from.") = None,
    prompt_file: options.own(Path | None, "The same, read from a UTF-8 file: for long contexts.") = None,
    adapter: options.Adapter = None,
    max_new_tokens: options.own(int, "How many tokens to write at most.", min=1) = 64,
    sample: options.own(bool, "Draw tokens instead of the likeliest.", "--sample") = False,
    temperature: options.own(float, "With --sample: lower is safer.", min=0.01) = 1.0,
    seed: options.own(int, "With --sample: same seed, same text.", **SEED) = 0,
    device: options.Device = "auto",
    dtype: options.Precision = Dtype.auto,
    json: options.Json = False,
) -> None:
    """Let an operated model write on, and say what it read.

    Tokens are printed as they come. Without --adapter the documented default topology is used, whose
    thresholds are not calibrated for your model.
    """
    if not sample:
        refuse(("temperature", "seed"), "give --sample too.")
    text = _prompt(prompt, prompt_file)
    llm, tokenizer = load_model(model, device, dtype, adapter=adapter)

    import torch
    from transformers import LogitsProcessorList, TextStreamer

    from llama_surgery.surgery.adapter import load_adapter
    from llama_surgery.surgery.context import check_length, check_vocabulary
    from llama_surgery.surgery.operate import operate
    from llama_surgery.surgery.operation import statistics

    _ = load_adapter(llm, adapter) if adapter is not None else operate(llm)
    inputs = tokenizer(text, return_tensors="pt", verbose=False).to(llm.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise SurgeryError("the prompt holds no token: give some text.")
    check_vocabulary(llm, inputs["input_ids"])
    check_length(llm, prompt_tokens + max_new_tokens)
    torch.manual_seed(seed)
    streamer = None if json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    given: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    given |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "streamer": streamer}
    given |= {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    ids: Any = llm.generate(**given, logits_processor=LogitsProcessorList([_finite]))
    new = ids[0, prompt_tokens:]
    read = statistics(llm).to_dict()
    if json:
        written = tokenizer.decode(new, skip_special_tokens=True)
        counts = {"prompt_tokens": prompt_tokens, "new_tokens": len(new)}
        print_json({"text": written, **counts, "statistics": read})
        return
    out.print(_table(read, prompt_tokens, len(new)))


def _finite(_: Any, scores: "torch.Tensor") -> "torch.Tensor":
    """The scores of the next token, of which the likeliest would be the first one where they are NaN."""
    if bool(scores.isnan().any()):
        raise SurgeryError(
            "the model gives logits that are not finite. Check its weights, or load it in float32 or "
            "bfloat16."
        )
    return scores


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either --prompt or --prompt-file.")
    if prompt is not None:
        return prompt
    from llama_surgery.text import read_text

    assert file is not None  # one of the two was given
    return read_text(file)


def _table(read: dict[str, Any], prompt_tokens: int, new_tokens: int) -> Any:
    layers, rows = max(1, len(read["by_layer"])), []
    for tile, part in sorted(read["by_tile"].items(), key=lambda item: -int(item[0])):
        # The rows that end a prompt inside a tile are decode steps too.
        phase = "end of prompt, decode" if tile == "1" else f"prefill, tiles of {tile}"
        densities = (f"{part['far_density']:.2%}", f"{part['total_density']:.2%}")
        rows.append((phase, f"{part['rows'] / layers:,.0f}", *densities, f"{part['pages_per_tile_row']:.1f}"))
    densities = (f"{read['far_density']:.2%}", f"{read['total_density']:.2%}")
    rows += [(), ("all", "", *densities, f"{read['pages_read']:,} in all")]
    columns = ("phase", "tokens", "far density", "total density", "far pages per token and head")
    return make_table("What was read", columns, rows, f"{prompt_tokens:,} + {new_tokens:,} tokens")
