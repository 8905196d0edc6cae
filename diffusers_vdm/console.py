"""Output of the commands on terminals and in files that cannot hold every character."""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata

_HANDLER = "diffusers_vdm.transliterate"
# what the commands print and ASCII lacks, beside Greek, which has names, and letters with accents, which lose them
_NAMES = {
    "ε": "eps", "∞": "inf", "±": "+/-", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "→": "->", "←": "<-",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "∝": "~", "√": "sqrt", "∫": "integral", "∂": "d", "∈": "in", "‖": "||",
    "²": "^2", "³": "^3", "⁴": "^4", "½": "1/2", "¼": "1/4", "¾": "3/4", "°": " degrees", "§": "section ", "…": "...",
    "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip


def tolerate_any_encoding() -> None:
    """Prints what standard output and standard error cannot encode in ASCII, as `γ ± ε` by `gamma +/- eps`.

    A command calls it first. Where the encoding is UTF-8 nothing is lost.
    """
    codecs.register_error(_HANDLER, _transliterate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where somebody else has put an object of another kind there
            stream.reconfigure(errors=_HANDLER)


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
