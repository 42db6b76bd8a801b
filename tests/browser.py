"""Headless Chromium, driven through its DevTools protocol over two pipes: no driver and no package is needed.

https://chromedevtools.github.io/devtools-protocol/ describes the methods.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: None where there is no browser.
CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
#: In its sandbox the browser refuses to run as root; what it opens are the project's own pages.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
#: Without these it calls its maker's servers.
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


class Page:
    """A tab.

    Args:
        inwards: Descriptor that commands are written to.
        outwards: Descriptor that answers are read from.
    """

    def __init__(self, inwards: int, outwards: int) -> None:
        self._inwards, self._outwards, self._buffer = inwards, outwards, b""
        self._count, self._session = 0, None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def open(self, file: Path, width: int, height: int, *, dark: bool) -> None:
        """Show a file at a size in pixels of style sheets; below 600 wide as a phone does."""
        phone = width < 600
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=file.resolve().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """What is visible, as a PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._inwards, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = os.read(self._outwards, 1 << 16)
            if not read:
                raise RuntimeError("the browser ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser() -> Iterator[Page]:
    """A tab of a browser with an empty profile, ended at the end."""
    commands, inwards = os.pipe()
    outwards, answers = os.pipe()

    def place() -> None:  # the browser reads from descriptor 3 and writes to 4
        one, other = os.dup(commands), os.dup(answers)
        os.dup2(one, 3)
        os.dup2(other, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, *OFFLINE, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,
        )
        os.close(commands)
        os.close(answers)
        try:
            yield Page(inwards, outwards)
        finally:
            running.terminate()
            running.wait(20)
            os.close(inwards)
            os.close(outwards)
