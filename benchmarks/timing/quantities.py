"""Quantiles of times, and peak memory."""

import torch


def quantiles(measured: list[float]) -> dict[str, float]:
    """p20, p50, p80, p99 and mean of sorted milliseconds."""
    last = len(measured) - 1
    found = {f"p{p}_ms": measured[min(last, len(measured) * p // 100)] for p in (20, 50, 80, 99)}
    return found | {"mean_ms": sum(measured) / len(measured)}


def forget_peak(device: torch.device) -> None:
    """Start measuring peak memory anew, with no cached blocks left over."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> float:
    """Peak of allocated memory since :func:`forget_peak`; NaN where it is not known."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else float("nan")


def peak_gib(device: torch.device) -> float:
    return peak_bytes(device) / 2**30


def allocated(device: torch.device) -> int:
    """Bytes of allocated memory; 0 where that is not known."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
