"""A headless Chromium that reaches nothing but this machine, and the studio's page in it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
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


# --- the studio ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def studio(*arguments):
    """The address of a studio that runs as a process, which Ctrl-C ends."""
    call = [sys.executable, "-m", "redpeft", "studio", *map(str, arguments), "--json"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        assert first, process.stderr.read()
        try:
            yield json.loads(first)["address"]
        finally:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in said


@contextlib.contextmanager
def opened(browser, address):
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.get_by_role("tab", name="Compare").wait_for()
    try:
        yield page
    finally:
        page.close()
    assert problems == []


def turn_to(page, tab):
    page.get_by_role("tab", name=tab, exact=True).click()


def choose(page, label, *names):
    for name in names:
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=name, exact=True).last.click()
    page.keyboard.press("Escape")
    page.get_by_role("option").last.wait_for(state="hidden")


def set_to(page, label, value):
    box = page.get_by_label(f"number input for {label}", exact=True)
    box.fill(str(value))
    box.press("Enter")


def start_asking(page, prompt="a", *names):
    choose(page, "adapters, up to 4", *names)
    page.get_by_label("prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask", exact=True).click()


def answers(page, count, timeout=60_000):
    """The whole answers, by who gave them."""
    page.wait_for_function(
        "count => [...document.querySelectorAll('.columns small')].filter(e => e.offsetParent)"
        ".filter(e => e.innerText.includes('token')).length == count",
        arg=count,
        timeout=timeout,
    )
    columns = [each.inner_text().split("\n", 1) for each in page.locator(".columns section:visible").all()]
    return {who: " ".join(text.split()) for who, text in columns}


def start_mixing(page, prompt, *names):
    for at, name in enumerate(names, 1):
        choose(page, f"adapter {at}", name)
    page.get_by_label("prompt for the mix").fill(prompt)
    page.get_by_role("button", name="Ask the base model and the mix").click()
