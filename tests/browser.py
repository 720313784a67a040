"""What tests of the browser example need: Chromium, the npm packages and Playwright, or the reason why they cannot be run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "08_browser"
sys.path.insert(0, str(EXAMPLE))
GET = "make browser-dependencies gets it where it can"


def what_is_missing() -> str | None:
    """Why no page can be opened here, or None."""
    import page_server

    if absent := [name for name in page_server.MODULES if not (EXAMPLE / "node_modules" / name).is_file()]:
        return f"no {absent[0]} in {EXAMPLE / 'node_modules'}: {GET}"
    if importlib.util.find_spec("playwright") is None:
        return "no playwright, which drives the browser: pip install 'flora-export[dev]'"
    import ask_page

    return None if ask_page.find_browser() else f"none of {', '.join(ask_page.BROWSERS)}: {GET}"
