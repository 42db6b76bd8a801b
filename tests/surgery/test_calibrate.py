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
from llama_surgery.surgery import head_budgets
from llama_surgery.surgery.calibrate import calibrate, threshold
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.operation import routers_of, set_config, surgery_of
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


def test_longer_texts_are_read_at_about_the_density_too() -> None:
    model, longer, read = build("Llama"), tokens(1, 4 * LENGTH), []
    given = {"text": TEXT, "tokenizer": Letters(), "length": LENGTH, "density": 0.2}
    surgery.operate(model, SPARSE, **given)
    assert surgery.config_of(model).theta_length == LENGTH
    for length in (LENGTH, 0):
        set_config(model, dataclasses.replace(surgery.config_of(model), theta_length=length))
        surgery.reset_statistics(model)
        with torch.no_grad():
            model(longer)
        read.append(surgery.statistics(model).far_density)
    assert read[0] > 1.5 * read[1]


@pytest.mark.parametrize("backend", ["gather", "auto"])
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
        assert layer.config == config
    assert surgery.statistics(model).rows == 0


@pytest.mark.parametrize("power", [0.2, 0.6, 2.0])
@pytest.mark.parametrize("start", [0.0, 1e-5, 0.05, 20.0])
def test_a_threshold_is_found_in_few_passes(power: float, start: float) -> None:
    """Whatever density falls by with θ, and also where keys with large biases take θ beyond 1."""
    for scale in (1e-3, 1.0, 30.0):
        tried = dict[float, float]()

        def measure(theta: float, scale: float = scale, tried: dict[float, float] = tried) -> float:
            return tried.setdefault(theta, min(1.0, 0.06 * (scale / theta) ** power))

        found = threshold(measure, 0.06, start)
        assert 0.95 * 0.06 <= tried[found] <= 0.06 and len(tried) <= 9


def test_a_density_that_goes_in_steps_is_kept_from_below() -> None:
    def measure(theta: float) -> float:
        return 0.2 if theta < 0.3 else 0.03

    assert threshold(measure, 0.06, 0.01) == pytest.approx(0.3, rel=0.1)
    assert measure(threshold(measure, 0.06, 0.01)) <= 0.06


def test_a_text_that_holds_less_than_the_density_is_read_whole() -> None:
    assert threshold(lambda theta: 0.01, 0.06, 0.5) < 1e-5


def test_what_is_always_open_may_be_more_than_the_density() -> None:
    with pytest.raises(SurgeryError, match=r"out of reach.* 2\.0 times"):
        threshold(lambda theta: 0.12, 0.06, 0.01)


def test_no_row_is_dense_while_a_density_is_measured() -> None:
    given = {"text": TEXT, "tokenizer": Letters(), "length": LENGTH, "density": 0.2, "measure_speed": False}
    found = []
    for until in (0, 128):
        with surgery.operated(
            build("Llama"), dataclasses.replace(SPARSE, dense_until=until), **given
        ) as model:
            found.append(surgery.config_of(model))
    assert found[1] == dataclasses.replace(found[0], dense_until=128)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"density": "6%"}, "density='6%': must lie between 0 and 1"),
        ({"density": None, "max_loss": "1%"}, "max_loss='1%': must lie between 0 and 1"),
        ({"length": "8k"}, "length='8k': must be a whole number of tokens"),
        ({"length": 128.5}, "length=128.5: must be a whole number of tokens"),
        ({"text": iter(TEXT)}, "text is a list_iterator: give a list of documents"),
        ({"text": Path("books.txt")}, "text is a PosixPath: give a list of documents"),
        ({"config": {"theta": 0.1}}, "give a SurgeryConfig"),
    ],
)
def test_what_the_command_takes_is_refused_in_words(wrong: dict[str, Any], told: str) -> None:
    given = {
        "config": SPARSE,
        "density": 0.2,
        "text": TEXT,
        "tokenizer": Letters(),
        "length": LENGTH,
        **wrong,
    }
    model = build("Llama")
    with pytest.raises(SurgeryError, match=told):
        surgery.operate(model, given.pop("config"), **given)
    assert not surgery.is_operated(model)


def test_the_tokenizer_of_another_model_is_refused() -> None:
    """Looked up on a GPU, such a token would end the process."""
    model = build("Llama", vocab_size=VOCABULARY - 1)
    with pytest.raises(SurgeryError, match=f"token {VOCABULARY - 1}, but the model knows {VOCABULARY - 1} "):
        surgery.operate(model, SPARSE, density=0.2, text=TEXT, tokenizer=Letters(), length=LENGTH)
    assert not surgery.is_operated(model)


def test_models_without_a_head_are_calibrated() -> None:
    given = {"text": TEXT, "tokenizer": Letters(), "length": LENGTH, "density": 0.2}
    with surgery.operated(build("Llama").model, SPARSE, **given) as model:
        assert surgery.config_of(model).theta != SPARSE.theta


def test_logits_that_are_no_numbers_are_told() -> None:
    with surgery.operated(build("Llama"), SPARSE) as model:
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        with pytest.raises(SurgeryError, match="gives NaN"):
            calibrate(model, IDS, 0.2)
        assert surgery.config_of(model) == SPARSE


def test_a_density_out_of_reach_leaves_the_configuration() -> None:
    with surgery.operated(build("Llama"), SPARSE) as model:
        with pytest.raises(SurgeryError, match="out of reach"):
            calibrate(model, IDS, 1e-4)
        assert surgery.config_of(model) == SPARSE


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


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Exaone4", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 48}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
        ("GPTNeoX", {}),  # hands its cache on under another name
    ],
)
def test_steps_are_measured_behind_prompts_of_every_kind_of_cache(kind: str, changes: dict[str, Any]) -> None:
    given = {"text": TEXT, "tokenizer": Letters(), "length": LENGTH}
    with surgery.operated(build(kind, **changes), SPARSE, density=0.2, decode_density=0.1, **given) as model:
        assert 0 < surgery.config_of(model).theta_decode != SPARSE.theta_decode


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
    for stage, total in (("budgets of heads", 3), ("thresholds", 16)):
        steps = [(done, of) for name, done, of in told if name == stage]
        assert steps[0] == (0, total) and steps[-1] == (total, total) and steps == sorted(steps)
    assert len(told) > 10


@pytest.mark.parametrize(("terminal", "enabled"), [(True, True), (True, False), (False, True)])
def test_bars_are_shown_on_terminals_unless_turned_off(
    terminal: bool, enabled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", enabled)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with surgery.operated(build("Llama"), SPARSE, density=0.2, text=TEXT, tokenizer=Letters(), length=LENGTH):
        shown = capsys.readouterr().err
    assert ("thresholds: 100%" in shown) == (terminal and enabled) and bool(shown) == (terminal and enabled)
