"""Topology files: written, read back, executed; and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.surgery.tiny import SINGLE, SPARSE, llama, tokens

import llama_surgery
from llama_surgery import SurgeryConfig, SurgeryError, TextError
from llama_surgery.attention.call import AttentionCall
from llama_surgery.attention.impl import reference
from llama_surgery.attention.result import AttentionResult
from llama_surgery.export.file import describe, read_topology, write_topology
from llama_surgery.export.record import record_topology
from llama_surgery.export.topology import Topology
from llama_surgery.surgery import execute
from llama_surgery.topology.geometry import query_blocks
from llama_surgery.topology.layout import reorder
from llama_surgery.topology.tree import paths

UNEVEN = SurgeryConfig(chunk_size=48, page_size=12, window=24, tile=8, theta=0.1)
# 320 − 5 tokens: the last tile and the last chunk are partial.
LENGTH = 315


def attention(
    topology: Topology, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """What a topology says: (kv_heads, group, length, value_dim). Tensors come in order of position."""
    config, order, plans = topology.config, topology.order(layer), topology.plans(layer)
    call = AttentionCall(config, "reference", config.tile, q.shape[-1] ** -0.5)
    outs = []
    for block in query_blocks(0, topology.length, config, config.tile):
        rows, far = q[:, :, block.start : block.stop], slice(0, block.closed * config.chunk_size)
        near = slice(far.stop, block.stop)
        out, lse = reference.near_field(call, rows, k[:, near], v[:, near])
        if block.closed:
            pages = [reorder(states[:, far], order[:, : block.closed]) for states in (k, v)]
            plan = plans.pop(0)
            assert plan.block == block
            out, _ = reference.far_field(call, rows, *pages, plan, (out, lse))
        outs.append(out)
    assert not plans
    return torch.cat(outs, 2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("topology") / "t.npz"
    with llama_surgery.operated(llama(), SPARSE) as model:
        write_topology(path, record_topology(model, tokens(LENGTH)))
    return path


@pytest.mark.parametrize("config", [SPARSE, UNEVEN], ids=["binary", "ternary"])
def test_a_file_executed_by_the_reference_gives_the_operated_attention(
    config: SurgeryConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, seen = tokens(LENGTH), []
    config = dataclasses.replace(config, summary="none")  # a file holds no means
    plain = execute.executor_of

    def watched(call: AttentionCall, *states: Any) -> Callable[..., AttentionResult]:
        def run(*given: Any, **options: Any) -> AttentionResult:
            result = plain(call, *states)(*given, **options)
            seen.append((*given[:3], result.out))
            return result

        return run

    with llama_surgery.operated(llama(), config) as model:
        write_topology(tmp_path / "t.npz", record_topology(model, ids))
        monkeypatch.setattr(execute, "executor_of", watched)
        with torch.no_grad():
            model(ids[None], use_cache=False)
    topology = read_topology(tmp_path / "t.npz")
    assert list(topology.layers) == [0, 1] and len(seen) == 2
    for layer, (queries, keys, values, expected) in enumerate(seen):
        got = attention(topology, layer, queries, keys, values)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        # Something is left out, or the comparison would show nothing.
        call = AttentionCall(config, "reference", config.tile, queries.shape[-1] ** -0.5)
        dense, _ = reference.near_field(call, queries, keys, values)
        assert (dense - expected).abs().max() > 1e-3


def test_what_is_written_is_read(file: Path) -> None:
    with llama_surgery.operated(llama(), SPARSE) as model:
        written = record_topology(model, tokens(LENGTH))
    read = read_topology(file)
    assert (read.model, read.config) == ("LlamaForCausalLM", SPARSE)
    assert np.array_equal(read.tokens, tokens(LENGTH))
    for index, layer in written.layers.items():
        for field in dataclasses.fields(layer):
            assert np.array_equal(getattr(read.layers[index], field.name), getattr(layer, field.name))
    assert describe(read)["kv_heads"] == [2] and describe(read)["entries"] > 0


def test_density_is_that_of_the_statistics_which_stay(file: Path) -> None:
    with llama_surgery.operated(llama(), SPARSE) as model:
        with torch.no_grad():
            model(tokens(LENGTH)[None])
        before = llama_surgery.statistics(model)
        record_topology(model, tokens(LENGTH))
        assert llama_surgery.statistics(model) == before
        assert llama_surgery.config_of(model) == SPARSE
    topology = read_topology(file)
    assert topology.far_density() == pytest.approx(before.far_density)
    assert sum(len(layer.indices) for layer in topology.layers.values()) == before.pages_read


def test_arrays_mean_what_the_format_says(file: Path) -> None:
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays["header"]))
    assert header["format_version"] == 2 and header["layers"] == {"0": {"group": 2}, "1": {"group": 2}}
    tile, page = SPARSE.tile, SPARSE.page_size
    assert arrays["tile_start"].tolist() == list(range(0, LENGTH, tile))
    for start, near in zip(arrays["tile_start"], arrays["near_start"], strict=True):
        assert near == max(0, (start - SPARSE.window) // SPARSE.chunk_size) * SPARSE.chunk_size
    assert arrays["layer.1.indptr"].shape == (4, len(arrays["tile_start"]) + 1)  # a row for every query head
    positions, path = arrays["layer.1.positions"], arrays["page_path"]
    assert positions.shape == (2, 256 // page, page) and path.shape == (256 // page, 2)
    # A key's path, from the tree, is its page's.
    order = torch.from_numpy(positions[1].reshape(-1, 64)).long() % 64
    digits = paths(order, page)
    for number, row in enumerate(positions[1]):
        assert np.array_equal(digits[number * page // 64, row % 64], np.tile(path[number], (page, 1)))


def test_files_of_version_1_hold_one_set_of_pages_for_a_kv_head(file: Path, tmp_path: Path) -> None:
    with np.load(file) as archive:
        arrays = dict(archive)
    for layer in ("layer.0", "layer.1"):  # of every KV head the first query head's pages, for both
        indptr = arrays[f"{layer}.indptr"]
        kept = np.concatenate([np.arange(indptr[head, 0], indptr[head, -1]) for head in (0, 2)])
        counts = np.diff(indptr, axis=1)[::2]
        flat = np.concatenate(([0], counts.ravel().cumsum()))
        arrays[f"{layer}.indptr"] = np.stack((flat[: indptr.shape[1]], flat[indptr.shape[1] - 1 :]))
        for name in ("indices", "first_row"):
            arrays[f"{layer}.{name}"] = arrays[f"{layer}.{name}"][kept]
    header(format_version=1)(arrays)
    np.savez(tmp_path / "t.npz", **arrays)
    old, new = read_topology(tmp_path / "t.npz"), read_topology(file)
    for one, other in zip(old.plans(0), new.plans(0), strict=True):
        assert torch.equal(one.counts, other.counts[::2])


def test_with_tiles_of_one_row_a_kv_heads_query_heads_share_their_pages(tmp_path: Path) -> None:
    with llama_surgery.operated(llama(), SINGLE) as model:
        write_topology(tmp_path / "t.npz", record_topology(model, tokens(LENGTH)))
    topology = read_topology(tmp_path / "t.npz")
    assert len(topology.layers[0].indptr) == 2 and describe(topology)["kv_heads"] == [2]


def test_a_short_text_has_no_pages(tmp_path: Path) -> None:
    with llama_surgery.operated(llama(), SPARSE) as model:
        write_topology(tmp_path / "t.npz", record_topology(model, tokens(50)))
        with pytest.raises(TextError, match="no token"):
            record_topology(model, tokens(0))
    topology = read_topology(tmp_path / "t.npz")
    assert topology.pages == 0 and topology.far_density() == 0 and topology.plans(0) == []


def test_kernels_are_asked_for_lists_of_pages_and_asked_again_later() -> None:
    config = dataclasses.replace(SPARSE, backend="auto")
    with llama_surgery.operated(llama(), config) as model:
        assert record_topology(model, tokens(LENGTH)).config == config
        assert llama_surgery.config_of(model) == config


def damage(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: arrays.update({name: change(arrays[name])})


def header(**changes: Any) -> Callable[[dict[str, np.ndarray]], Any]:
    return damage("header", lambda text: np.array(json.dumps({**json.loads(str(text)), **changes})))


def put(place: Any, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (header(format="something"), "is not a topology file"),
        (header(format_version=3), "Update llama-surgery"),
        (header(config={"chunk_size": 7}), "its header"),
        (header(layers={"0": {}}), "its header: 'group'"),
        (lambda arrays: arrays.pop("layer.1.indices"), r"missing arrays \['layer.1.indices'\]"),
        (lambda arrays: arrays.update(more=np.zeros(1, int)), r"unknown \['more'\]"),
        (lambda arrays: arrays.pop("header"), "is not a topology file"),
        (damage("tokens", lambda a: a[:100]), "tile_start contradicts"),
        (damage("near_start", put(-1, 0)), "near_start contradicts"),
        (damage("page_path", put((0, 0), 1)), "page_path contradicts"),
        (damage("layer.0.indptr", lambda a: a[:, 1:]), r"layer 0: .*shapes \[\(4, 40\)"),
        (damage("layer.1.first_row", lambda a: a[1:]), "layer 1: .* have shapes"),
        (damage("layer.0.positions", lambda a: a[:, :-1]), "layer 0: .* have shapes"),
    ],
)
def test_damaged_files_are_refused(
    file: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], told: str
) -> None:
    with np.load(file) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(SurgeryError, match=told):
        read_topology(tmp_path / "t.npz")


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="cannot be read"):
        read_topology(tmp_path / "nowhere.npz")
    for name, content in (
        ("text", b"no archive"),
        ("empty", b""),
        ("half", file.read_bytes()[:2000]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SurgeryError, match=r"topology file|cannot be read"):
            read_topology(tmp_path / name)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(SurgeryError, match="not a topology file"):
        read_topology(tmp_path / "single.npy")
