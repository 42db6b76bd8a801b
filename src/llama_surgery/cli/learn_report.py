"""What ``llama-surgery learn`` says while it learns, and at the end."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llama_surgery.cli.common import err, out, print_json
from llama_surgery.config import SurgeryConfig

if TYPE_CHECKING:
    from llama_surgery.learning.trainer import Step


def told(folder: Path, config: SurgeryConfig, last: "Step | None", json: bool) -> None:
    """Say what was learned."""
    if json:
        measured = None if last is None else dataclasses.asdict(last)
        print_json({"adapter": str(folder), "config": config.to_dict(), "last_step": measured})
        return
    if last is not None:
        out.print(described(last))
    out.print(f"Adapter: {folder.resolve()}", soft_wrap=True, highlight=False)


def silent(stage: str, done: int, total: int) -> None:
    """Progress of a process that is not the main one."""


def reporter(
    stage: str, steps: int, tell: Callable[[str, int, int], None]
) -> "tuple[Callable[[Step], None], list[Step]]":
    """A listener for the trainer, and the list it keeps: a bar for the steps, a line ten times a stage."""
    seen: list[Step] = []

    def report(step: "Step") -> None:
        seen.append(step)
        tell(f"learning ({stage})", step.step, steps)
        if step.step % max(1, steps // 10) == 0:
            err.print(f"{stage} {step.step}/{steps}: {described(step)}", highlight=False)

    return report, seen


def described(step: "Step") -> str:
    return (
        f"loss {step.loss:.5f}, mass lost {step.mass_lost:.2%}, far density {step.density:.4f}, "
        f"θ {step.theta:.3%}, {step.seconds:.0f} s"
    )
