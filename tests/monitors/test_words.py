import pytest
from markdown import markdown

from bnlightning.monitors.words import Mishaps, escaped, labelled, listed


def test_lists():
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert labelled("net.1#1", "ReLU") == "net.1#1 (ReLU)"


NAMES = [
    "a_b_c",
    "__act__",
    "*x*",
    "`x`",
    "[x](y)",
    "<b>x</b>",
    "a|b",
    "{x}",
    "$x$",
    "# x",
    "~~x~~",
    "&amp;",
    "\\x",
    "![x](y)",
]


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_it_stands(name):
    page = markdown(f"| a | b |\n|---|---|\n| {escaped(name)} | second |", extensions=["tables"])
    cells = page.replace("&lt;", "<").replace("&gt;", ">").replace("&#124;", "|").replace("&#126;", "~")
    assert f"<td>{name}</td>" in cells.replace("&amp;", "&")
    assert page.count("<td>") == 2


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("what {it} was.\nAnd more."), "ValueError: what {it} was. And more."),
        (ValueError(), "ValueError."),
        (Unspeakable(), "Unspeakable."),
        (ValueError("x" * 1000), f"ValueError: {'x' * 300}."),
    ],
)
def test_an_error_is_told_once_in_whole_sentences(error, words):
    mishaps = Mishaps("Monitor")
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            with mishaps.forgiven("draw"):
                raise error
    (message,) = [str(warning.message) for warning in caught]
    assert message == f"Monitor could not draw: {words} The training goes on without it."


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_is_not_forgiven(end):
    with pytest.raises(end), Mishaps().forgiven("draw"):
        raise end
