"""Draws the pictures of docs/how_to/debugging.md, by its own snippets: `python docs/draw_how_to.py`.

Needs matplotlib, and chromium with chromedriver, as `make browser` installs them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service

HOW_TO = Path(__file__).parent / "how_to"
WINDOW = (790, 1090)  # pixels, with those that the browser keeps for itself
POINTED_AT = (12, 5)  # query and key, in a mask of
SIZE = 20


def run_snippets(page: Path, folder: Path) -> None:
    """Run the snippets that write a file, each in its own process and in this folder."""
    for snippet in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if "save" in snippet:
            subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True)


def photograph(page: Path, picture: Path) -> None:
    """A page of `to_html` in a browser, with the pointer on a pair."""
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "force-device-scale-factor=1"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={WINDOW[0]},{WINDOW[1]}")
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.get(page.as_uri())
        mask = driver.find_element("id", "mask")
        row, column = ((index + 0.5) / SIZE - 0.5 for index in POINTED_AT)
        offset = round(column * mask.size["width"]), round(row * mask.size["height"])
        ActionChains(driver, duration=0).move_to_element_with_offset(mask, *offset).perform()
        driver.save_screenshot(str(picture))
    finally:
        driver.quit()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_snippets(HOW_TO / "debugging.md", folder)
        shutil.copy(folder / "mask_tokens.png", HOW_TO)
        photograph(folder / "mask.html", HOW_TO / "mask_page.png")


if __name__ == "__main__":
    main()
