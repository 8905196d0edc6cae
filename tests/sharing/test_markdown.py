"""sharing/markdown.py: text of others stays text."""

import ast
import re

from diffusers_vdm.sharing.markdown import escaped, fenced, literal, one_line, table
from tests.sharing.nasty_text import strangers


def test_escaped_text_has_no_character_that_means_something():
    for text in strangers(0):
        shown = escaped(text)
        assert not set(re.sub(r"&#\d+;", "", shown)) & set('!"#$&*:<>@[\\]^`{|}~\n'), text
        assert re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), shown) == one_line(text)
        assert table(["a", "b"], [[text, text]]).count("\n") == 2
        assert ast.literal_eval(literal(text)) == text and "\n" not in literal(text)
        fence = fenced(text).split("\n")[0]
        assert fence == fence[0] * len(fence) and fence not in text
        one_line(text).encode()
    assert one_line("x" * 300) == "x" * 199 + "…" and one_line("a\tb\n\nc ") == "a b c"
