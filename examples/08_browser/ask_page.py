"""Ask an artifact in a real headless Chromium: the answer, tokens per second, and a picture of the page.

python examples/08_browser/ask_page.py out/demo "What is 14 + 9 - 5?" --screenshot page.png
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page_server
from playwright.sync_api import Browser, BrowserType, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# --no-sandbox: containers and root have none to offer.
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage")
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
TIMEOUT = 600_000  # milliseconds; shared machines are slow


def find_browser() -> str | None:
    """Chromium's program, or one like it."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def chromium(*, software_gpu: bool = False) -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright, launch(playwright.chromium, software_gpu=software_gpu) as browser:
        yield browser


def launch(kind: BrowserType, *, software_gpu: bool = False) -> Browser:
    """A headless browser, beside others of the same Playwright; `software_gpu` gives it WebGPU that a CPU computes."""
    return kind.launch(executable_path=find_browser(), args=[*FLAGS, *(SOFTWARE_GPU if software_gpu else ())])


@contextlib.contextmanager
def served(artifact: Path) -> Iterator[str]:
    """The page's address, while it is served."""
    with page_server.server(artifact) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield page_server.url(running)
        finally:
            running.shutdown()
            thread.join()


@contextlib.contextmanager
def opened(browser: Browser, artifact: Path, *, runtime: str = "wasm", threads: int = 1, **context: Any) -> Iterator[Page]:
    """The page, when it has loaded an artifact, or says why it has not (`problem`)."""
    with served(artifact) as address, browser.new_context(**context) as own:
        page = own.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(f"{address}&runtime={runtime}&threads={threads}")
        settled(page)
        yield page


def settled(page: Page) -> None:
    """Wait until the page has done what it was asked for."""
    page.wait_for_selector("body[data-state=ready], #error:not([hidden])", state="attached")


def problem(page: Page) -> str | None:
    """What the page says is wrong."""
    error = page.locator("#error")
    return error.text_content() if error.is_visible() else None


def ask(page: Page, question: str) -> dict[str, Any]:
    """Ask as a user does. Returns the answer and the numbers that the page shows."""
    page.fill("#question", question)
    page.click("#ask")
    settled(page)
    if (wrong := problem(page)) is not None:
        raise RuntimeError(wrong)
    names = {"answer": "#answer", "tokens_per_second": "#speed", "first_token": "#first", "tokens": "#count"}
    return {name: page.locator(where).text_content() for name, where in names.items()}


def call(page: Page, name: str, **given: Any) -> Any:
    """Call the page's worker: decode, replay."""
    return page.evaluate("([name, given]) => window.flora.call(name, given)", [name, given])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("question")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--software-webgpu", action="store_true", help="WebGPU on the CPU, where Chromium has one")
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    runtime, scheme = "webgpu" if options.software_webgpu else "wasm", "dark" if options.dark else "light"
    context = {"viewport": {"width": 1280, "height": 800}, "color_scheme": scheme}
    with (
        chromium(software_gpu=options.software_webgpu) as browser,
        opened(browser, options.artifact, runtime=runtime, threads=options.threads, **context) as page,
    ):
        if (wrong := problem(page)) is not None:
            sys.exit(wrong)
        answer = ask(page, options.question)
        page.click("#replay")
        settled(page)
        page.mouse.move(0, 0)  # over no button
        if options.screenshot:
            page.screenshot(path=options.screenshot)
        chosen = page.locator("[name=runtime]:checked").get_attribute("value")
        facts = {"runtime": chosen, "browser": browser.version, "replayed": page.locator("#replayed").text_content()}
        print(json.dumps(answer | facts, indent=1))


if __name__ == "__main__":
    main()
