"""What ``llama-surgery learn`` says while it learns, and at the end."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_surgery.cli.common import Dtype
from llama_surgery.cli.console import err, out, print_json, say
from llama_surgery.config import SurgeryConfig


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command was asked for, whatever is learned."""

    model: str
    text: Path
    config: SurgeryConfig
    folder: Path
    length: int | None
    steps: int
    rate: float | None
    windows: int | None
    seed: int
    checkpoint_seconds: float
    device: str
    dtype: Dtype
    json: bool

    def keeping(self, stage: str) -> dict[str, Any]:
        """Where and how often a stage's state is kept."""
        file = self.folder / f"checkpoint-{stage}.pt"
        return {"checkpoint_file": file, "every_seconds": self.checkpoint_seconds}


def told(folder: Path, config: SurgeryConfig, seen: list[Any], json: bool) -> None:
    """Say what was learned; ``seen`` are its steps, none where nothing was left to do."""
    if json:
        last = dataclasses.asdict(seen[-1]) if seen else None
        print_json({"adapter": str(folder), "config": config.to_dict(), "last_step": last})
        return
    if seen:
        out.print(_described(seen[-1]), highlight=False)
    say(f"Adapter: {folder.resolve()}")


def silent(stage: str, done: int, total: int) -> None:
    """Progress of a process that is not the main one."""


def reporter(
    stage: str, steps: int, tell: Callable[[str, int, int], None] | None = None
) -> tuple[Callable[[Any], None], list[Any]]:
    """A listener for learning, and the list of steps it keeps: ten lines a stage, and a bar by ``tell``."""
    seen: list[Any] = []

    def report(step: Any) -> None:
        seen.append(step)
        if tell is not None:
            tell(f"learning ({stage})", step.step, steps)
        if step.step % max(1, steps // 10) == 0:
            err.print(f"{stage} {step.step}/{steps}: {_described(step)}", highlight=False)

    return report, seen


def _described(step: Any) -> str:
    if hasattr(step, "balance"):
        return (
            f"loss {step.loss:.5f}, load balance {step.balance:.3f}, rows see {step.density:.2%} of all pairs"
        )
    return (
        f"loss {step.loss:.5f}, mass lost {step.mass_lost:.2%}, far density {step.density:.4f}, "
        f"θ {step.theta:.3%}, {step.seconds:.0f} s"
    )
