"""A page of headings, paragraphs, tables and pictures: written as Markdown, and from that as HTML.

Its tables can be shown on a terminal too.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from markdown_it import MarkdownIt
from rich.table import Table


class Link(NamedTuple):
    """A text that links to a file or folder, by its path from the page."""

    text: str
    target: str


Inline = Sequence[str | Link]
"""Texts and links, one after the other."""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    content: Inline


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Grid:
    """A table: the names of its columns, and rows of cells. `numbers`: all but the first column are aligned right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Inline]]
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    target: str
    text: str


Block = Heading | Paragraph | Code | Grid | Picture

STYLE = """\
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.9em }
th, td { padding: 0.3em 0.7em; border-bottom: 1px solid #8886; text-align: left }
td[style*=right] { white-space: nowrap }
img { max-width: 100% }
pre { background: #8882; padding: 0.7em; overflow-x: auto }"""


def plain(content: Inline) -> str:
    """The text of a cell, for a terminal."""
    return "".join(part if isinstance(part, str) else part.text for part in content)


def to_table(grid: Grid, title: str | None = None) -> Table:
    """A table for a terminal."""
    table = Table(title=title)
    for index, name in enumerate(grid.head):
        table.add_column(name, justify="right" if grid.numbers and index else "left")
    for row in grid.rows:
        table.add_row(*map(plain, row))
    return table


def number(value: float | None, digits: int, deviation: float | None = None) -> str:
    """A figure as a table shows it, with its standard deviation if there is one."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def relative(path: Path, folder: Path) -> str:
    """The path of a link from a page in `folder`."""
    return Path(os.path.relpath(path, folder)).as_posix()


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown, with tables as GitHub has them."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file; pictures and links lead to files beside it."""
    body = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table").render(to_markdown(blocks))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}'
        "</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped(block.text)}"
        case Paragraph():
            return _inline(block.content)
        case Code():
            return f"```text\n{block.text}\n```"
        case Picture():
            return f"!{_link(Link(block.text, block.target))}"
        case Grid():
            line = ["---", *["---:" if block.numbers else "---"] * (len(block.head) - 1)]
            rows = [map(_escaped, block.head), line, *(map(_inline, row) for row in block.rows)]
            return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _inline(content: Inline) -> str:
    return "".join(_link(part) if isinstance(part, Link) else _escaped(part) for part in content)


def _link(link: Link) -> str:
    target = re.sub("[%#?]", lambda found: quote(found[0]), link.target)  # a path, and no part of a URL
    return f"[{_escaped(link.text)}](<{_escaped(target)}>)"


def _escaped(text: str) -> str:
    """Text on one line in which Markdown finds no markup. An underscore within a word is not markup."""
    return re.sub(r"[\\`*\[\]<>|]|&(?=#?\w+;)|(?<!\w)_|_(?!\w)", r"\\\g<0>", re.sub(r"\s*\n\s*", " ", text))
