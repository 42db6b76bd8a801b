"""Learning from the output of every layer, for models larger than memory.

This needs nothing of the model but what its attention layers read and write when it is dense, and that does
not change while corrections are learned. So the model is run once, one layer in memory at a time, several
windows together, and queries, keys, values and outputs of every attention layer go to disk. Steps then read
one layer's states of one window at a time. A run that is killed goes on from the windows that are complete
and from the last checkpoint.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.files import write_atomically, write_json
from llama_surgery.folders import check_folder
from llama_surgery.learning.attach import Gates, local_error, refuse_unlearnable
from llama_surgery.learning.corrections import Corrections
from llama_surgery.learning.reading import Reading
from llama_surgery.learning.settings import LearningSettings
from llama_surgery.learning.state import first_state
from llama_surgery.learning.trainer import Step, check_settings, digest, fresh_corrections, run
from llama_surgery.learning.weights import Weights, streamed
from llama_surgery.surgery.interface import dense_attention
from llama_surgery.surgery.metric import metric_of
from llama_surgery.surgery.replace import attention_replaced
from llama_surgery.surgery.supported import attention_modules

ABOUT_FILE = "about.json"
#: Windows that pass through a layer together while it is in memory.
TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class Captured:
    """States of the attention layers of a dense model on some windows, on disk.

    A file holds one layer's states of one window, in the model's dtype: ``query`` (heads, n, head_dim),
    ``key`` and ``value`` (kv_heads, n, …), ``out`` (n, heads, value_dim), and in float32 ``norm``, the mean
    square of what enters the decoder layer, and ``scale``, the scaling of q·k.

    Attributes:
        folder: Where the files are.
    """

    folder: Path

    def claim(self, about: dict[str, Any]) -> None:
        """Note what the states are of, or check that those that are there are of the same.

        Raises:
            SurgeryError: They are of something else, or the folder cannot be written or holds a model.
        """
        check_folder(self.folder)
        file = self.folder / ABOUT_FILE
        if not file.exists():
            write_json(file, about)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SurgeryError(f"{file} is damaged ({error}): remove {self.folder}.") from error
        differing = sorted(key for key in about if found.get(key) != about[key])
        if differing:
            raise SurgeryError(
                f"{self.folder} holds states of another run ({', '.join(differing)} differ): remove it, or "
                "name another."
            )

    def file(self, layer: int, window: int) -> Path:
        return self.folder / f"{window:05d}-{layer:03d}.safetensors"

    def save(self, layer: int, window: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write one layer's states of one window, atomically.

        Raises:
            SurgeryError: The disk is full or the folder cannot be written.
        """
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        write_atomically(self.file(layer, window), lambda file: file.write_bytes(content), own=True)

    def load(self, layer: int, window: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Read them back, with a batch dimension of one.

        Raises:
            SurgeryError: The file is missing or damaged.
        """
        file = self.file(layer, window)
        try:
            return {name: tensor.to(device)[None] for name, tensor in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise SurgeryError(f"{file} cannot be read ({error}): remove {self.folder}.") from error


def capture(
    model: PreTrainedModel,
    weights: Weights,
    windows: torch.Tensor,
    captured: Captured,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the attention states of the windows that are not complete yet.

    Args:
        model: A skeleton.
        weights: Its checkpoint.
        windows: (count, length) int64.
        captured: Where to.
        device: Where layers compute.
        dtype: In which precision.
        progress: Told windows done and all of them.

    Raises:
        SurgeryError: The states that are there are of another model or other windows.
    """
    captured.claim({"model": weights.digest(), "dtype": str(dtype), "windows": digest(windows)})
    layers = list(attention_modules(model))
    missing = [n for n in range(len(windows)) if not all(captured.file(i, n).exists() for i in layers)]
    for start in range(0, len(missing), TOGETHER):
        numbers = missing[start : start + TOGETHER]
        with (
            torch.inference_mode(),
            streamed(model, weights, device, dtype),
            _capturing(model, captured, numbers),
        ):
            model.get_decoder()(input_ids=windows[numbers].to(device), use_cache=False)
        if progress is not None:
            progress(len(windows) - len(missing) + start + len(numbers), len(windows))


@contextlib.contextmanager
def _capturing(model: PreTrainedModel, captured: Captured, numbers: list[int]) -> Iterator[None]:
    """Let the attention layers of ``model`` write what they read and give, for windows ``numbers``."""
    modules, norms = attention_modules(model), {}
    handles = [_watch_residual(model, index, module, norms) for index, module in modules.items()]

    def attention(
        base: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **keywords: Any
    ) -> Any:
        index = module.layer_idx
        refuse_unlearnable(module, query, key, mask, keywords)
        out = dense_attention(base, module, query, key, value, mask, **keywords)[0]
        scale = torch.tensor(keywords.get("scaling") or query.shape[-1] ** -0.5)
        for row, number in enumerate(numbers):
            tensors = {"query": query[row], "key": key[row], "value": value[row], "out": out[row]}
            captured.save(index, number, tensors | {"norm": norms[index][row], "scale": scale})
        return out, None

    try:
        with attention_replaced(model, modules.values(), attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_residual(
    inner: torch.nn.Module, index: int, module: torch.nn.Module, norms: dict[int, torch.Tensor]
) -> Any:
    """Note the mean square of what enters the decoder layer around ``module``: errors are relative to it.

    ``norms[index]`` becomes (batch,), float32.
    """
    layer = next(
        (m for m in inner.modules() if m is not module and any(child is module for child in m.children())),
        None,
    )
    if layer is None:
        raise UnsupportedModelError(f"{type(module).__name__} is in no decoder layer: cannot be learned.")

    def note(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        norms[index] = hidden.detach().float().square().sum(-1).mean(-1)

    return layer.register_forward_pre_hook(note, with_kwargs=True)


def learn_streamed(
    model: PreTrainedModel,
    weights: Weights,
    config: SurgeryConfig,
    windows: torch.Tensor,
    settings: LearningSettings,
    captured: Captured,
    *,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint_file: Path | None = None,
    every_seconds: float = 60.0,
    capturing: Callable[[int, int], None] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> tuple[Corrections, float]:
    """Learn corrections to a model that stays on disk: by the error of every layer's output.

    Steps, checkpoints and resuming are those of :func:`~llama_surgery.learning.trainer.learn`. The loss is
    the mean over layers of :func:`~llama_surgery.learning.attach.local_error`, on the dense model's own
    states, over the mean square of the residual stream there.

    Args:
        model: A skeleton of the checkpoint (:func:`~llama_surgery.learning.weights.skeleton`).
        weights: The checkpoint.
        config: The topology to correct; θ is where learning begins and follows the density.
        settings: What to learn and how.
        captured: Where attention states are kept; what is complete there is not computed again.
        device: Where to compute.
        dtype: Precision of the model.
        capturing: Told windows captured and all of them.

    Returns:
        The corrections, and θ at which the executed far density of tiles was the one asked for.

    Raises:
        SurgeryError: Settings do not fit, or files are of another run or damaged.
        UnsupportedModelError: The model cannot be learned on, or not streamed.
    """
    check_settings(config, windows, settings)
    modules = attention_modules(model)
    names = {id(module): name for name, module in model.named_modules()}
    capture(model, weights, windows, captured, device=device, dtype=dtype, progress=capturing)

    def through(ids: torch.Tensor) -> None:
        model.get_decoder()(input_ids=ids.to(device), use_cache=False)

    with streamed(model, weights, device, dtype):
        metric = metric_of(model, through)
    corrections = fresh_corrections(model, settings, metric).to(device)
    state = first_state(corrections, settings, math.log(config.theta), half=dtype == torch.float16)
    gates = Gates(corrections, config, state.price.log_theta, sampled_tiles=settings.sampled_tiles)

    def measure(number: int) -> torch.Tensor:
        whole, losses = gates.reading, []
        for index, module in modules.items():
            states = captured.load(index, number, device)
            gates.reading = Reading()
            projection = None
            if hasattr(module, "o_proj"):
                name = f"{names[id(module)]}.o_proj.weight"
                projection = weights.read([name])[name].to(device, dtype)
            router = corrections[str(index)].router()
            parts = (states["query"], states["key"], states["value"], states["out"])
            error = local_error(projection, *parts, router, gates, float(states["scale"])) / states["norm"][0]
            # The layer's part of mean error and of density: all layers have as many causal pairs.
            density = gates.reading.soft_density()
            objective = (error + state.price.value * density) / len(modules)
            (objective * state.scale).backward()
            losses.append(error.detach())
            whole.include(gates.reading)
        gates.reading = whole
        return torch.stack(losses).mean()

    run(
        measure,
        state,
        gates,
        windows,
        settings,
        "local",
        weights.digest(),
        checkpoint_file=checkpoint_file,
        every_seconds=every_seconds,
        progress=progress,
    )
    return corrections, math.exp(state.price.log_theta)
