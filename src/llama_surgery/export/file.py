"""Topology files: NumPy archives that any tool can read. ``docs/topology-format.md`` describes them."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from llama_surgery import __version__
from llama_surgery.config import SurgeryConfig
from llama_surgery.errors import SurgeryError, check_version
from llama_surgery.export.topology import LayerTopology, Topology
from llama_surgery.files import write_atomically

FORMAT = "llama-surgery topology"
FORMAT_VERSION = 2

_LAYER_ARRAYS = ("indptr", "indices", "first_row", "positions")
_SHARED_ARRAYS = ("tokens", "tile_start", "near_start", "page_path")


def write_topology(path: str | Path, topology: Topology) -> None:
    """Writes a topology file, atomically; raises SurgeryError where it cannot be written."""
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
    """Reads a topology file.

    Raises:
        SurgeryError: The file is missing, damaged, newer than this release, or something else; it says which.
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
    check_version(f"{path} has format version", header.get("format_version"), FORMAT_VERSION)

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
    layers = {
        index: LayerTopology(group, **{name: arrays[f"layer.{index}.{name}"] for name in _LAYER_ARRAYS})
        for index, group in groups.items()
    }
    topology = Topology(model, config, arrays["tokens"], layers)
    for name in _SHARED_ARRAYS:
        if not np.array_equal(arrays[name], getattr(topology, name)):
            raise fail(f"{name} contradicts the configuration")
    for index, layer in layers.items():
        shapes = [getattr(layer, name).shape for name in _LAYER_ARRAYS]
        entries, rows = (layer.indices.size,), len(layer.indptr)
        tiles, pages = len(topology.tile_start) + 1, (topology.pages, config.page_size)
        if shapes != [(rows, tiles), entries, entries, (len(layer.positions), *pages)]:
            raise fail(f"layer {index}: {_LAYER_ARRAYS} have shapes {shapes}")
    return topology


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
