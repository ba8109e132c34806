"""`redpeft serve` on one packed file."""

from __future__ import annotations

import os
import shutil

import pytest

from redpeft.adapters import pack_adapters

from .server import Server

pytestmark = pytest.mark.serving


@pytest.fixture
def pack(adapters, tmp_path):
    """Write the pack anew, with these adapters by these names, and put it in the old one's place."""

    def write(**numbers):
        shutil.rmtree(tmp_path / "packed", ignore_errors=True)
        for name, number in numbers.items():
            shutil.copytree(adapters[number], tmp_path / "packed" / name)
        pack_adapters(tmp_path / "packed", tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "all.safetensors")
        return tmp_path / "all.safetensors"

    return write


def test_a_pack_is_served_by_name_and_answers_anew_when_it_is_replaced(
    base, pack, adapters, prompts, reference, tmp_path
):
    from openai import NotFoundError

    server = Server(base, pack(one=0, two=1, three=2), tmp_path / "log")
    prompt = prompts[2] * 2  # blocks of the prefix cache
    try:
        assert server.wait().models() == ["base", "one", "three", "two"]
        for name, number in (("one", 0), ("two", 1), ("three", 2)):
            reference.check([server.ask(name, prompt)], [prompt], [adapters[number]])
        pack(one=3, two=1, four=4)
        assert server.models() == ["base", "four", "one", "two"]
        for name, number in (("one", 3), ("two", 1), ("four", 4)):
            for _ in range(2):
                reference.check([server.ask(name, prompt)], [prompt], [adapters[number]])
        with pytest.raises(NotFoundError):
            server.ask("three", prompt)
    finally:
        server.stop()
