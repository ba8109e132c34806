"""What `redpeft score e2e` reads: a file of predictions and a file of references, in the layouts in which they are
published."""

from __future__ import annotations

from pathlib import Path

from redpeft.errors import UserError
from redpeft.tasks import columns as cols
from redpeft.tasks.e2e import E2ETask
from redpeft.tasks.e2e_metrics import require_scorers, score
from redpeft.tasks.files import READERS, existing, extension, read_file, read_text


def score_files(references: str | Path, predictions: str | Path) -> dict[str, float | None]:
    """The scores of `redpeft.tasks.e2e_metrics.score` of a file of predictions, one a group of references, in order.

    Raises:
        UserError: a file that is missing, empty or not UTF-8, an empty line, or files of different lengths.
    """
    require_scorers()
    texts, groups = read_predictions(predictions), read_references(references)
    if len(texts) != len(groups):
        raise UserError(
            f"{predictions} holds {len(texts)} predictions and {references} the references of {len(groups)} meaning "
            "representations: one prediction for each is needed, in their order"
        )
    return score(texts, groups)


def read_predictions(path: str | Path) -> list[str]:
    """One text a line, or the texts of rows as `redpeft predict` writes them (.jsonl), which may be empty."""
    if extension(existing(path)) not in READERS:
        return _lines(path)
    rows = read_file(path)
    cols.require_columns(rows, ["text"])
    texts = cols.values(rows, "text")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{cols.where(rows, index)}: column 'text' holds {text!r}, which is not text")
    return texts


def read_references(path: str | Path) -> list[list[str]]:
    """Groups of lines with an empty line after each, or a table of meaning representations and references, where the
    references of one meaning representation make a group, in the order of its first row."""
    if extension(existing(path)) in READERS:
        rows = read_file(path)
        task = E2ETask(E2ETask.find_columns(rows))
        task.check(rows)
        return task.references(rows)
    text = "\n".join(_lines(path, separators=True))
    return [group.split("\n") for group in text.split("\n\n")]


def _lines(path: str | Path, separators: bool = False) -> list[str]:
    """A file's lines without space around them. An empty one is an error, or with `separators` the second of two."""
    text = read_text(existing(path))
    if not text.strip():
        raise UserError(f"{path} is empty: it holds no rows")
    lines = [line.strip() for line in (text.rstrip() if separators else text.removesuffix("\n")).split("\n")]
    for number, (before, line) in enumerate(zip(["", *lines], lines, strict=False), start=1):
        if not line and not (separators and before):
            raise UserError(f"{path}, line {number}: the line is empty")
    return lines
