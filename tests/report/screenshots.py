"""Takes the pictures of the report that docs/evaluation.md shows: ``make screenshots``.

python -m tests.report.screenshots REPORT.html FOLDER
python -m tests.report.screenshots                       # only looks whether there is a browser
"""

import io
import sys
from pathlib import Path

from PIL import Image
from tests.browser import CHROMIUM, browser

#: Width and height of a window, and what of the page is at its top.
SIZES = {"desktop": (1120, 1000, "header"), "phone": (390, 844, ".tree")}


def take(report: Path, folder: Path) -> list[Path]:
    """The report at both widths, light and dark; the files written."""
    written = []
    with browser() as page:
        for name, (width, height, place) in SIZES.items():
            for scheme in ("light", "dark"):
                page.open(report, width, height, dark=scheme == "dark")
                page.evaluate(f"document.querySelector('{place}').scrollIntoView()")
                written.append(folder / f"report-{name}-{scheme}.png")
                # Few of its colours differ: a palette makes it a third as large.
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)
                picture.save(written[-1], optimize=True)
    return written


if __name__ == "__main__":
    if CHROMIUM is None:
        sys.exit("No Chromium was found: install it (Debian: apt install chromium) to take screenshots.")
    match sys.argv[1:]:
        case [report, folder]:
            print(*take(Path(report), Path(folder)), sep="\n")
        case []:
            print(f"Screenshots are taken with {CHROMIUM}.")
        case _:
            sys.exit(__doc__)
