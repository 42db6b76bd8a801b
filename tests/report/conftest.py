"""A results file as ``evaluate`` writes it, small and made up."""

from typing import Any

import pytest


@pytest.fixture
def results() -> dict[str, Any]:
    bins = [{"from": 1, "to": 256, "tokens": 510, "perplexity": 23.0}]
    bins.append({"from": 256, "to": 1024, "tokens": 1536, "perplexity": 20.0})
    dense = {
        "name": "dense", "perplexity": 20.5, "by_position": bins, "seconds_per_window": 2.0,
        "needle_accuracy": 1.0, "needle_seconds": 9.0,
    }  # fmt: skip
    layer = {"far_density": [0.02, 0.1], "pages_read": [10, 50], "near_density": 0.3}
    operated = {
        **dense, "name": "T = 32", "perplexity": 20.6, "seconds_per_window": 1.0, "needle_accuracy": 0.5,
        "config": {
            "page_size": 64, "chunk_size": 512, "window": 128, "tile": 32,
            "theta": 0.04, "theta_decode": 0.01,
        },
        "ratio": {"ratio": 1.0049, "low": 1.001, "high": 1.008, "confidence": 0.95, "count": 2},
        "kl": 0.01, "top1": 0.97,
        "density": {
            "far_density": 0.06, "near_density": 0.3, "total_density": 0.36, "visible_far_density": 0.05,
            "by_layer": {"0": layer, "1": layer},
        },
        "needle": {"count": 2, "difference": -0.5, "confidence": 0.9, "low": -1.0, "high": 0.0},
        "generate_density": {},
    }  # fmt: skip
    needles = [
        {
            "form": "treasure",
            "depth": depth,
            "length": 1024,
            "name": "<Bosera>",
            "right": {"dense": True, "T = 32": ok},
        }
        for depth, ok in ((0.05, True), (0.95, False))
    ]
    tree = {
        "layer": 1, "kv_head": 0, "tokens": ["<b>", " of", " the", "\n", " & ", "fox", " ran", "."],
        "order": [0, 4, 1, 6, 3, 2, 5, 7], "page_size": 2,
    }  # fmt: skip
    return {
        "format": "llama-surgery results", "format_version": 1, "created": "2026-01-02T03:04:05+00:00",
        "conditions": {"text": "books"}, "decode_ms": {"dense": 10.0, "T = 32": 5.0}, "trees": [tree],
        "model": "books-26m", "length": 1024, "windows": 2, "seed": 7,
        "environment": {
            "llama_surgery": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7",
            "device": "cpu: x86", "dtype": "float32", "threads": 2,
        },
        "dense": dense, "operated": [operated], "needles": needles,
    }  # fmt: skip
