"""``dense_until`` from times of whole prompts."""

import pytest
import torch
from tests.surgery.tiny import VOCABULARY, build, llama

from llama_surgery import SurgeryConfig, config_of, operate
from llama_surgery.errors import SurgeryError
from llama_surgery.surgery import pays
from llama_surgery.surgery.operation import statistics

CONFIG = SurgeryConfig(chunk_size=64, page_size=16, window=32, tile=16, theta=0.1)


@pytest.mark.parametrize(
    ("times", "until"),
    [
        ([], 0),
        ([(2048, 1.0, 0.5)], 0),  # faster from the start on
        ([(2048, 1.0, 3.0), (4096, 2.0, 3.0), (8192, 4.0, 3.0)], 6144),  # half way between 4,096 and 8,192
        ([(2048, 1.0, 3.0), (4096, 2.0, 2.0)], 4096),
        ([(2048, 1.0, 3.0), (4096, 2.0, 3.0), (5000, 2.5, 3.0)], 5120),  # never: all of it, rounded up
        ([(2048, 1.0, 2.0), (4096, 2.0, 1.9)], 4096),
        ([(2048, 1.0, 1.5), (4096, 3.0, 4.0)], 5120),  # timing was cut off: as far as is known, never
    ],
)
def test_where_lines_cross(times, until):
    assert pays.crossing(times, SurgeryConfig(), 5000) == until


def test_a_multiple_of_the_tile():
    config = SurgeryConfig(tile=192, chunk_size=192 * 8, page_size=192)
    assert pays.crossing([(2048, 1.0, 2.0)], config, 2048) == 2112


class Clock:
    """Seconds that go by with the rows that were read: sparse ones cost a tenth, and each call 1,000 rows."""

    def __init__(self, model) -> None:
        self._model, self._now, self._counted = model, 0.0, (0, 0)

    def __call__(self) -> float:
        read = statistics(self._model)
        counted = read.rows, read.near_density * read.causal_pairs
        rows, pairs = (now - before for now, before in zip(counted, self._counted, strict=True))
        if rows > 0:
            self._now += pairs + (1e6 if config_of(self._model).dense_until == 0 else 0.0)
        self._counted = counted
        return self._now


def test_prompts_are_timed_dense_and_sparse(monkeypatch):
    """The model keeps its configuration and has counted nothing; what comes out lies where the clock says."""
    monkeypatch.setattr(pays, "SHORTEST", 256)
    monkeypatch.setattr(pays, "UNIT", 64)
    monkeypatch.setattr(pays, "SECONDS", float("inf"))
    model = operate(build("Llama", max_position_embeddings=2048), CONFIG)
    ids = torch.randint(3, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0))
    until = pays.measured_dense_until(model, ids, Clock(model))
    assert config_of(model) == CONFIG
    assert statistics(model).rows == 0
    assert 256 <= until <= 2048
    assert until % 64 == 0


def test_no_text_to_be_timed_on():
    with pytest.raises(SurgeryError, match="measure_speed=True without text"):
        operate(llama(), CONFIG, measure_speed=True)


def test_on_a_cpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(pays, "measured_dense_until", None)
    model = operate(build("Llama", max_position_embeddings=20_000), CONFIG)
    ids = torch.randint(3, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    assert pays.usual_dense_until(model, ids) == pays.ON_CPU
    short = operate(build("Llama", max_position_embeddings=300), CONFIG)
    assert pays.usual_dense_until(short, ids) == 304  # all of its context, in whole tiles
