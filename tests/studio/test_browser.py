"""`redpeft studio` in a real browser, which reaches no other machine.

With REDPEFT_DEMO=FOLDER, a folder that `redpeft demo` made, the pictures of the docs are drawn as well.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.browser import (
    answers,
    choose,
    needs_chromium,
    open_browser,
    opened,
    set_to,
    start_asking,
    start_mixing,
    studio,
    turn_to,
)
from helpers.language_models import write_red, write_talker
from redpeft.adapters.arithmetic import compose
from redpeft.adapters.folder import read_adapter

pytestmark = [pytest.mark.browser, needs_chromium]
pytest.importorskip("gradio", reason="needs the extra [studio]")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
DEMO = os.environ.get("REDPEFT_DEMO")


@pytest.fixture(scope="module")
def folder(tiny_decoder_folder, tmp_path_factory):
    base = write_talker(tmp_path_factory.mktemp("base") / "talker", tiny_decoder_folder)
    folder = tmp_path_factory.mktemp("studio") / "runs"
    for seed, name in enumerate(("formal", "brief", "loud", "plain"), 1):
        write_red(folder / name, base, seed)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text('{"peft_type": "REDPEFT"}')
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with studio(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with open_browser() as (context, refused):
        yield context
        assert refused == [], "the page asks other machines for something"


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def test_adapters_are_compared_as_if_each_were_alone_in_two_tabs_at_once(page, browser, address):
    names = ["formal", "brief", "loud", "plain"]
    with opened(browser, address) as other:
        for each, prompt in ((page, "a"), (other, "b")):
            turn_to(each, "Compare")
            set_to(each, "temperature", 1.2)
            start_asking(each, prompt, *names)
        first, second = answers(page, 5), answers(other, 5)
    assert list(first) == list(second) == ["the base model", *names]
    assert len({*first.values(), *second.values()}) == 10
    page.reload()
    turn_to(page, "Compare")
    page.get_by_label("the base model too").uncheck()
    set_to(page, "temperature", 1.2)
    start_asking(page, "a", "loud")
    assert answers(page, 1) == {"loud": first["loud"]}


def test_a_mix_follows_its_slider_and_is_there_after_a_reload(page, folder, tmp_path):
    turn_to(page, "Mix")
    set_to(page, "temperature", 0)
    start_mixing(page, "a", "formal", "brief")
    page.get_by_role("heading", name="formal", exact=True).wait_for()
    before = answers(page, 2)
    slider = page.get_by_label("range slider for strength 2")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
    slider.dispatch_event("pointerup")
    page.get_by_role("heading", name="formal + 0.5 * brief").wait_for()
    mixed = answers(page, 2)
    assert mixed["the base model"] == before["the base model"]
    assert mixed["formal + 0.5 * brief"] != before["formal"]
    page.get_by_label("name of the new adapter").fill("both")
    page.get_by_role("button", name="Save the mix").click()
    page.get_by_text("Saved formal + 0.5 * brief as").wait_for()
    compose(f'"{folder / "formal"}" + 0.5 * "{folder / "brief"}"', tmp_path / "both")
    saved, composed = (read_adapter(each / "both").edits for each in (folder, tmp_path))
    assert all(
        saved[site].scale.equal(edit.scale) and saved[site].bias.equal(edit.bias) for site, edit in composed.items()
    )
    page.reload()
    turn_to(page, "Compare")
    set_to(page, "temperature", 0)
    start_asking(page, "a", "both")
    assert answers(page, 2) == {"the base model": mixed["the base model"], "both": mixed["formal + 0.5 * brief"]}


def test_what_was_learned_is_a_picture_and_a_table(page):
    turn_to(page, "Look inside")
    choose(page, "adapter", "formal")
    page.locator("img[src^='data:image/png']:visible").wait_for()
    first = page.get_by_role("gridcell").filter(has_text="down_proj").first
    first.wait_for()


@pytest.mark.parametrize(
    ("prompt", "name", "sentence"),
    [
        (" ", "formal", "write a prompt first"),
        ("a " * 300, "formal", "begin a new chat"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(page, prompt, name, sentence):
    turn_to(page, "Compare")
    start_asking(page, prompt, name)
    message = page.get_by_test_id("toast-body")
    message.wait_for()
    assert sentence in message.inner_text()
    assert "Traceback" not in page.content()


def test_names_outside_the_folder_are_refused_and_damaged_adapters_are_listed(page, folder):
    page.get_by_text("no adapter_model.safetensors there").locator("visible=true").first.wait_for()
    turn_to(page, "Mix")
    choose(page, "adapter 1", "formal")
    page.get_by_label("name of the new adapter").fill("../outside")
    page.get_by_role("button", name="Save the mix").click()
    page.get_by_text("a new name has letters, digits, dots, dashes and underscores").wait_for()
    assert not (folder.parent / "outside").exists()


def test_the_server_hands_out_no_files_and_answers_no_other_site(page, address, folder):
    weights = folder / "formal" / "adapter_model.safetensors"
    for path in (f"gradio_api/file={weights}", "gradio_api/file=/etc/hostname", "file=pyproject.toml", "monitoring"):
        assert page.request.get(f"{address}/{path}").status in (403, 404), path
    assert page.request.get(address, headers={"Host": "elsewhere.example"}).status == 403
    assert (
        page.request.post(f"{address}/gradio_api/queue/join", headers={"Origin": "http://elsewhere.example"}).status
        == 403
    )
    assert page.request.post(f"{address}/gradio_api/upload", multipart={"files": "x"}).status == 403


def test_a_password_is_asked_for(browser, folder, monkeypatch):
    monkeypatch.setenv("REDPEFT_STUDIO_AUTH", "ada:secret")
    with studio(folder) as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill("secret")
        assert page.request.get(f"{address}/config").status == 401
        page.get_by_role("button", name="Login").click()
        page.get_by_role("tab", name="Compare").wait_for()
        page.close()


@pytest.mark.skipif(DEMO is None, reason="REDPEFT_DEMO names no folder of redpeft demo")
def test_pictures_of_the_docs(browser, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(DEMO, runs)
    with studio(runs) as address, opened(browser, address) as page:
        page.set_viewport_size({"width": 1100, "height": 960})
        styles = [f"answer_styles/{name}" for name in ("json", "pirate", "short")]

        def draw(name):
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)
            page.screenshot(path=IMAGES / f"studio-{name}.png", clip={"x": 0, "y": 0, "width": 1100, "height": 950})

        set_to(page, "temperature", 0)
        set_to(page, "longest answer, in tokens", 64)
        turn_to(page, "Compare")
        start_asking(page, "Tell me about the city of Paris.", *styles)
        answers(page, 4, timeout=300_000)
        draw("compare")
        turn_to(page, "Mix")
        set_to(page, "strength 1", 0.5)
        set_to(page, "strength 2", 0.5)
        start_mixing(page, "Tell me about the city of Paris.", *styles[:2])
        answers(page, 2, timeout=300_000)
        draw("mix")
        turn_to(page, "Look inside")
        choose(page, "adapter", styles[1])
        page.locator("img[src^='data:image/png']:visible").wait_for()
        draw("channels")
        turn_to(page, "Classify")
        choose(page, "classifiers, up to 4", "red", "lora")
        page.get_by_label("text", exact=True).fill("Where is my card? I ordered it two weeks ago")
        page.get_by_role("button", name="Classify", exact=True).click()
        page.get_by_text("red, edit off").wait_for(timeout=300_000)
        draw("classify")
    for picture in IMAGES.glob("studio-*.png"):
        assert picture.stat().st_size < 150_000, picture.name
