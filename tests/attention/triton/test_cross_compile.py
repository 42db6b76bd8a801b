"""Every kernel compiles for every GPU family of the tuning table, on a machine without a GPU.

Hopper is compiled for in every run, all families with ``--compile`` (``make compile-test``). Every
combination of arguments that calls launch is compiled for one family of either maker; for the others, and for
other sizes and dtypes, every value of every argument at least once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton.backends import backends

pytestmark = pytest.mark.timeout(660)

KERNELS = {
    "scan_kernel",
    "attend_kernel",
    "map_kernel",
    "project_kernel",
    "split_kernel",
    "arrange_kernel",
    "feature_kernel",
    "query_gradient_kernel",
    "near_gradient_kernel",
    "far_gradient_kernel",
    "gated_kernel",
    "gated_query_kernel",
    "gated_key_kernel",
    "place_kernel",
    "reader_kernel",
    "append_kernel",
    "score_kernel",
    "open_kernel",
    "merge_kernel",
}

#: Written for one family, for heads of 64 or 128 channels in half precision.
HOPPER = {"hopper_attend_kernel"}

#: Kernels that multiply no matrices, or not at every size.
WITHOUT_PRODUCTS = {
    "project_kernel",
    "split_kernel",
    "feature_kernel",
    "arrange_kernel",
    "place_kernel",
    "reader_kernel",
    "append_kernel",
    "merge_kernel",
}

#: Kernels whose matrix tiles, of one query's heads, are smaller than those units take.
SMALL_TILES = {"score_kernel", "open_kernel"}

#: Shared memory that one program may take, in bytes.
SHARED = {
    "cuda:80": 163 * 1024,
    "cuda:89": 99 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "hip:gfx942": 64 * 1024,
    "hip:gfx950": 160 * 1024,
}


def compile_for(target: str, *options: str, sparing: bool = True) -> list[dict[str, object]]:
    """Run the compiler in a process of its own: this one may be interpreting the kernels."""
    owner = {"cuda": "nvidia", "hip": "amd"}[target.split(":")[0]]
    if owner not in backends:
        pytest.skip(f"this triton has no {owner} backend")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("cross_compile.py"))
    run = subprocess.run(
        [sys.executable, script, target, *options, *["--sparing"] * sparing],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(
    target: str, *options: str, kernels: set[str] = KERNELS, sparing: bool = True
) -> list[dict[str, object]]:
    rows = compile_for(target, *options, sparing=sparing)
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert {"cubin", "hsaco"} & set(row["forms"]), row  # type: ignore[arg-type]
        assert row["shared"] <= SHARED[target], row  # type: ignore[operator]
        assert not row.get("tf32"), row
    return rows


def check_hopper(sparing: bool) -> None:
    rows = check("cuda:90", kernels=KERNELS | HOPPER, sparing=sparing)
    without = WITHOUT_PRODUCTS | SMALL_TILES
    assert all(row["wgmma"] for row in rows if row["kernel"] not in without), rows
    assert not [row["kernel"] for row in rows if row["filled_while_read"]]


@pytest.mark.slow
def test_hopper_uses_its_matrix_units_and_waits_for_them() -> None:
    check_hopper(sparing=True)


@pytest.mark.compile
def test_every_combination_on_hopper() -> None:
    check_hopper(sparing=False)


@pytest.mark.compile
@pytest.mark.parametrize("target", sorted(SHARED.keys() - {"cuda:90"}))
def test_targets(target: str) -> None:
    check(target, sparing=target != "hip:gfx942")


@pytest.mark.compile
def test_small_heads_on_hopper() -> None:
    check("cuda:90", "--head-dim", "64", "--heads", "3", "--dtype", "float16", kernels=KERNELS | HOPPER)


# Each width where it is tightest: 80 channels take the room of 128, 256 fit least on GPUs of 99 KiB.
@pytest.mark.compile
@pytest.mark.parametrize(("target", "head_dim"), [("cuda:90", 80), ("cuda:89", 256)])
def test_head_dims(target: str, head_dim: int) -> None:
    check(target, "--head-dim", str(head_dim))


@pytest.mark.compile
@pytest.mark.parametrize("target", ["cuda:89", "cuda:90", "hip:gfx942"])
def test_caps_sinks_and_single_precision(target: str) -> None:
    check(target, "--wide", "--dtype", "float32", "--heads", "3")


@pytest.mark.compile
def test_single_precision_on_small_gpus() -> None:
    largest = {"scan_kernel", "attend_kernel"}
    check("cuda:89", "--dtype", "float32", "--only", *largest, kernels=largest)


@pytest.mark.compile
def test_single_precision_is_rounded_where_tf32_will_do() -> None:
    rows = compile_for("cuda:90", "--head-dim", "64", "--dtype", "float32", "--tf32")
    of_gradients = {"query_gradient_kernel", "near_gradient_kernel", "far_gradient_kernel"}
    rounded = KERNELS - WITHOUT_PRODUCTS - {"map_kernel"} - of_gradients
    assert {row["kernel"] for row in rows if row["tf32"]} == rounded
    assert not [row["kernel"] for row in rows if row["filled_while_read"]]
    assert all(row["shared"] <= SHARED["cuda:90"] for row in rows)  # type: ignore[operator]
