"""A headless Chromium that reaches nothing but this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

# Debian's: Playwright's own builds are not on the package index.
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


@contextlib.contextmanager
def open_browser() -> Iterator[tuple]:
    """A browser context of Playwright (its `new_page()` is a tab), and the list of requests for other machines.

    Those are refused and written down: a test asserts that there are none.
    """
    from playwright.sync_api import sync_playwright

    refused: list[str] = []

    def answer(route):
        if urlsplit(route.request.url).hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            refused.append(route.request.url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with browser, browser.new_context(service_workers="block") as context:
            context.route("**/*", answer)
            yield context, refused
