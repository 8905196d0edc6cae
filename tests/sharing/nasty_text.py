"""Text that would mean something in Markdown, YAML, HTML, Python or a shell."""

import random
import re

NASTY = [
    "a`b``c",
    "```\n# heading\n```",
    "x | y \\| z",
    "a\n---\nlicense: evil\n---\n# title",
    "<script>alert(1)</script>",
    "<!-- comment",
    "[text](javascript:alert(1)) ![x](https://evil.example/x.png)",
    "*bold* __bold__ _it_ ~~gone~~ $$x$$ \\\\(x\\\\)",
    "www.evil.example https://evil.example me@evil.example",
    "key: value # comment",
    "- item\n- !!python/object:os.system",
    "'; import os; os.system('x') #",
    '"); raise SystemExit  # ',
    "&lt;b&gt; &#42;",
    "{{ 7 * 7 }} {% x %} %s ${HOME} $(id)",
    "\u202eevil\u200f \ufeff\x00\x1b[31m \u2028 \x85 \ud800",
    "1e9",
    "~",
    "null",
    "---",
    "é ü 模型 🙂",
]


def strangers(number: int) -> list[str]:
    """Nasty strings, and mixtures of their parts."""
    source = random.Random(number)
    pieces = [piece for text in NASTY for piece in re.split(r"(?<=\W)", text)]
    return [*NASTY, *("".join(source.choices(pieces, k=source.randint(1, 12))) for _ in range(300))]
