"""Every kernel compiles for every GPU family of the tuning table, on a machine without a GPU.

For Hopper in every run, for all families with ``--compile`` (``make compile-test``). What is compiled, in
bfloat16 with heads of 128 channels where nothing else is said:

- for each of the six families every kernel as the defaults launch it, and attention to pages of 128 keys,
  which take the most shared memory;
- for Hopper and for gfx942, one family of either maker, the variants too: learned corrections, an engine's
  pool of blocks and pieces, other pages, no summaries, several rows a step, block tables;
- the defaults once more where sizes or types change the code: heads of 64 channels in float16 and groups of
  three, of 80 and of 256 channels, float32 exactly and in TF32, capped logits and sinks.

Not the variants for each family, size and type: they are branches of the source, which is the same for all.
Not exact float32 at full width for every family: none of NVIDIA's has matrix units for it, so that the code
is the same, and it is tight where there is least shared memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Set
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


class Compiler:
    """The compiler in a process of its own: this one may be interpreting the kernels."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill)

    def rows(self, target: str, *options: str) -> list[dict[str, object]]:
        """A row per kernel variant that was compiled."""
        owner = {"cuda": "nvidia", "hip": "amd"}[target.split(":")[0]]
        if owner not in backends:
            pytest.skip(f"this triton has no {owner} backend")
        if self.process is None:
            script = str(Path(__file__).with_name("cross_compile.py"))
            self.process = subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        print(target, *options, file=self.process.stdin, flush=True)
        rows = []
        for line in self.process.stdout:
            if not line.strip():
                return rows
            rows.append(json.loads(line))
        self.close()
        self.errors.seek(0)
        raise AssertionError(self.errors.read()[-3000:])

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    """One for all tests of a process: it imports PyTorch once."""
    made = Compiler()
    yield made
    made.close()


def check(
    compiler: Compiler, target: str, *options: str, hopper: bool = False, too_large: Set[str] = frozenset()
) -> list[dict[str, object]]:
    """All kernels are there, exact, and fit into shared memory, except for those that are ``too_large``."""
    rows = compiler.rows(target, *options)
    assert {row["kernel"] for row in rows} == KERNELS | (HOPPER if hopper else set())
    assert {row["kernel"] for row in rows if row["shared"] > SHARED[target]} == too_large  # type: ignore[operator]
    for row in rows:
        assert {"cubin", "hsaco"} & set(row["forms"]), row  # type: ignore[arg-type]
        assert not row.get("tf32"), row
    return rows


@pytest.mark.slow
def test_hopper_uses_its_matrix_units_and_waits_for_them(compiler: Compiler) -> None:
    rows = check(compiler, "cuda:90", "--variants", hopper=True)
    without = WITHOUT_PRODUCTS | SMALL_TILES
    assert all(row["wgmma"] for row in rows if row["kernel"] not in without), rows
    assert not [row["kernel"] for row in rows if row["filled_while_read"]]


# The longest first: two processes are then done at about the same time.
@pytest.mark.compile
@pytest.mark.parametrize(
    ("target", "options", "too_large"),
    [
        # Where shared memory is smallest, learning does not fit with the default tiles (docs/performance.md).
        ("cuda:89", "--dtype float32", {"far_gradient_kernel", "gated_key_kernel"}),
        ("hip:gfx942", "--variants", set()),
        ("hip:gfx942", "--wide --dtype float32 --heads 3", set()),
        ("cuda:89", "--head-dim 256", {"far_gradient_kernel"}),
        ("cuda:100", "", set()),
        ("cuda:89", "", set()),
        ("cuda:80", "", set()),
        ("hip:gfx950", "", set()),
        ("cuda:90", "--head-dim 80", set()),  # takes the room of 128
    ],
)
def test_configurations(compiler: Compiler, target: str, options: str, too_large: set[str]) -> None:
    check(compiler, target, *options.split(), too_large=too_large)


@pytest.mark.compile
def test_small_heads_on_hopper(compiler: Compiler) -> None:
    check(compiler, "cuda:90", "--head-dim", "64", "--heads", "3", "--dtype", "float16", hopper=True)


@pytest.mark.compile
def test_single_precision_is_rounded_where_tf32_will_do(compiler: Compiler) -> None:
    """Learning stays exact."""
    options = "--wide --dtype float32 --tf32 --heads 3 --head-dim 64"
    rows = compiler.rows("cuda:90", *options.split())
    assert {row["kernel"] for row in rows} == KERNELS
    exact = {name for name in KERNELS if "gradient" in name or "gated" in name}
    rounded = KERNELS - WITHOUT_PRODUCTS - {"map_kernel"} - exact
    assert {row["kernel"] for row in rows if row["tf32"]} == rounded
    assert not [row["kernel"] for row in rows if row["filled_while_read"]]
    assert all(row["shared"] <= SHARED["cuda:90"] for row in rows)  # type: ignore[operator]
