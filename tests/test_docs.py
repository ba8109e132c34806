"""README and docs: links lead somewhere, commands and snippets work, and the reference is what the code says.

Blocks marked ```python run and ```bash run are run, those of a page one after another in one place, where the names of
models on the Hub are folders with tiny models. Other python blocks are compiled.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from helpers.pages import BLOCK, blocks, run_commands
from helpers.versions import TOO_OLD
from redpeft import cli, demo
from redpeft.training.baselines import DEFAULT_RATES
from redpeft.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = {command.callback.__name__.replace("_", "-"): command for command in cli.app.registered_commands}
OPTIONS = typer.main.get_command(cli.app).commands


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def calls(page: Path) -> list[str]:
    """Every call of redpeft on a page, in blocks and within the text."""
    lines = "\n".join(text for *_, text in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    quoted = [code for code in re.findall(r"`([^`]+)`", prose) if "..." not in code]
    commands = [line.partition("#")[0].rpartition(" | ")[2].strip() for line in [*lines, *quoted]]
    return [command for command in commands if re.match(r"redpeft [a-z]", command)]


@pytest.fixture(scope="module")
def reference():
    path = ROOT / "docs" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says(reference):
    pages = reference.pages()
    generated = {match[2] for text in pages.values() for match in reference.BLOCK.finditer(text)}
    assert generated == set(reference.BLOCKS)
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page_name(page)}: run python docs/generate_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", other.read_text(encoding="utf-8")), re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{target}: no such heading"


def slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)\)", index)}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_exist_with_the_options_used(page):
    for call in calls(page):
        name, *arguments = shlex.split(call.partition(" -- ")[0])[1:]  # after -- are another program's options
        assert name in COMMANDS, call
        options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        known = {option for parameter in OPTIONS[name].params for option in parameter.opts}
        assert options <= known | {"--help"}, call
        overrides = [argument for argument in arguments if re.match(r"[a-z_.]+=", argument)]
        if name == "train" and overrides:
            load_recipe(None, ["base=model", "data.path=rows.csv", *overrides])


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_compile(page):
    for *_, text in blocks(page, "python"):
        ast.parse(text)
        for rate in re.findall(r"learning_rate\"?[=:] ?([\d.e-]+)", text):
            assert float(rate) == DEFAULT_RATES["red"], "the pages show the default learning rate"


@pytest.fixture
def workplace(
    tmp_path,
    monkeypatch,
    tiny_encoder_folder,
    tiny_decoder_folder,
    tiny_t5_folder,
    tiny_gpt2_folder,
    tiny_chat_tokenizer,
    e2e_folder,
):
    """The current folder of the snippets, with tiny models by the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("BASE", str(tiny_encoder_folder))
    shutil.copytree(tiny_encoder_folder, "minilm")
    Path("messages").mkdir()
    for file in demo.MESSAGES.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (Path("messages") / file.name).write_text("".join(lines[::6]), encoding="utf-8")
    monkeypatch.setattr("redpeft.demo.MESSAGES", tmp_path / "messages")
    Path("customers").mkdir()
    for name in ("shop", "bank"):
        shutil.copy("messages/train.jsonl", f"customers/{name}.jsonl")
    shutil.copytree(tiny_encoder_folder, "FacebookAI/roberta-base")
    shutil.copytree(tiny_t5_folder, "google-t5/t5-base")
    shutil.copytree(tiny_gpt2_folder, "openai-community/gpt2-medium")
    shutil.copytree(e2e_folder, "e2e-dataset")
    Path("label.txt").write_text("Zizzi is a pub.\n\nCotto is a pub.\n\n", encoding="utf-8")
    Path("pred.txt").write_text("Zizzi is a pub.\nA pub.\n", encoding="utf-8")
    for name in ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "smollm2"):
        shutil.copytree(tiny_decoder_folder, name)
        tiny_chat_tokenizer.save_pretrained(name)


RUN = [page for page in PAGES if re.search(r"^```\w+ run$", page.read_text(encoding="utf-8"), re.M)]


SLOW = {"e2e.md"}  # three times ten beams


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page_name(page), marks=[pytest.mark.slow] * (page.name in SLOW)) for page in RUN]
)
def test_snippets_run(page, workplace, monkeypatch):
    names: dict = {}
    left_out = 0
    for language, run, text in blocks(page, "bash", "python"):
        if run and language == "bash":
            run_commands(text, monkeypatch)
        elif run and TOO_OLD and ".add_adapter(RedConfig" in text:  # PEFT's own takes a name first
            left_out += 1
        elif run:
            exec(compile(text, page_name(page), "exec"), names)
    if left_out:
        pytest.skip(f"all blocks but {left_out} ran: {TOO_OLD}")
