"""The browser of these tests: it shows a page of gradio, and reaches no other machine."""

from __future__ import annotations

import pytest

from helpers.browser import needs_chromium, open_browser

pytestmark = [pytest.mark.browser, needs_chromium]
gradio = pytest.importorskip("gradio", reason="needs the extra [studio]")


def test_a_page_of_gradio_answers_and_another_machine_is_not_reached():
    with gradio.Blocks(analytics_enabled=False) as page:
        box, answer = gradio.Textbox(label="name"), gradio.Textbox(label="answer")
        box.submit(lambda name: f"Hello {name}", box, answer)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with open_browser() as (context, refused):
            tab = context.new_page()
            tab.goto(address)
            tab.get_by_label("name").fill("Ada")
            tab.get_by_label("name").press("Enter")
            tab.wait_for_function("document.querySelectorAll('textarea, input')[1].value == 'Hello Ada'")
            before = len(refused)
            tab.evaluate("fetch('http://192.0.2.1/').catch(() => null)")
            assert refused[before:] == ["http://192.0.2.1/"]
    finally:
        page.close()
