"""Starts the command line, as ``llama-surgery`` and as ``python -m llama_surgery`` (for launchers)."""

import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C is answered while Python still loads it, hence few imports above."""
    try:
        import signal

        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:
            # An exception may be lost in what imports run, or be taken for their failure.
            signal.signal(signal.SIGINT, _end)
        from llama_surgery.cli import app
    except KeyboardInterrupt:
        _end()
    else:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # θ and … in an encoding that has them not
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        app(obj=before)  # commands answer Ctrl-C themselves


def _end(*_: object) -> None:
    os.write(2, b"Interrupted: nothing was written.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
