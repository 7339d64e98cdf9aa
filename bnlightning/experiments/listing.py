"""The experiments that there are, as their own files describe them.

An experiment is one YAML file below ``conf/experiment``. Its first comment says what it shows: ``--help``, the table in
the documentation and the tests read it there. Experiments on MNIST begin that comment with a line ``Data: MNIST``::

    # @package _global_
    # Data: MNIST
    # A perceptron with batch normalisation on every layer.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from bnlightning._conf import CONF_DIR

_MARKER = "Data: MNIST"
_WIDTH = 120


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file says of it.

    Args:
        name: As in ``+experiment=name``.
        sentence: What it shows, without the full stop; empty if the file does not say it.
        needs_mnist: Whether it trains on MNIST, which has to be downloaded.
    """

    name: str
    sentence: str
    needs_mnist: bool


def find_experiments(directories: Iterable[Path] = (CONF_DIR,)) -> list[Experiment]:
    """The experiments of some configuration directories by name; of one name the first.

    Example:
        >>> [experiment.name for experiment in find_experiments() if not experiment.needs_mnist][:2]
        ['moving_average', 'relu']
    """
    found: dict[str, Experiment] = {}
    for group in (directory / "experiment" for directory in directories):
        for file in group.glob("*.yaml"):
            found.setdefault(file.stem, _described(file.stem, file.read_text(encoding="utf-8")))
    return [found[name] for name in sorted(found)]


def list_for_help(which: str) -> str:
    """The lines of ``--help``, also for those that the command line's ``--config-dir`` adds.

    Args:
        which: ``mnist`` for those that need it, or ``generated`` for the others.
    """
    experiments = find_experiments(_searched())
    width = max(len(experiment.name) for experiment in experiments)
    lines = []
    for experiment in experiments:
        if experiment.needs_mnist == (which == "mnist"):
            beginning = f"  +experiment={experiment.name:<{width}}  "
            lines += textwrap.wrap(
                experiment.sentence or "(its file does not say what it shows)",
                _WIDTH,
                initial_indent=beginning,
                subsequent_indent=" " * len(beginning),
            )
    # Hydra takes a dollar for one of its placeholders.
    return "\n".join(lines).replace("$", "$$")


def _described(name: str, text: str) -> Experiment:
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = [line.lstrip("#").strip() for line in comment]
    sentence = " ".join(line for line in lines if line and line != _MARKER and not line.startswith("@package"))
    return Experiment(name, sentence.removesuffix("."), _MARKER in lines)


def _searched() -> list[Path]:
    """The directories in which the running command finds its configuration."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    return [Path(source.path) for source in sources if source.scheme() == "file"]
