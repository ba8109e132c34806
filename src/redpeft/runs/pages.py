"""A page of headings, paragraphs, tables and pictures, written as Markdown and as HTML."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Link(NamedTuple):
    """A text that leads to a file or folder, by its path from the page."""

    text: str
    target: str


Inline = Sequence[str | Link]
"""Texts and links, one behind the other."""


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
    """A table: the names of its columns, and rows of cells. Of numbers all but the first column stand at the right."""

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
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.9em }
th, td { padding: 0.3em 0.7em; border-bottom: 1px solid #8886; text-align: left }
.numbers :is(th, td):not(:first-child) { text-align: right; white-space: nowrap }
img { max-width: 100% }
pre { background: #8882; padding: 0.7em; overflow-x: auto }"""


def plain(content: Inline) -> str:
    """What a cell says, for a terminal."""
    return "".join(part if isinstance(part, str) else part.text for part in content)


def number(value: float | None, digits: int, deviation: float | None = None) -> str:
    """A figure as a table shows it, with its standard deviation if there is one."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def relative(path: Path, folder: Path) -> str:
    """Where `path` lies, seen from a page in `folder`."""
    return Path(os.path.relpath(path, folder)).as_posix()


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file; pictures and links lead to files beside it."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}\n'
        "</body>\n</html>\n"
    )


def _inline(content: Inline, text: Callable[[str], str], link: Callable[[str, str], str]) -> str:
    return "".join(link(part.text, part.target) if isinstance(part, Link) else text(part) for part in content)


def _markdown(block: Block) -> str:
    def show(content: Inline) -> str:
        return _inline(content, lambda text: text.replace("|", "\\|"), lambda text, target: f"[{text}](<{target}>)")

    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return show(block.content)
        case Code():
            return f"```text\n{block.text}\n```"
        case Picture():
            return f"![{block.text}](<{block.target}>)"
        case Grid():
            line = ["---", *["---:" if block.numbers else "---"] * (len(block.head) - 1)]
            rows = [block.head, line, *([show(cell) for cell in row] for row in block.rows)]
            return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _html(block: Block) -> str:
    def show(content: Inline) -> str:
        return _inline(
            content, html.escape, lambda text, target: f'<a href="{html.escape(target)}">{html.escape(text)}</a>'
        )

    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{show(block.content)}</p>"
        case Code():
            return f"<pre>{html.escape(block.text)}</pre>"
        case Picture():
            return f'<p><img src="{html.escape(block.target)}" alt="{html.escape(block.text)}"></p>'
        case Grid():
            head = "".join(f"<th>{html.escape(name)}</th>" for name in block.head)
            rows = ("<tr>" + "".join(f"<td>{show(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
            kind = ' class="numbers"' if block.numbers else ""
            return f'<div class="wide"><table{kind}>\n<tr>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"
