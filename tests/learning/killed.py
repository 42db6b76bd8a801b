"""A run that is killed in the middle."""

import subprocess
import sys
import time
from pathlib import Path


def steps_before_death(script: str, file: Path, steps: int) -> list[int]:
    """Run ``script`` on ``file``, kill it after so many steps, and return all that it printed."""
    command, seen = [sys.executable, "-c", script, str(file)], []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(int(line))
        if len(seen) == steps:  # without warning, at no particular moment of the next step or its checkpoint
            time.sleep(0.013)
            process.kill()
    process.wait()
    process.stdout.close()
    return seen
