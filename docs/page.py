"""Takes docs/page.png of a running service: python docs/page.py [URL]. Needs what `make test` installs and Chromium."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

WIDTH, MARGIN = 1120, 32
COLOURS = 128
WARM_UPS = 2


def shoot(url: str, path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1500}, reduced_motion="reduce")
        page.goto(url)
        page.get_by_label("Ask a question").check()
        for _ in range(WARM_UPS + 1):
            with page.expect_response("**/compare"):
                page.get_by_role("button", name="Lighthouse").click()
            expect(page.locator("#go")).to_have_attribute("aria-disabled", "false")
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(0, 0)
        lanes = page.locator("#lanes").bounding_box()
        assert lanes is not None
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": lanes["y"] + lanes["height"] + MARGIN}
        shot = Image.open(io.BytesIO(page.screenshot(clip=clip)))  # type: ignore[arg-type]
        browser.close()
    few = shot.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    shoot(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000", Path(__file__).with_suffix(".png"))
