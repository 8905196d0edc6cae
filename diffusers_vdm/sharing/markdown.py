"""Untrusted text in Markdown: names and option values are shown literally, never as markup.

ASCII characters that may be markup are written as character references (`&#42;` for an asterisk), which Markdown shows
as the character. (A backslash does the same, except in formulas and links that some renderers detect before they
parse.)
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from urllib.parse import quote

MAX_CHARACTERS = 200
_TOKEN = re.compile(r"hf_\w{10,}")
# an underscore within a word is not emphasis; a dot after www would start a link
_MARKUP = re.compile(r"(?<=www)\.|(?<![^\W_])_|_(?![^\W_])|[!\"#$&*:<>@\[\\\]^`{|}~]", re.IGNORECASE)


def one_line(value: object, limit: int = MAX_CHARACTERS) -> str:
    """The text of a value on one line, without control and format characters (right-to-left marks and the like).

    Anything like a Hub token is masked. Text longer than `limit` characters is cut with an ellipsis.
    """
    visible = "".join(" " if unicodedata.category(c)[0] == "C" or c.isspace() else c for c in str(value))
    text = _TOKEN.sub("hf_***", " ".join(visible.split()))
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def escaped(value: object) -> str:
    """A value as inline Markdown that shows its [`one_line`] text literally."""
    return _MARKUP.sub(lambda match: f"&#{ord(match.group())};", one_line(value))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain text; `None` is an empty cell."""
    cells = [["" if cell is None else escaped(cell) for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def literal(text: str) -> str:
    """A Python string literal, in double quotes if possible."""
    return repr(text) if set(text) & set("'\"") else f'"{repr(text)[1:-1]}"'


def fenced(code: str, language: str = "") -> str:
    """A fenced code block; the code may contain backticks."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def image(alternative: object, path: PurePath) -> str:
    """An image by its relative path, with alternative text."""
    return f"![{escaped(alternative)}]({quote(os.fsencode(path.as_posix()), safe='/')})"
