from __future__ import annotations

import json
import os

import pytest

from redpeft.errors import UserError
from redpeft.storage import (
    checkpoint_state,
    escapes_root,
    is_below,
    last_checkpoint,
    locked,
    new_folder,
    read_json,
    to_json,
    write_atomically,
)


def test_a_folder_has_one_writer_and_nothing_beside_it_is_touched(tmp_path):
    theirs = tmp_path / "new.partial"
    theirs.mkdir()
    (theirs / "notes").touch()
    (tmp_path / ".new.lock").touch()  # of a process that was killed: nobody holds it
    with new_folder(tmp_path / "new") as first:
        (first / "whole").touch()
        with pytest.raises(UserError, match=f"another process is writing {tmp_path}/new: wait for it, or choose"):
            new_folder(tmp_path / "new").__enter__()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="stops"), new_folder(tmp_path / "other"):
        raise ValueError("stops")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.partial"]
    assert (theirs / "notes").exists()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


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


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, '{"a": 1}')
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomically(path, '{"a": 2}')
    assert read_json(path) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("path", "escapes"), [("a/b", False), ("a/..b", False), ("a/../b", True), ("/a", True), ("a\0b", True)]
)
def test_paths_that_lead_out_of_their_folder(path, escapes):
    assert escapes_root(path) is escapes


def test_links_are_followed_before_a_path_counts_as_below_a_folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "inside").touch()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    assert is_below(tmp_path / "root" / "inside", tmp_path / "root")
    assert not is_below(tmp_path / "root" / "link", tmp_path / "root")


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint_state(tmp_path / "checkpoint-12") is None


def test_numbers_that_json_lacks_become_null():
    assert json.loads(to_json({"a": float("nan"), "b": {"c": float("inf")}, "d": 1.5})) == {
        "a": None, "b": {"c": None}, "d": 1.5,
    }  # fmt: skip
