"""Values that are measured once."""

import json
from pathlib import Path

import pytest
import torch

from llama_surgery import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.kept import Kept, adapter_digest, claimed, found_parts, with_parts
from llama_surgery.topology.router import PageRouter


def test_a_value_is_made_once_for_what_decides_it(tmp_path: Path) -> None:
    made = []

    def make():
        made.append(None)
        return {"b": len(made), "a": (1.5, None)}

    for folder, times in ((tmp_path, 1), (None, 2)):
        made.clear()
        for _ in range(2):
            found = Kept(folder, seed=0).once("part", make, length=8)
            assert list(found) == ["b", "a"] and found["a"] == [1.5, None]  # in order, and as JSON has it
        assert len(made) == times
    for kept, length in ((Kept(tmp_path, seed=1), 8), (Kept(tmp_path, seed=0), 9)):
        before = len(made)
        kept.once("part", make, length=length)
        assert len(made) == before + 1
    assert len(list((tmp_path / "kept").glob("part-*.json"))) == 3
    assert Kept(tmp_path, seed=2).once("part", None) is None and Kept().once("part", None) is None


def test_a_value_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert kept.once("part", lambda: 1) == 1
    (file,) = (tmp_path / "kept").iterdir()
    file.unlink()
    with claimed(tmp_path, file.stem, wait=True):
        assert kept.once("part", lambda: 2, wait=False) is None
    assert kept.once("part", lambda: 3, wait=False) == 3


def test_a_process_that_dies_leaves_nothing_behind(tmp_path: Path) -> None:
    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path).once("part", dies)
    assert Kept(tmp_path).once("part", lambda: 1, wait=False) == 1
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text("{", encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"part-\w+\.json is damaged"):
        Kept(tmp_path).once("part", lambda: 1)


def test_a_folder_without_locks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("in the way", encoding="utf-8")
    with pytest.raises(SurgeryError, match="could not lock"):
        Kept(tmp_path).once("part", lambda: 1)


def test_a_topology_is_told_by_its_configuration_and_its_tensors() -> None:
    config, router = SurgeryConfig(), PageRouter(offset=torch.tensor([[0.3, -0.3]]))
    one = adapter_digest(config, {0: router})
    assert one == adapter_digest(config, {0: PageRouter(offset=router.offset.clone())})
    others = (None, {0: PageRouter(offset=torch.zeros(1, 2))}, {1: router})
    assert len({one, *(adapter_digest(config, routers) for routers in others)}) == 4
    assert adapter_digest(SurgeryConfig(window=64), {0: router}) != one


def test_what_was_found_of_layers_comes_back_to_the_last_digit() -> None:
    maps = {1: PageRouter(key_map=torch.randn(2, 4, 4))}
    found = {
        0: PageRouter(key_weight=torch.rand(2, 4), offset=torch.randn(2, 3)),
        1: PageRouter(key_map=maps[1].key_map, offset=torch.randn(2, 3)),
    }
    again = with_parts(maps, json.loads(json.dumps(found_parts(found))))
    assert adapter_digest(SurgeryConfig(), again) == adapter_digest(SurgeryConfig(), found)
    assert again[1].key_map is maps[1].key_map
    assert with_parts(None, {}) == {}
