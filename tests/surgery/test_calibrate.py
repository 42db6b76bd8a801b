"""Thresholds for a density: of what will be executed, and nothing else of the model changes."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.surgery.tiny import SPARSE, VOCABULARY, build, logits, tokens

import llama_surgery as surgery
from llama_surgery import SurgeryConfig, SurgeryError
from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.executor import heard_layout, rounded_moments
from llama_surgery.attention.impl import triton
from llama_surgery.surgery import execute, head_budgets
from llama_surgery.surgery.calibrate import ShareHistogram, calibrate
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import routers_of, surgery_of
from llama_surgery.topology.layout import build_layout
from llama_surgery.topology.router import PageRouter

LENGTH = 256


class Letters:
    """A tokenizer: a letter is a token."""

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % VOCABULARY for letter in text])


TEXT = ["".join(chr(n) for n in tokens(5 * LENGTH).tolist())]
IDS = tokens(4, LENGTH)


@pytest.mark.parametrize("backend", ["gather", "auto"])
def test_the_density_is_kept_on_the_text(backend: str) -> None:
    config = dataclasses.replace(SPARSE, backend=backend)
    with surgery.operated(
        build("Llama"), config, density=0.2, text=TEXT, tokenizer=Letters(), length=LENGTH
    ) as model:
        found = surgery.config_of(model)
        assert found.backend == backend and found.theta != config.theta
        ids = torch.tensor([[ord(letter) % VOCABULARY for letter in TEXT[0][:LENGTH]]])
        with torch.no_grad():
            model(ids)
        assert 0.05 < surgery.statistics(model).far_density < 0.25


@pytest.mark.parametrize("backend", ["gather", "auto", "triton"])
@pytest.mark.parametrize("failing", [1, 6])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_the_configuration(
    backend: str, failing: int, error: type[BaseException]
) -> None:
    """In the first pass, and in the second, after which the thresholds of the first had been set."""
    model = build("Llama")
    config = dataclasses.replace(SPARSE, backend=backend)
    surgery.operate(model, config)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == failing:
            raise error("stopped")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="stopped"):
        calibrate(model, IDS, 0.2)
    handle.remove()
    assert surgery.config_of(model) == config
    for layer in surgery_of(model).values():
        assert (layer.config, layer.listener, layer.executed) == (config, None, None)
    assert surgery.statistics(model).rows == 0


def test_shares_above_one_have_thresholds_above_one() -> None:
    """Keys with large biases are estimated far too high; what is always open is told apart from them."""
    histogram = ShareHistogram()
    histogram.add(torch.tensor([[math.inf, 0.5, 2.0, 3.0]]), torch.tensor([10]))
    assert histogram.theta(25) == pytest.approx(math.exp(2.0))
    assert histogram.theta(10) == pytest.approx(math.exp(3.0))
    with pytest.raises(SurgeryError, match="out of reach"):
        histogram.theta(9)


def test_a_density_out_of_reach_leaves_the_configuration() -> None:
    with surgery.operated(build("Llama"), SPARSE) as model:
        with pytest.raises(SurgeryError, match="out of reach"):
            calibrate(model, IDS, 1e-4)
        assert surgery.config_of(model) == SPARSE


@pytest.mark.parametrize("backend", ["gather", "triton"])
def test_what_is_measured_is_scored_by_what_the_kernels_keep(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the kernels would run nothing; calibrating for them works, in the model's dtype."""
    layouts = []
    plain = execute.executor_of

    def executor_of(call: AttentionCall, queries: torch.Tensor, *states: Any) -> Any:
        layouts.append(states[2])
        assert call.executor == "gather"
        return plain(call, queries, *states)

    monkeypatch.setattr(execute, "executor_of", executor_of)
    config = dataclasses.replace(SPARSE, backend=backend)
    with surgery.operated(build("Llama", dtype=torch.bfloat16), config, routers={}) as model:
        calibrate(model, IDS, 0.2, passes=1)
    assert layouts
    for layout in layouts:
        moments, half = layout.moments, layout.moments.mean.bfloat16().float()
        assert torch.equal(moments.mean, half) == (backend == "triton")
        assert torch.equal(moments.variance, rounded_moments(moments, torch.bfloat16).variance) == (
            backend == "triton"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_that_of_the_features_and_done_once(dtype: torch.dtype) -> None:
    config = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=8)
    keys = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0))
    keys[0, :4, 3] = 1e4  # a variance beyond what float16 holds
    layout = build_layout(keys, keys, config)
    rounded = rounded_moments(layout.moments, dtype)
    assert rounded.variance.isfinite().all() and rounded.mean.dtype == torch.float32
    again = rounded_moments(rounded, dtype)
    assert torch.equal(again.mean, rounded.mean)
    torch.testing.assert_close(again.variance, rounded.variance, rtol=1e-6, atol=0)


def test_only_what_kernels_will_execute_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    layout = build_layout(keys, keys, SPARSE)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=keys.shape)
    auto = dataclasses.replace(SPARSE, backend="auto")
    assert heard_layout(layout, auto, keys, keys, 8) is layout  # on a CPU plain PyTorch executes
    for problem, rounded in ((None, True), ("of some kind", False)):
        monkeypatch.setattr(triton, "obstacle", lambda *_, problem=problem: problem)
        assert (heard_layout(layout, auto, on_gpu, on_gpu, 8) is not layout) == rounded
    kept = dataclasses.replace(layout, features=(keys,))
    named = dataclasses.replace(SPARSE, backend="triton")
    assert heard_layout(kept, named, keys, keys, 8) is kept


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_decode_steps_read_everything_unless_a_density_is_given(backend: str) -> None:
    config = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=8, backend=backend)
    given = {"text": TEXT, "tokenizer": Letters(), "length": LENGTH}
    with surgery.operated(build("Llama"), config, density=0.2, **given) as model:
        assert surgery.config_of(model).theta_decode == 0 < surgery.config_of(model).theta
        ids = tokens(1, 200)
        model.generate(ids, max_new_tokens=4, do_sample=False)
        by_tile = surgery.statistics(model).by_tile
        assert by_tile["1"]["total_density"] == 1 > by_tile["8"]["total_density"]
    with surgery.operated(build("Llama"), config, density=0.2, decode_density=0.1, **given) as model:
        found = surgery.config_of(model)
        assert 0 < found.theta_decode != found.theta
    kept = dataclasses.replace(config, theta_decode=0.125)
    with surgery.operated(build("Llama"), kept, density=0.2, **given) as model:
        assert surgery.config_of(model).theta_decode == 0.125


def test_a_density_of_decode_steps_alone_is_refused() -> None:
    single = dataclasses.replace(SPARSE, tile=1, theta=0.1, theta_decode=0.1)
    given = {"text": TEXT, "tokenizer": Letters(), "length": LENGTH}
    for config, options in (
        (SPARSE, {"decode_density": 0.1}),
        (SPARSE, {"decode_density": 1.5, "density": 0.2, **given}),
        (single, {"decode_density": 0.1, "density": 0.2, **given}),
    ):
        model = build("Llama")
        with pytest.raises(SurgeryError, match="decode_density"):
            surgery.operate(model, config, **options)
        assert not surgery.is_operated(model)


def test_heads_get_budgets_that_the_adapter_keeps(tmp_path: Path) -> None:
    given = {"density": 0.2, "text": TEXT, "tokenizer": Letters(), "length": LENGTH}
    ids = torch.tensor([[ord(letter) % VOCABULARY for letter in TEXT[0][:LENGTH]]])
    with surgery.operated(build("Llama"), SPARSE) as model:
        metric = routers_of(model)
    with surgery.operated(model, SPARSE, decode_density=0.1, **given):
        found = routers_of(model)
        offsets = torch.cat([found[index].offset.flatten() for index in (0, 1)])
        assert abs(float(offsets.mean())) < 1e-6 and float(offsets.std()) > 0.01
        assert all(torch.equal(found[i].key_weight, metric[i].key_weight) for i in (0, 1))
        sparse = logits(model, ids)
        assert 0.1 < surgery.statistics(model).far_density < 0.25
        surgery.save_adapter(model, tmp_path)
    surgery.load_adapter(model, tmp_path)
    assert torch.equal(logits(model, ids), sparse)
    surgery.eject(model)
    learned = {0: PageRouter(offset=torch.tensor([[0.5, -0.5], [0.2, -0.2]]))}
    with surgery.operated(model, SPARSE, routers=learned, **given):
        assert routers_of(model) == learned
    single = dataclasses.replace(SPARSE, tile=1, theta=0.1, theta_decode=None)
    with surgery.operated(model, single, **given):
        assert all(router.offset is None for router in routers_of(model).values())


def test_decode_steps_keep_their_density_with_budgets_by_head() -> None:
    """Offsets shift the shares of decode steps too, and θ of these is set on shifted ones."""
    model, text = build("Llama", dtype=torch.float32), [TEXT[0][:LENGTH]]
    given = {"text": text, "tokenizer": Letters(), "length": LENGTH}
    with surgery.operated(model, SPARSE, density=0.2, decode_density=0.1, **given):
        ids = torch.tensor([[ord(letter) % VOCABULARY for letter in text[0]]])
        first = LENGTH - LENGTH // 4
        with torch.no_grad():
            cache = model(ids[:, :first], use_cache=True)[CACHE_NAME]
            surgery.reset_statistics(model)
            for row in range(first, LENGTH):
                model(ids[:, row : row + 1], use_cache=True, **{CACHE_NAME: cache})
        assert surgery.statistics(model).by_tile["1"]["far_density"] == pytest.approx(0.1, rel=0.15)


def test_a_model_without_gradients_has_one_threshold_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no backward pass")

    monkeypatch.setattr(head_budgets, "head_budgets", fail)
    given = {"density": 0.2, "text": TEXT, "tokenizer": Letters(), "length": LENGTH}
    with surgery.operated(build("Llama"), SPARSE, **given) as model:
        assert all(router.offset is None for router in routers_of(model).values())
        assert surgery.config_of(model).theta != SPARSE.theta
    assert "no backward pass" in caplog.text


def test_every_pass_is_told_to_whom_asks() -> None:
    given = {"density": 0.2, "text": TEXT, "tokenizer": Letters(), "length": LENGTH}
    told: list[tuple[str, int, int]] = []
    model = build("Llama")
    with surgery.operated(model, SPARSE, progress=lambda *step: told.append(step), **given):
        pass
    assert not model._forward_hooks
    assert list(dict.fromkeys(stage for stage, *_ in told)) == ["budgets of heads", "thresholds"]
    for stage, total in (("budgets of heads", 3), ("thresholds", 8)):
        steps = [(done, of) for name, done, of in told if name == stage]
        assert steps == [(done, total) for done in [*range(total + 1), total]]


@pytest.mark.parametrize(("terminal", "enabled"), [(True, True), (True, False), (False, True)])
def test_bars_are_shown_on_terminals_unless_turned_off(
    terminal: bool, enabled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", enabled)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with surgery.operated(build("Llama"), SPARSE, density=0.2, text=TEXT, tokenizer=Letters(), length=LENGTH):
        shown = capsys.readouterr().err
    assert ("thresholds: 100%" in shown) == (terminal and enabled) and bool(shown) == (terminal and enabled)
