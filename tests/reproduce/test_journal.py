from __future__ import annotations

import errno
import json

import pytest

from redpeft.errors import RunError, UserError
from redpeft.reproduce.journal import Journal

SETTINGS = {"model": "a", "tokens": 5}
ENTRIES = [{"question": 0, "answers": ["ä\n"]}, {"question": 1, "answers": []}]


def test_entries_are_there_for_the_next_call(tmp_path):
    path = tmp_path / "new" / "out.journal"
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


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*out.journal: "):
        Journal(tmp_path / "file" / "out.journal", SETTINGS).append(ENTRIES)


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
