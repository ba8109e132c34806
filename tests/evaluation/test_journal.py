from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from redpeft.errors import RunError, UserError
from redpeft.evaluation.journal import Journal, journal_of

LOCKING = """
import sys
from pathlib import Path
from redpeft.errors import UserError
from redpeft.evaluation.journal import journal_of
try:
    with journal_of(Path(sys.argv[1]), {}):
        print("opened")
except UserError as error:
    print(error)
"""
SETTINGS = {"model": "a", "tokens": 5}
ENTRIES = [{"question": 0, "answers": ["ä\n"]}, {"question": 1, "answers": []}]


def test_entries_are_there_for_the_next_call(tmp_path):
    path = tmp_path / "out.journal"
    journal = Journal(path, SETTINGS)
    assert journal.entries == []
    assert not path.exists()
    journal.append(ENTRIES[:1])
    journal.append(ENTRIES[1:])
    assert journal.entries == ENTRIES == Journal(path, SETTINGS).entries
    assert len(path.read_bytes().splitlines()) == 3


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "out.journal"
    Journal(path, SETTINGS).append(ENTRIES)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path, SETTINGS)
        kept = max(0, sum(end <= cut for end in ends) - 1)
        assert journal.entries == ENTRIES[:kept]
        journal.append(ENTRIES[kept:])
        assert path.read_bytes() == whole


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "out.journal"
    Journal(path, SETTINGS).append(ENTRIES)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"out.journal is of work with other settings \(tokens, more\): choose"):
        Journal(path, {"model": "a", "tokens": 6, "more": True})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"question": 1}\n', '{"settings": {}}\n{"a"\n{}\n', "3\n"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "out.journal"
    path.write_text(text)
    with pytest.raises(UserError, match=r"out.journal is damaged or no journal of unfinished work: remove it"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


def test_a_journal_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*out.journal: No such file or directory"):
        Journal(tmp_path / "nowhere" / "out.journal", SETTINGS).append(ENTRIES)
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write into .*file: "),
        journal_of(tmp_path / "file" / "out.json", SETTINGS),
    ):
        pytest.fail("opened")


def test_one_process_at_a_time(tmp_path):
    out = tmp_path / "new" / "out.json"
    with journal_of(out, SETTINGS) as journal:
        call = [sys.executable, "-c", LOCKING, str(out)]
        assert "another process is at work in" in subprocess.run(call, capture_output=True, text=True).stdout
        with journal_of(out.with_name("other.json"), SETTINGS):
            pass
        journal.append(ENTRIES)
    assert [path.name for path in out.parent.iterdir()] == ["out.json.journal"]


def test_nothing_is_left_where_nothing_was_done(tmp_path):
    with pytest.raises(ZeroDivisionError), journal_of(tmp_path / "new" / "out.json", SETTINGS):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "out.journal", SETTINGS)
    journal.append(ENTRIES[:1])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"the disk of .* is full"):
            journal.append(ENTRIES[1:])
    assert journal.entries == ENTRIES[:1]
    journal.append(ENTRIES[1:])  # over what was cut short
    lines = (tmp_path / "out.journal").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == ENTRIES
