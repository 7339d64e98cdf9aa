"""From the roles of Sphinx in docstrings to Markdown, which mkdocstrings reads: links, and formulas as MathML."""

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc|obj):`(~?)([\w.]+)`")
# griffe knows the section under its other name.
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_FORMULA = re.compile(r":math:`([^`]+)`")
# A formula of its own: the directive and the indented lines behind it.
_DISPLAY = re.compile(r"^( *)\.\. math::\n+((?:\1 +.*(?:\n|\Z))+)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Replace roles, formulas and the name of the section of examples.

    Args:
        text: A docstring.
    """
    text = _EXAMPLE.sub(r"\1Examples:", text)
    text = _DISPLAY.sub(_display, text)
    text = _FORMULA.sub(_inline, text)
    return _ROLE.sub(_link, text)


def _link(match: re.Match[str]) -> str:
    path = match[2]
    name = path.rpartition(".")[2] if match[1] or path.startswith("bnlightning.") else path
    # Optional: what has no page of its own stays a name.
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _display(match: re.Match[str]) -> str:
    formula = " ".join(textwrap.dedent(match[2]).split())
    return f"{match[1]}{convert(formula, display='block')}\n\n"


def _inline(match: re.Match[str]) -> str:
    formula = " ".join(match[1].split())
    # The span keeps a formula at the beginning of a line within its paragraph.
    return f"<span>{convert(formula)}</span>"
