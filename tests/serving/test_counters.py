"""Counts by adapter, from the processes that count to the one that is asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from redpeft.serving import counters
from redpeft.serving.counters import FOLDER, OF_SERVERS, Counters, read_counts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(counters, "DELAY", 1000)  # a timer would write into the folder of a later test
    return tmp_path


def test_counts_of_all_processes_are_added(monkeypatch):
    worker, server = Counters(), Counters()
    for pid, one in ((1, worker), (2, server)):
        one.add("a", requests=1, prompt_tokens=7)
        one.add("a", requests=1)
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        one.write()
    worker.add("b", adapter_loads=1)
    worker.write()  # as process 2: in place of what the other has written
    assert read_counts() == {"a": {"requests": 4, "prompt_tokens": 14}, "b": {"adapter_loads": 1}}


def test_what_is_counted_is_written_a_moment_later(monkeypatch, folder):
    monkeypatch.setattr(counters, "DELAY", 0.05)
    one = Counters()
    for _ in range(2):  # again, after it was written
        for _ in range(100):
            one.add("a", requests=1)
        expected = one._counts["a"]["requests"]
        end = time.monotonic() + 20
        while read_counts() != {"a": {"requests": expected}}:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert [file.name for file in folder.iterdir()] == [f"redpeft-{os.getpid()}.json"]


def test_the_timer_and_who_asks_can_write_at_once(monkeypatch):
    def write_slowly(path, text, encoding):
        with path.open("w", encoding=encoding) as file:
            file.write(text[:5])
            file.flush()
            time.sleep(0.005)
            file.write(text[5:])

    monkeypatch.setattr(Path, "write_text", write_slowly)
    one = Counters()
    one.add("a", requests=1)
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(one.write) for _ in range(40)]
        while not all(each.done() for each in written):
            assert read_counts() in ({}, {"a": {"requests": 1}})  # whole at any moment


def test_the_adapter_that_was_counted_longest_ago_is_forgotten():
    one = Counters(kept=2)
    for name in ("a", "b", "a", "c"):
        one.add(name, requests=1)
    one.write()
    assert read_counts() == {"a": {"requests": 2}, "c": {"requests": 1}}


def test_without_a_server_nothing_is_written(monkeypatch, folder):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setattr(counters, "Timer", None)
    one = Counters()
    one.add("a", requests=1)
    one.write()
    assert list(folder.iterdir()) == []
    assert read_counts() == {}


def test_several_api_servers_share_the_folder_that_vllm_makes_for_them(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv(OF_SERVERS, str(tmp_path))
    one = Counters()
    one.add("a", requests=1)
    one.write()
    (tmp_path / "counter_7.db").touch()  # vLLM's own
    assert read_counts() == {"a": {"requests": 1}}


def test_a_folder_that_is_gone_stops_nobody(monkeypatch, folder):
    monkeypatch.setenv(FOLDER, str(folder / "gone"))
    one = Counters()
    one.add("a", requests=1)
    one.write()
    assert read_counts() == {}


CHILDREN = """
import multiprocessing, os
from redpeft.serving.counters import FOLDER, share
def child(queue):
    share()
    queue.put(os.environ[FOLDER])
if __name__ == "__main__":
    share()
    share()
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=child, args=(queue,))
    process.start()
    print(os.environ[FOLDER], queue.get(), os.path.isdir(os.environ[FOLDER]))
    process.join()
"""


def test_a_server_has_one_folder_that_goes_with_it(tmp_path):
    """Of its own, also where the environment names another server's: that of the process that started it."""
    script = tmp_path / "server.py"
    script.write_text(CHILDREN)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    made, of_child, was_there = run.stdout.split()
    assert made == of_child != str(tmp_path)
    assert was_there == "True"
    assert not os.path.exists(made)
