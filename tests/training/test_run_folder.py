from __future__ import annotations

import os
import subprocess
import sys

import pytest

from redpeft.errors import UserError
from redpeft.runs.runner import run_recipe
from redpeft.training.run_folder import locked
from redpeft.training.train import train

HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Another process that holds the lock of a folder until it is killed: call it with the folder."""
    started = []

    def hold(folder):
        folder.mkdir(exist_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], **pipes))
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_until_the_first_is_gone(other_process, make_recipe, tmp_path):
    folder = tmp_path / "run"
    first = other_process(folder)
    with pytest.raises(UserError, match=r"^another process is at work in .*run: wait, or choose another folder$"):
        train(make_recipe(), folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    first.kill()  # no time to tidy up: the file stays, and locks nobody out
    first.wait()
    assert (folder / ".lock").exists()
    assert train(make_recipe(max_steps=1), folder)["steps"] == 1
    assert not (folder / ".lock").exists()


def test_several_seeds_are_locked_as_one(other_process, make_recipe, tmp_path):
    other_process(tmp_path / "seeds")
    with pytest.raises(UserError, match="another process is at work in"):
        run_recipe(make_recipe(seeds=[1, 2]), tmp_path / "seeds")
    assert [path.name for path in (tmp_path / "seeds").iterdir()] == [".lock"]


def test_the_processes_of_one_run_share_the_lock(monkeypatch, tmp_path):
    with locked(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError), locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write into .*run: Permission denied"), locked(tmp_path / "run"):
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"cannot write into .*run: "), locked(tmp_path / "run"):
        pass


def test_no_run_within_a_run(make_recipe, tmp_path):
    train(make_recipe(max_steps=1), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=r"seed-1 would lie inside the run folder .*run: choose another"):
        run_recipe(make_recipe(max_steps=1, seeds=[1, 2]), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
