"""Names that every logger takes.

MLflow takes letters, digits and ``_ - . /`` in a name, and Lightning's logger for it drops everything else. A second
call of a module, ``net.act#1``, would be one with ``net.act1`` there. Other loggers have rules of their own.
"""

import re
from hashlib import blake2b

_WORDS = {"#": "call", ":": "output", "/": "slash", " ": "space"}
# MLflow's own limit of a name.
_LONGEST = 250


def plain_name(tag: str) -> str:
    """The name of a tag in loggers that may not take all characters. Different tags have different names.

    A character other than letters, digits and ``_ - .`` becomes a word between spaces. So does every slash but the
    first: MLflow keeps names as paths, where one may not go through another. A name that is too long ends in a
    checksum.

    Example:
        >>> plain_name("layer_mean/net.act#1")
        'layer_mean/net.act call 1'
    """
    group, _, rest = tag.partition("/")
    name = f"{_spelt(group)}/{_spelt(rest)}" if group and rest else _spelt(tag)
    if len(name) <= _LONGEST:
        return name
    checksum = f" sum {blake2b(name.encode(), digest_size=16).hexdigest()}"
    return name[: _LONGEST - len(checksum)] + checksum


def _spelt(text: str) -> str:
    # A path may not be a dot or two, nor empty.
    if not text.strip("."):
        text = text.replace(".", "\0")
    return re.sub(r"[^a-zA-Z0-9_.-]", _word, text)


def _word(match: re.Match[str]) -> str:
    character = "." if match[0] == "\0" else match[0]
    return f" {_WORDS.get(character, f'u{ord(character):x}')} "
