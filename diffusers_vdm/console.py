"""Console output for terminals and files whose encoding lacks some characters."""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLER = "diffusers_vdm.transliterate"
# non-ASCII symbols in the commands' output; Greek letters are spelled out and accents are dropped by rule
_NAMES = {
    "ε": "eps", "∞": "inf", "±": "+/-", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "→": "->", "←": "<-",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "∝": "~", "√": "sqrt", "∫": "integral", "∂": "d", "∈": "in", "‖": "||",
    "²": "^2", "³": "^3", "⁴": "^4", "½": "1/2", "¼": "1/4", "¾": "3/4", "°": " degrees", "§": "section ", "…": "...",
    "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip


def tolerate_any_encoding() -> None:
    """Makes stdout and stderr print characters that they cannot encode in ASCII, such as `γ ± ε` as `gamma +/- eps`.

    Every command calls it first. With UTF-8 the output is unchanged.
    """
    codecs.register_error(_HANDLER, _transliterate)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a replaced stream may lack it
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


@contextmanager
def errors_in_one_line(program: str, *kinds: type[Exception]) -> Iterator[None]:
    """Exits with a message of one line, and no traceback, for errors of `kinds`, by default in arguments and files."""
    caught = kinds or (ValueError, TypeError, OSError)
    try:
        yield
    except caught as error:
        raise SystemExit(f"{program}: {error}") from error


def _transliterate(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if character in _NAMES:
        return _NAMES[character]
    if unicodedata.combining(character):  # the hat of ε̂
        return ""
    greek = re.fullmatch(r"GREEK (?:SMALL|CAPITAL) LETTER (\w+)( WITH MACRON)?", unicodedata.name(character, ""))
    if greek:
        return greek[1].lower() + ("-bar" if greek[2] else "")
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return plain or "?"
