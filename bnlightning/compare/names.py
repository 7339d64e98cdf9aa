"""The grammar of tags and directories, for the code that writes them and the code that reads them.

This module imports nothing of the package, so that every room can use it.

TensorBoard sorts groups by name. What matters most therefore begins with a letter that sorts first:

| tag | holds |
|---|---|
| ``diagnosis/...`` | what is wrong, in words |
| ``health/<name>`` | one number for the whole network |
| ``layer_<statistic>/<path>`` | one number or histogram for a watched layer |
| ``norm_<statistic>/<path>`` | one number for a batch norm layer |
| ``param_<statistic>/<path>`` | one number or histogram for a parameter |
| ``train/<name>``, ``val/<name>``, ``test/<name>`` | what the LightningModule itself logs |

An evaluation has its phase before the statistic: ``layer_val_dead/net.act1``, ``health/val_dead``. A second monitor of
the same class in a Trainer has ``#1`` behind its numbers for the whole network: ``health/dead#1``.

A run's directory is named by its variant and by whatever else is swept: ``custom_seed-2``,
``none_depth-10_learning_rate-0.1``. :func:`run_directory` composes such a name, :func:`parse_run_directory` takes it
apart. People read the same as "batch norm (ours)" and "no norm, depth 10, learning rate 0.1".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

TRAIN, VAL, TEST = "train", "val", "test"
"""The phases: training, validation and test."""

KINDS = ("layer", "norm", "param")
"""What a number belongs to: a watched layer, a batch norm layer, or a parameter."""

TRAIN_LOSS, VAL_LOSS = "train/loss", "val/loss"
"""The losses that a LightningModule logs. ``val/loss`` is what runs are compared by if nobody says anything else."""

PREDICTION = "val/prediction"
"""The tag of :class:`~bnlightning.PredictionMonitor`'s points."""

FIRST_NONFINITE_LAYER = "health/first_nonfinite_layer"
"""The tag of a text: the path of the first layer that put out NaN or infinity."""

NOTE = "test/note"
"""The tag of a text that a LightningModule's test writes for the comparison."""

PUBLISHED = "published"
"""The group of the values that somebody else published: ``published/<metric>``."""

COMPARISON = "comparison"
"""The name of a comparison's own TensorBoard run, and the tag of its figure there."""

COMPARISON_SUFFIX = ".comparison"
"""How the name of a comparison's event file ends, so that its directory is not taken for a run."""

COMPARISON_FIGURE, COMPARISON_TABLE = "comparison.png", "comparison.csv"
"""The figure of a comparison, and its table for programs."""

COMPARISON_PAGE, COMPARISON_CURVE = "comparison.md", "comparison_curve.csv"
"""The tables and notes of a comparison for people, and its table of a published curve."""

EVENT_FILES = "events.out.tfevents.*"
"""The pattern of TensorBoard's event files."""

HPARAMS = "hparams.yaml"
"""The file with a run's hyperparameters."""

SWEEP_CONFIG = "multirun.yaml"
"""The file with the configuration of a sweep, in the directory that holds its runs."""

FINISHED = "finished"
"""The empty file that a run writes last."""

RUN_SETTINGS = ".hydra/hydra.yaml"
"""The file in which the command keeps its own settings beside a run."""

CHECKPOINTS = "checkpoints"
"""The directory of a run's checkpoints."""

NORMS: Mapping[str, str] = MappingProxyType(
    {"none": "no norm", "custom": "batch norm (ours)", "torch": "batch norm (torch)"}
)
"""What people read for each value of ``model.norm``, in the order in which it is shown."""

NO_VARIANT = "run"
"""The variant in a directory's name if the model has no argument ``norm``."""

_SEED = re.compile(r"(?:^|[_/])seed-(\d+)(?=[_/]|$)")
_SETTING = re.compile(r"[^\W\d][\w.]*")
# Up to the next setting or the end.
_VALUE = re.compile(r".+?(?=_[^\W\d][\w.]*-|$)", re.DOTALL)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
_TIME = re.compile(r"\d{4}-\d\d-\d\d_")

_TAG = re.compile(rf"({'|'.join(KINDS)})_(?:({VAL}|{TEST})_)?([^/]+)/(.+)", re.DOTALL)

# What stands for the number of a call and the place in an output, and what stands for itself in a path.
_AMBIGUOUS = re.compile(r"[#:]|%(?=23|3A|25)")


@dataclass(frozen=True)
class Tag:
    """A tag taken apart.

    Args:
        kind: One of :data:`KINDS`.
        statistic: Name of the statistic, such as ``"dead"``.
        path: Path of the module or the parameter, with the number of the call behind ``#``.
        phase: ``"train"``, ``"val"`` or ``"test"``.

    Example:
        >>> str(Tag("layer", "dead", "net.act1", "val"))
        'layer_val_dead/net.act1'
    """

    kind: str
    statistic: str
    path: str
    phase: str = TRAIN

    def __str__(self) -> str:
        return f"{self.kind}_{in_phase(self.statistic, self.phase)}/{self.path}"


def parse_tag(tag: str) -> Tag | None:
    """Take a tag of a layer, a batch norm layer or a parameter apart; ``None`` for any other tag.

    Example:
        >>> parse_tag("param_grad_norm/net.0.weight")
        Tag(kind='param', statistic='grad_norm', path='net.0.weight', phase='train')
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    kind, phase, statistic, path = match.groups()
    return Tag(kind, statistic, path, phase or TRAIN)


def written(path: str) -> str:
    """The path of a layer as it stands in tags: it cannot be taken for a call or an output of another one.

    Example:
        >>> written("acts.{a}"), written("acts.a#1"), written("acts.a:0")
        ('acts.{a}', 'acts.a%231', 'acts.a%3A0')
    """
    return _AMBIGUOUS.sub(lambda match: f"%{ord(match[0]):02X}", path) or "(no name)"


def health_tag(name: str, phase: str = TRAIN, number: int = 0) -> str:
    """The tag of a number for the whole network.

    Args:
        name: Name of the number.
        phase: ``"train"``, ``"val"`` or ``"test"``.
        number: How many monitors of the same class come before the one that writes it.

    Example:
        >>> health_tag("dead", "val")
        'health/val_dead'
        >>> health_tag("dead", number=1)
        'health/dead#1'
    """
    return f"health/{in_phase(name, phase)}{f'#{number}' if number else ''}"


def in_phase(name: str, phase: str) -> str:
    """A statistic's name as it stands in the tags of a phase: training has no prefix."""
    return name if phase == TRAIN else f"{phase}_{name}"


def published_tag(metric: str) -> str:
    """The tag of a value that somebody else published for a metric.

    Example:
        >>> published_tag("val/acc")
        'published/val/acc'
    """
    return f"{PUBLISHED}/{metric}"


def place_text(place: str) -> str:
    """The text :data:`FIRST_NONFINITE_LAYER` for a place, such as a module's path. Markdown shows it as it stands.

    Example:
        >>> place_text("net.act1"), place_text("net.__act__")
        ('net.act1', '`net.__act__`')
    """
    return place if re.fullmatch(r"[\w .#:]*", place) and "_" not in place else f"`{place}`"


def parse_place_text(text: str) -> str:
    """The place that a text says.

    Example:
        >>> parse_place_text("`net.__act__`")
        'net.__act__'
    """
    return text.strip("`")


@dataclass(frozen=True)
class RunName:
    """A run's directory name taken apart.

    Args:
        variant: The value of ``model.norm``, or ``"run"``. Any other directory's whole name less the seed.
        settings: The other swept values as text, by name, in the order of the directory's name. Without the seed.
        seed: The seed, ``None`` if the name has none.
        folder: The directories above the run's own, joined by ``/``.
    """

    variant: str
    settings: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    folder: str = ""

    @property
    def without_seed(self) -> str:
        """The path less the seed: runs that share it are one variant."""
        name = run_directory(self.variant, self.settings)
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def parts(self) -> list[tuple[str, str]]:
        """What people read, as pairs of name and value. The variant has no name."""
        settings = [(name.replace("_", " "), value) for name, value in self.settings.items()]
        return settings if settings and self.variant == NO_VARIANT else [("", self._variant_in_words), *settings]

    @property
    def in_words(self) -> str:
        """What people read.

        Example:
            >>> parse_run_directory("custom_depth-10_learning_rate-0.1").in_words
            'batch norm (ours), depth 10, learning rate 0.1'
        """
        text = words_of(self.parts)
        return f"{self.folder}/{text}" if self.folder else text

    @property
    def in_words_with_seed(self) -> str:
        """What people read of one run: its variant, and its seed if the name has one."""
        return self.in_words if self.seed is None else f"{self.in_words}, seed {self.seed}"

    @property
    def _variant_in_words(self) -> str:
        return NORMS.get(self.variant, self.variant)


def words_of(parts: list[tuple[str, str]]) -> str:
    """Pairs of name and value, as :attr:`RunName.parts` has them, in one text.

    Example:
        >>> words_of([("", "no norm"), ("depth", "10")])
        'no norm, depth 10'
    """
    return ", ".join(f"{name} {value}".strip() for name, value in parts)


def run_directory(variant: str, settings: Mapping[str, Any]) -> str:
    """Compose the name of a run's directory.

    Args:
        variant: The value of ``model.norm``.
        settings: The other swept values by name, the seed among them.

    Example:
        >>> run_directory("none", {"depth": 10, "seed": 2})
        'none_depth-10_seed-2'
    """
    return "_".join([variant, *(f"{name}-{value}" for name, value in settings.items())])


def parse_run_directory(path: str, known: Mapping[str, Any] | None = None) -> RunName:
    """Take the name of a run's directory apart.

    A value may hold an underscore, as ``leaky_relu`` does, and so may a setting's name. ``known`` tells where such a
    value ends. Without it the value ends at its first underscore that a further setting can follow.

    Args:
        path: The directory's path below the compared directory, with ``/`` between its parts.
        known: The run's hyperparameters by name.

    Example:
        >>> parse_run_directory("none_depth-10_learning_rate-0.1_seed-2")
        RunName(variant='none', settings={'depth': '10', 'learning_rate': '0.1'}, seed=2, folder='')
    """
    match = _SEED.search(path)
    seed = int(match[1]) if match else None
    folder, _, name = (_SEED.sub("", path).strip("_/") or path).rpartition("/")
    variant, _, text = name.partition("_")
    settings = _settings(text, known or {}) if variant in (*NORMS, NO_VARIANT) else None
    return RunName(name, {}, seed, folder) if settings is None else RunName(variant, settings, seed, folder)


def _settings(text: str, known: Mapping[str, Any]) -> dict[str, str] | None:
    """The settings behind the variant, ``None`` if the text is something else."""
    settings: dict[str, str] = {}
    while text:
        name, _, rest = text.partition("-")
        match = _VALUE.match(rest)
        if not _SETTING.fullmatch(name) or match is None or name in settings:
            return None
        value = str(known.get(name))
        if not f"{rest}_".startswith(f"{value}_"):
            value = match[0]
        settings[name] = value
        text = rest[len(value) + 1 :]
    return settings


def sort_key(variant: str) -> tuple[bool, list[Any]]:
    """Variants without normalisation come first. In the others' names numbers rise: 2 before 10, 1e-05 before 0.001."""
    parts = _NUMBER.split(variant)
    numbers = [float(part) if index % 2 else part for index, part in enumerate(parts)]
    return "none" not in variant.split("_"), numbers


def title_of(directory: str, parent: str) -> str:
    """The experiment's name, which is above a directory that is named by the time.

    Example:
        >>> title_of("2026-01-31_10-00-00", parent="tanh")
        'tanh'
    """
    return parent if _TIME.match(directory) else directory
