"""The studio's command and its server; test_browser.py shows the page in a browser."""

from __future__ import annotations

import os
import socket
import sys

import pytest
import torch

from helpers.language_models import write_red, write_talker
from redpeft import cli
from redpeft.errors import UserError

gr = pytest.importorskip("gradio", reason="needs the extra [studio]")


@pytest.fixture(scope="module")
def folder(tiny_decoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    write_red(folder / "formal", write_talker(folder / "talker", tiny_decoder_folder), seed=1)
    return folder


@pytest.fixture
def studio(capsys, folder):
    """Run the command: its exit code and what it says on standard error."""

    def run(*arguments, folder=folder):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["studio", str(folder), *arguments])
        out, said = capsys.readouterr()
        assert out == ""
        return exit_.value.code, said

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "other machines can reach 0.0.0.0: set a name and a password, REDPEFT_STUDIO_AUTH="),
        (["--host", "::"], "other machines can reach ::: set a name and a password"),
        (["--host", "studio.example"], "other machines can reach studio.example: set a name and a password"),
        (["--auth", "ada"], "a name and a password are written as USER:PASSWORD"),
        (["--auth", ":secret"], "a name and a password are written as USER:PASSWORD"),
        (["--base", "nowhere/at/all/base"], "no such model folder: nowhere/at/all/base"),
        (["--host", "192.0.2.1", "--auth", "ada:secret"], "cannot listen at a port of 7860 to 7959 of 192.0.2.1: "),
    ],
)
def test_what_cannot_be_shown_is_one_line(studio, arguments, message):
    code, said = studio(*arguments)
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith(f"redpeft: {message}")


def test_a_taken_port_is_one_line_and_the_next_free_one_is_said(studio, monkeypatch, folder):
    from redpeft.studio import web_page

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = studio("--port", str(port))
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith(f"redpeft: cannot listen at port {port} of 127.0.0.1: Address already in use; choose")
        monkeypatch.setattr(web_page, "PORTS", range(port, port + 20))
        monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: (_ for _ in ()).throw(KeyboardInterrupt))
        code, said = studio()
        assert code == 0
        first, second, _ = said.split("\n")
        assert first.startswith(f"port {port} is taken: ")
        assert second.startswith(f"The studio of {folder}: http://127.0.0.1:{first.split()[4]} (Ctrl-C ends)")


def test_without_gradio_it_is_one_line(studio, monkeypatch):
    monkeypatch.delitem(sys.modules, "redpeft.studio.web_page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert studio() == (2, "redpeft: the studio needs gradio: pip install redpeft[studio]\n")


def test_variables_of_gradio_are_not_read(monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.delitem(sys.modules, "redpeft.studio.web_page", raising=False)
    import redpeft.studio.web_page  # noqa: F401

    found = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_") and "TEMP" not in name}
    assert found == {"GRADIO_ANALYTICS_ENABLED": "False"}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("no <b>such</b> adapter"), "no &lt;b&gt;such&lt;/b&gt; adapter"),
        (MemoryError(), "there is not enough memory: choose fewer adapters"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory: choose fewer"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is not enough memory: choose fewer adapters"),
        (
            ZeroDivisionError("division by zero\nand more"),
            "an error of the studio itself, ZeroDivisionError: division by",
        ),
    ],
)
def test_errors_are_sentences_on_the_page(error, sentence, capsys):
    from redpeft.studio.web_page import sentences

    with pytest.raises(gr.Error) as shown, sentences():
        raise error
    assert shown.value.message.startswith(sentence)
    assert "\n" not in shown.value.message
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)
