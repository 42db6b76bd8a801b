"""Topology files: NumPy archives that any tool can read. ``docs/topology-format.md`` describes them."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_surgery import __version__
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.export.topology import LayerTopology, Topology
from llama_surgery.files import write_atomically

FORMAT = "llama-surgery topology"
FORMAT_VERSION = 2

_LAYER_ARRAYS = ("indptr", "indices", "first_row", "positions")
_SHARED_ARRAYS = ("tokens", "tile_start", "near_start", "page_path")


def write_topology(path: str | Path, topology: Topology) -> None:
    """Writes a topology file, atomically.

    Raises:
        SurgeryError: It cannot be written.
    """
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "llama_surgery": __version__,
        "model": topology.model,
        "config": topology.config.to_dict(),
        "layers": {str(index): {"group": layer.group} for index, layer in topology.layers.items()},
    }
    arrays = {name: getattr(topology, name) for name in _SHARED_ARRAYS}
    for index, layer in topology.layers.items():
        arrays |= {f"layer.{index}.{name}": getattr(layer, name) for name in _LAYER_ARRAYS}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a file, since NumPy adds a suffix to names that lack it
            np.savez_compressed(file, allow_pickle=False, header=np.array(json.dumps(header)), **arrays)

    write_atomically(Path(path), write)


def read_topology(path: str | Path) -> Topology:
    """Reads a topology file and checks that it means something.

    Raises:
        SurgeryError: The file is missing, damaged, newer than this release, something else, or its arrays
            contradict each other; the message says which.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        header = json.loads(str(arrays.pop("header")))
    except OSError as error:
        raise SurgeryError(
            f"{path} cannot be read ({error.strerror or error}): give a file that 'export-topology' wrote."
        ) from error
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise SurgeryError(f"{path} is not a topology file ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise SurgeryError(f"{path} is not a topology file: give one that 'export-topology' wrote.")
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise SurgeryError(
            f"{path} has format version {version!r}; this release reads up to {FORMAT_VERSION}. Update "
            "llama-surgery."
        )

    def fail(what: str) -> SurgeryError:
        return SurgeryError(f"{path} is damaged: {what}. Export it again.")

    try:
        config = SurgeryConfig.from_dict(header["config"])
        groups = {int(index): int(layer["group"]) for index, layer in header["layers"].items()}
        model = str(header["model"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise fail(f"its header: {error}") from error
    wanted = {*_SHARED_ARRAYS, *(f"layer.{index}.{name}" for index in groups for name in _LAYER_ARRAYS)}
    if wanted != arrays.keys():
        raise fail(
            f"missing arrays {sorted(wanted - arrays.keys())}, unknown {sorted(arrays.keys() - wanted)}"
        )
    for name, array in arrays.items():
        if array.dtype.kind != "i":
            raise fail(f"{name} is of {array.dtype}, not of whole numbers")
    if arrays["tokens"].ndim != 1 or not len(arrays["tokens"]):
        raise fail(f"tokens has shape {arrays['tokens'].shape}")
    layers = {
        index: LayerTopology(group, **{name: arrays[f"layer.{index}.{name}"] for name in _LAYER_ARRAYS})
        for index, group in groups.items()
    }
    topology = Topology(model, config, arrays["tokens"], layers)
    for name in _SHARED_ARRAYS:
        if not np.array_equal(arrays[name], getattr(topology, name)):
            raise fail(f"{name} contradicts the configuration")
    for index, layer in layers.items():
        _check_layer(layer, topology, lambda what, index=index: fail(f"layer {index}: {what}"))
    return topology


def _check_layer(layer: LayerTopology, topology: Topology, fail: Callable[[str], SurgeryError]) -> None:
    config, indptr, tiles = topology.config, layer.indptr, len(topology.tile_start)
    if layer.group < 1:
        raise fail(f"group {layer.group}")
    if indptr.ndim != 2 or indptr.shape[1] != tiles + 1 or not len(indptr):
        raise fail(f"indptr has shape {indptr.shape}, expected (choosers, {tiles + 1})")
    flat = indptr.ravel()
    entries = layer.indices.size
    if (
        flat[0]
        or flat[-1] != entries
        or (np.diff(flat) < 0).any()
        or (indptr[1:, 0] != indptr[:-1, -1]).any()
    ):
        raise fail(f"indptr does not cut {entries} indices into {tiles} tiles a chooser")
    if layer.indices.shape != (entries,) or layer.first_row.shape != (entries,):
        raise fail(f"indices {layer.indices.shape} and first_row {layer.first_row.shape} differ in shape")
    tile = np.tile(np.arange(tiles), len(indptr)).repeat(np.diff(indptr, axis=1).ravel())
    closed = topology.near_start // config.page_size
    if ((layer.indices < 0) | (layer.indices >= closed[tile])).any():
        raise fail("a tile reads a page that is not closed for it")
    rows = np.minimum(config.tile, topology.length - topology.tile_start)
    if ((layer.first_row < 0) | (layer.first_row >= rows[tile])).any():
        raise fail("a first row lies outside its tile")
    begins = np.zeros(entries, dtype=bool)
    begins[flat[flat < entries]] = True
    if (np.diff(layer.indices)[~begins[1:]] <= 0).any():
        raise fail("the pages of a tile do not ascend")
    if layer.positions.shape[1:] != (topology.pages, config.page_size):
        raise fail(
            f"positions has shape {layer.positions.shape}, expected (KV heads, {topology.pages}, "
            f"{config.page_size})"
        )
    kv_heads = len(layer.positions)
    if len(indptr) not in (kv_heads, kv_heads * layer.group):
        raise fail(f"{len(indptr)} choosers for {kv_heads} KV heads of {layer.group} query heads each")
    ordered = np.sort(layer.positions.reshape(kv_heads, -1, config.chunk_size), axis=-1)
    if (ordered != np.arange(topology.pages * config.page_size).reshape(-1, config.chunk_size)).any():
        raise fail("positions are not those of the pages' chunks, each once")


def describe(topology: Topology) -> dict[str, Any]:
    """Figures of a topology: tokens, layers, tiles, pages, entries and density."""
    return {
        "model": topology.model,
        "tokens": topology.length,
        "layers": sorted(topology.layers),
        "kv_heads": sorted({len(layer.positions) for layer in topology.layers.values()}),
        "tiles": len(topology.tile_start),
        "pages": topology.pages,
        "entries": sum(len(layer.indices) for layer in topology.layers.values()),
        "far_density": topology.far_density(),
    }
