"""``llama-surgery bench``."""

import functools
from pathlib import Path

from llama_surgery.cli.common import DeviceOption, Dtype, out, token_counts
from llama_surgery.cli.topology import option

_size = functools.partial(option, "What is measured")


def bench(
    *,
    end_to_end: option(
        None,
        Path | None,
        "Measure a whole model with random weights, of the shapes of this config.json (or folder of a "
        "checkpoint), instead of the kernels alone.",
    ) = None,
    length: _size(list[str] | None, "Tokens, as 32768 or 32k. May be repeated.") = None,
    batch: _size(int, "Sequences of a model's decode step.", min=1) = 4,
    density: _size(float, "Executed far density of prefill.", min=0, max=1) = 0.05,
    decode_density: _size(float, "Executed far density of decode steps.", min=0, max=1) = 0.03,
    page_size: _size(int, "Keys of a page.") = 64,
    moment_size: _size(int, "Keys of the balls that pages are scored by.") = 64,
    tile: _size(int, "Neighbouring tokens that share a head's pages.", min=1) = 64,
    variance_pool: _size(int, "Channels whose variances are averaged.", min=1) = 1,
    steps: _size(int, "Decode steps of the model.", min=4) = 64,
    seconds: option(None, float, "No further part begins after this many.", min=1) = 300.0,
    out_folder: option(
        None, Path, "Folder for CSV files and plots; rows are written as measured.", "--out"
    ) = Path("out/bench"),
    device: DeviceOption = "auto",
    dtype: Dtype = Dtype.bfloat16,
) -> None:
    """Time the operated path beside dense attention, on this device.

    Without --end-to-end: attention of prefill (layout, scoring and selection included) and of decode steps,
    beside every backend of PyTorch's SDPA and FlexAttention. Each time follows a check of the answer. It
    needs a GPU. With --end-to-end: time to first token and decode step of a whole model, and its peak memory,
    dense and operated. Example:

    llama-surgery bench --end-to-end benchmarks/configs/llama-3.1-8b-shapes.json --length 128k
    """
    import torch

    from llama_surgery.bench.end_to_end import Task
    from llama_surgery.cli.common import _device
    from llama_surgery.config import SurgeryConfig
    from llama_surgery.errors import SurgeryError

    config = SurgeryConfig(
        page_size=page_size,
        moment_size=moment_size,
        tile=tile,
        variance_pool=variance_pool,
        theta_decode=None if tile == 1 else 0.01,
    )
    lengths = token_counts(length or ["128k"])
    target, precision = _device(device), getattr(torch, "bfloat16" if dtype is Dtype.auto else dtype.value)
    if end_to_end is not None:
        from llama_surgery.bench.end_to_end import end_to_end as measure
        from llama_surgery.bench.plot import plot_end_to_end

        tasks = [Task(config, n, batch, density, decode_density, steps) for n in lengths]
        path = out_folder / "end_to_end.csv"
        rows = measure(end_to_end, tasks, path, seconds=seconds, device=target, dtype=precision)
        plot_end_to_end(rows, path.with_suffix(".svg"))
    else:
        if target.type != "cuda":
            raise SurgeryError(
                f"device {target.type!r}: the kernels run on a GPU. What a CPU saves: --end-to-end, or "
                "'llama-surgery doctor'."
            )
        from llama_surgery.bench.decode import PAGED_SETTINGS, SETTINGS, bench_decode
        from llama_surgery.bench.measure import Deadline
        from llama_surgery.bench.plot import plot_decode, plot_prefill
        from llama_surgery.bench.prefill import Setting, bench_prefill

        deadline, asked = Deadline(seconds), [Setting(config, density, flex=True, parts=True)]
        shared = {"deadline": deadline, "device": target, "dtype": precision}
        path = out_folder / "prefill.csv"
        plot_prefill(bench_prefill(lengths, lambda _: asked, path, **shared), path.with_suffix(".svg"))
        path = out_folder / "decode.csv"
        plot_decode(bench_decode((*SETTINGS, *PAGED_SETTINGS), path, **shared), path.with_suffix(".svg"))
    out.print(f"Written: {out_folder.resolve()}", soft_wrap=True, highlight=False)
