"""Drives the playground in a real browser, keyboard only where it can be, and takes pictures of it.

Needs Chromium (Debian: ``apt install chromium``) and ``pip install playwright``, which are no part of the project's
environment:

    python scripts/try_playground.py --out docs/playground.png

Exits with an error if a step fails, the page asks anything of another server, or its console shows an error.
"""

from __future__ import annotations

import argparse
import base64
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PROMPT = "a red heart on a blue background"
DONE = "text=/Done in/"


@contextmanager
def server():
    """``pisces serve`` on a free port; its address."""
    command = [sys.executable, "-m", "open_pisces", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = re.search(r":(\d+)/v1", process.stdout.readline())[1]
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


def send(page: Page, words: str) -> float:
    """Type a message, send it, wait for its end; seconds until something was shown."""
    answers = page.locator(".assistant").count()
    page.get_by_role("textbox", name="Message").fill(words)
    began = time.monotonic()
    page.keyboard.press("Enter")
    answer = page.locator(".assistant").nth(answers)
    answer.locator("img, p:not(:empty)").first.wait_for(state="attached")
    first = time.monotonic() - began
    answer.get_by_role("button", name="Again").wait_for()
    return first


def desktop(page: Page, url: str, out: Path) -> dict[str, float]:
    """Draw, ask about it, draw several, again, paste a picture."""
    page.goto(url)
    send(page, "a tree")  # the first drawing of a server reads the empty caption
    page.get_by_role("button", name="New").click()
    page.keyboard.type(PROMPT)
    began = time.monotonic()
    page.keyboard.press("Enter")
    page.locator("figure img").wait_for(state="attached")
    preview = time.monotonic() - began
    page.locator("figcaption span").wait_for()
    whole = time.monotonic() - began
    page.get_by_role("button", name="Ask about this picture").press("Enter")
    send(page, "What is in the picture?")
    assert page.locator(".assistant p").nth(2).inner_text() == "red heart"
    page.locator("summary").press("Enter")
    page.get_by_label("Pictures", exact=True).fill("2")
    page.get_by_label("Seed").fill("4")
    page.locator("summary").press("Enter")
    send(page, "/draw two green frogs")
    assert page.locator(".assistant").last.locator("figure").count() == 2
    page.screenshot(path=out)
    page.get_by_role("button", name="Again").last.press("Enter")
    page.locator("text=/Thinking/").wait_for()
    page.locator(DONE).wait_for()
    page.get_by_role("button", name="Copy as API call").last.press("Enter")
    page.locator("text=/clipboard/").wait_for()
    return {"first_preview_s": round(preview, 2), "picture_s": round(whole, 2)}


def dropped(page: Page, url: str) -> None:
    """A dropped picture is asked about; a long drawing is stopped by Escape."""
    page.goto(url)
    picture = base64.b64encode(Path(__file__).parents[1].joinpath("docs/demo.png").read_bytes()).decode()
    page.evaluate(
        """async (data) => {
            const blob = await (await fetch("data:image/png;base64," + data)).blob();
            const moved = new DataTransfer();
            moved.items.add(new File([blob], "a.png", { type: "image/png" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: moved, bubbles: true, cancelable: true }));
        }""",
        picture,
    )
    page.locator("#attached img").wait_for()
    send(page, "/say Describe the image briefly.")
    page.locator("summary").press("Enter")
    page.get_by_label("Steps").fill("200")
    page.get_by_role("textbox", name="Message").fill("/draw a cat")
    page.keyboard.press("Enter")
    page.locator("text=/Thinking/").wait_for()
    page.keyboard.press("Escape")
    page.locator("text=/Stopped/").wait_for()


def phone(page: Page, url: str, out: Path) -> None:
    """An example is touched; nothing is wider than the screen."""
    page.goto(url)
    page.get_by_role("button", name="three yellow stars").tap()
    page.locator(DONE).wait_for()
    page.screenshot(path=out)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("playground.png"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    troubles: list[str] = []
    with server() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])

        def page_of(**how) -> Page:
            # Without the page's own policy in one case only: the drop is made by a script, which it forbids.
            page = browser.new_context(**how).new_page()
            page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or troubles.append(f"asked for {r.url}"))
            page.on("console", lambda m: m.type == "error" and troubles.append(m.text))
            page.on("pageerror", lambda e: troubles.append(str(e)))
            return page

        granted = ["clipboard-read", "clipboard-write"]
        figures = desktop(page_of(viewport={"width": 1000, "height": 1180}, permissions=granted), url, args.out)
        dropped(page_of(bypass_csp=True), url)
        small = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
        phone(page_of(device_scale_factor=2, **small), url, args.out.with_stem(args.out.stem + "-phone"))
        browser.close()
    assert not troubles, troubles
    print(figures)


if __name__ == "__main__":
    main()
