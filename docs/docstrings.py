"""Docstrings in the format of Hugging Face, as Markdown for the API page; `mkdocs.yml` names this extension of griffe.

griffe's own Google parser reads each entry as one argument. Ours may describe several arguments in one entry.
"""

import re
from pathlib import Path

from griffe import Extension

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):(.*)")
ENTRY = re.compile(r"    (\S[^(:]*?)(?= \(|:)")
INIT = Path(__file__).parents[1] / "diffusers_vdm" / "__init__.py"
PUBLIC = dict(re.findall(r'"(\w+)": "([\w.]+)"', INIT.read_text(encoding="utf-8")))


def link(match: re.Match) -> str:
    """[`Name`] as a link to its place on the page if `Name` is public, else as code."""
    name, _, member = match[1].partition(".")
    target = f"diffusers_vdm.{PUBLIC[name]}.{match[1]}" if name in PUBLIC else ""
    return f"[`{match[1]}`][{target}]" if target and not member else f"`{match[1]}`"


def to_markdown(text: str) -> str:
    """The sections of a docstring as headings and lists; everything else as it is."""
    lines, in_list = [], False
    for line in text.splitlines():
        section = SECTION.fullmatch(line)
        if section:
            in_list = not section[2].strip()
            lines += ["", f"**{section[1]}:**{section[2]}", *[""] * in_list]
        elif in_list and line.startswith("    "):
            lines.append(ENTRY.sub(r"- **\1**", line, count=1) if line[4] != " " else line[4:])
        else:
            in_list = in_list and not line
            lines.append(line)
    return re.sub(r"\[`([\w.]+)`\](?!\()", link, "\n".join(lines))


class HuggingFaceDocstrings(Extension):
    """Rewrites every docstring that griffe finds."""

    def on_instance(self, *, obj, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
