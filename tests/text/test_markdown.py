"""User text in Markdown, read back by another implementation of GitHub's dialect."""

import random
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt

from kd_hf.text import markdown as md

ALPHABET = [
    "`",
    "``",
    "|",
    "\\",
    "*",
    "_",
    "[",
    "](",
    "<b>",
    "</details>",
    "&lt;",
    "#",
    "---",
    "~~",
    "$",
    "é",
    "a",
    " ",
    "\n",
]
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def texts(count=200):
    """Random unpleasant texts, and as people would see them: on one line."""
    draw = random.Random(0)
    found = ("".join(draw.choices(ALPHABET, k=draw.randint(1, 8))) + "z" for _ in range(count))
    return [(text, " ".join(text.split())) for text in found]


def shown(tokens):
    """(the text of inline tokens, the kinds of their children)."""
    children = [child for token in tokens for child in token.children or ()]
    return "".join(child.content for child in children), {child.type for child in children}


def test_plain_text_is_shown_as_written():
    for text, line in texts():
        content, kinds = shown(PARSER.parse("x " + md.plain(text)))
        assert (content, kinds - {"text_special"}) == (f"x {line}", {"text"}), text


def test_code_is_shown_as_written():
    for text, line in texts():
        (inline,) = [token for token in PARSER.parse("x " + md.code(text)) if token.type == "inline"]
        spans = [child.content for child in inline.children if child.type == "code_inline"]
        assert spans == [line], text
    assert md.code(" \n") == ""


def test_tables_keep_their_cells():
    rows = [["head", "other"], *([md.plain(text), md.code(text)] for text, _ in texts())]
    tokens = PARSER.parse("\n".join(md.table(rows)))
    cells = [token for before, token in pairwise(tokens) if before.type == "td_open"]
    found = [shown([cell])[0] for cell in cells]
    assert found == [line for _, line in texts() for _ in range(2)]
    assert len([token for token in tokens if token.type == "tr_open"]) == len(rows)


def test_numbers_are_to_the_right():
    assert md.table([["a", "b", "c"], ["1", "2", "3"]], left=2)[1] == "| --- | --- | ---: |"


@pytest.mark.parametrize("text", ["plain\n", "```\ninside\n```", "````", "</details>\n---"])
def test_fences_hold_anything(text):
    tokens = PARSER.parse("\n".join([*md.fenced(text, "yaml"), "", "after"]))
    assert [token.type for token in tokens][:2] == ["fence", "paragraph_open"]
    assert tokens[0].content.rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://example.org/a?b=c#d", "https://example.org/a?b=c#d"),
        ("https://example.org/a) [b](javascript:", "https://example.org/a%29%20%5Bb%5D%28javascript:"),
    ],
)
def test_links_end_where_they_should(url, address):
    (inline,) = [token for token in PARSER.parse(md.link("a ] b", url)) if token.type == "inline"]
    assert inline.children[0].attrs["href"] == address
    assert shown([inline])[0] == "a ] b"
