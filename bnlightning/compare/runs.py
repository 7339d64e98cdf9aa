"""Finished runs, read back from their TensorBoard files."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.core.saving import load_hparams_from_yaml
from numpy.typing import NDArray

from bnlightning.compare.names import (
    COMPARISON_SUFFIX,
    EVENT_FILES,
    FINISHED,
    FIRST_NONFINITE_LAYER,
    HPARAMS,
    NOTE,
    PREDICTION,
    PUBLISHED,
    RUN_SETTINGS,
    TEST,
    TRAIN_LOSS,
    VAL_LOSS,
    RunName,
    parse_place_text,
    parse_run_directory,
    published_tag,
)

_HIGHER_IS_BETTER = re.compile(
    r"(?:^|_)(?:acc|accuracy|auc|auroc|ap|map|precision|recall|f1|iou|dice|r2|psnr|ssim)(?:_|$)"
)


@dataclass(frozen=True)
class HistogramAt:
    """A layer's values at one step.

    Args:
        step: The step.
        edges: The borders of the bins, rising, shape ``(bins + 1,)``.
        counts: How many values each bin holds, shape ``(bins,)``.
    """

    step: int
    edges: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What one training run wrote.

    Args:
        path: The run's directory.
        variant: The directory's path below the compared one, less the seed: ``"custom_depth-10"``.
        seed: The seed from the directory's name or from ``hparams.yaml``. ``None`` if neither has one.
        hparams: The hyperparameters from ``hparams.yaml``, nested as they were saved. Empty without the file.
        scalars: Steps and values by tag, in the order of writing.
        histograms: A layer's histograms by tag, steps rising.
        predictions: Pairs of a step and an array of shape ``(N, 3)`` with columns x, y and prediction, steps rising.
        first_nonfinite: The step and the module path of the first output with NaN or infinity. ``None`` if none was
            seen.
        note: The text under ``test/note``, ``None`` if there is none.
        seconds: The time from the first to the last scalar.
        is_cut_off: Whether it is a run of ``python -m bnlightning.train`` that has not ended by itself.
    """

    path: Path
    variant: str
    seed: int | None
    hparams: dict[str, Any]
    scalars: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
    histograms: dict[str, list[HistogramAt]]
    predictions: list[tuple[int, NDArray[np.float32]]]
    first_nonfinite: tuple[int, str] | None
    note: str | None
    seconds: float
    is_cut_off: bool

    @property
    def last_step(self) -> int:
        """The last step of all scalars."""
        return max((int(steps.max()) for steps, _ in self.scalars.values()), default=0)

    def last(self, tag: str) -> float | None:
        """The last value of a scalar, ``None`` if the run has no such tag."""
        return float(self.scalars[tag][1][-1]) if tag in self.scalars else None

    def hparam(self, name: str) -> Any:
        """The value of a hyperparameter.

        Args:
            name: The hyperparameter's name. A nested one has a path with dots, such as ``norm_options.momentum``.

        Raises:
            ValueError: If the run has no hyperparameter of this name.
        """
        value: Any = self.hparams
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = ", ".join(_paths(self.hparams)) or "none"
                raise ValueError(f"{name!r} is no hyperparameter of the run in {self.path}: choose one of {known}.")
            value = value[part]
        return value

    def has_diverged(self, metric: str) -> bool:
        """Whether the run met NaN or infinity.

        Either a monitor saw it, or the last value of a loss or of the metric is not finite. The losses count too,
        since an accuracy stays finite in a run that diverged.
        """
        last = [self.last(tag) for tag in (metric, TRAIN_LOSS, VAL_LOSS)]
        return self.first_nonfinite is not None or not all(value is None or np.isfinite(value) for value in last)


def is_higher_better(metric: str) -> bool:
    """Whether a metric grows as a model gets better. Its name tells, such as ``val/acc``."""
    return _HIGHER_IS_BETTER.search(metric.rpartition("/")[2].lower()) is not None


def worst(metric: str) -> float:
    """The value that a run that diverged counts as: worse than any other."""
    return -np.inf if is_higher_better(metric) else np.inf


def find_runs(directory: Path) -> list[Path]:
    """The directories at or below ``directory`` with an event file of a run, sorted.

    The event file of a comparison belongs to no run.
    """
    files = directory.rglob(EVENT_FILES)
    return sorted({file.parent for file in files if not file.name.endswith(COMPARISON_SUFFIX)})


def read_run(path: Path, root: Path) -> Run:
    """Read a run from its event files.

    Args:
        path: The run's directory.
        root: The compared directory, at or above ``path``.
    """
    # Takes 0.2 s, which importing the package should not.
    from tensorboard.backend.event_processing import event_accumulator as ea

    keep_all = {ea.SCALARS: 0, ea.HISTOGRAMS: 0, ea.TENSORS: 0, ea.IMAGES: 1, ea.AUDIO: 1, ea.COMPRESSED_HISTOGRAMS: 1}
    events = ea.EventAccumulator(str(path), size_guidance=keep_all)
    events.Reload()
    tags = events.Tags()
    hparams = _hparams(path)
    name = parse_run_directory(path.relative_to(root).as_posix() if path != root else path.name, _by_last_name(hparams))
    times: list[float] = []
    scalars = {}
    for tag in tags[ea.SCALARS]:
        # In the order of writing; the files of one directory are read in the order of their names.
        items = sorted(events.Scalars(tag), key=lambda item: item.wall_time)
        times += [items[0].wall_time, items[-1].wall_time]
        scalars[tag] = (np.array([item.step for item in items]), np.array([item.value for item in items]))
    if any((np.diff(steps) < 0).any() for steps, _ in scalars.values()):
        warnings.warn(
            f"{path} holds several trainings, which are read as one: give each a directory of its own.", stacklevel=2
        )
    return Run(
        path=path,
        variant=name.without_seed,
        seed=_seed(name, hparams),
        hparams=hparams,
        scalars=scalars,
        histograms={tag: _histograms(events.Histograms(tag)) for tag in tags[ea.HISTOGRAMS]},
        predictions=_tensors(events, tags[ea.TENSORS], PREDICTION),
        first_nonfinite=_place(_text(events, tags[ea.TENSORS], FIRST_NONFINITE_LAYER)),
        note=note[1] if (note := _text(events, tags[ea.TENSORS], NOTE)) is not None else None,
        seconds=max(times, default=0.0) - min(times, default=0.0),
        is_cut_off=_is_of_the_command(path) and not (path / FINISHED).exists(),
    )


def labels(variants: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """What people read for each variant: "no norm", "batch norm (ours), depth 10".

    Args:
        variants: The runs of each variant, by :attr:`Run.variant`.
    """
    texts = {variant: name.in_words for variant, name in run_names(variants).items()}
    # Two directories may read the same. Their names then tell them apart.
    return texts if len(set(texts.values())) == len(texts) else {variant: variant for variant in variants}


def run_names(variants: Mapping[str, Sequence[Run]]) -> dict[str, RunName]:
    """The directory name of each variant, taken apart."""
    return {
        variant: parse_run_directory(variant, _by_last_name(runs[0].hparams) if runs else None)
        for variant, runs in variants.items()
    }


def measured_in_tests(variants: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The numbers that the runs' tests logged as ``test/<metric>``.

    Args:
        variants: The runs of each variant.

    Returns:
        The last value of each run, by metric and then by variant. If a run logged ``published/<metric>``, that value
        stands before the variants' under the name ``published``.
    """
    everything = [run for runs in variants.values() for run in runs]
    columns = {PUBLISHED: (PUBLISHED, everything)} | {name: (TEST, runs) for name, runs in variants.items()}
    results: dict[str, dict[str, NDArray[np.float64]]] = {}
    for tag in dict.fromkeys(tag for run in everything for tag in run.scalars):
        group, _, metric = tag.partition("/")
        if group not in (TEST, PUBLISHED) or metric in results or _is_curve(metric, everything):
            continue
        found = {
            name: [last for run in runs if (last := run.last(f"{kind}/{metric}")) is not None]
            for name, (kind, runs) in columns.items()
        }
        # One publication, however many runs stand beside it.
        results[metric] = {
            name: np.array(values[:1] if name == PUBLISHED else values) for name, values in found.items() if values
        }
    return results


def curves(runs: Sequence[Run], metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A metric over the steps that all runs have.

    Args:
        runs: The runs of one variant.
        metric: The tag. Runs without it are left out.

    Returns:
        The steps, shape ``(steps,)``, and the values, shape ``(runs, steps)``. A value that is not finite counts as the
        worst.
    """
    logged = [run.scalars[metric] for run in runs if metric in run.scalars]
    if not logged:
        return np.array([], dtype=np.int64), np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in logged)))
    by_step = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in logged]
    table = np.array([[values[step] for step in steps] for values in by_step])
    return np.array(steps), np.where(np.isfinite(table), table, worst(metric))


def published_curves(variants: Mapping[str, Sequence[Run]], metric: str) -> dict[str, dict[int, float]]:
    """The values that were published for a metric over the steps.

    All variants share one publication, whichever of their runs logged it. If variants logged different ones, each
    belongs to the variants that logged it.

    Args:
        variants: The runs of each variant.
        metric: The tag of the metric, such as ``val/acc``.

    Returns:
        The published value by step, for each variant. Empty if nothing was published.
    """
    if not _is_curve(metric, [run for runs in variants.values() for run in runs]):
        return {}
    logged = {
        name: {
            int(step): float(value)
            for run in runs
            if (tag := published_tag(metric)) in run.scalars
            for step, value in zip(*run.scalars[tag], strict=True)
        }
        for name, runs in variants.items()
    }
    curves = [curve for curve in logged.values() if curve]
    # A run that was stopped early logged the first part of it.
    longest: dict[int, float] = max(curves, key=len, default={})
    if all(curve.items() <= longest.items() for curve in curves):
        return {name: dict(sorted(longest.items())) for name in variants if longest}
    return {name: dict(sorted(curve.items())) for name, curve in logged.items() if curve}


def _is_curve(metric: str, runs: Sequence[Run]) -> bool:
    """Whether ``published/<metric>`` belongs to a metric that is logged over the steps, not to ``test/<metric>``."""
    return not any(f"{TEST}/{metric}" in run.scalars for run in runs) and any(metric in run.scalars for run in runs)


def digits(value: float) -> str:
    """The digits that tell a float32 from its neighbours, as numpy prints arrays: at most eight behind the point."""
    return np.array2string(np.array([value], dtype=np.float32), precision=8, floatmode="maxprec")[1:-1].removesuffix(
        "."
    )


def quartiles(values: NDArray[np.float64], worst: float = np.inf) -> NDArray[np.float64]:
    """The quartiles over the first dimension.

    Args:
        values: One run a row, shape ``(runs, ...)``.
        worst: The value that a run that diverged counts as: infinity for costs, ``-inf`` for accuracies.

    Returns:
        Lower quartile, median and upper quartile, shape ``(3, ...)``.
    """
    ordered = np.where(np.isfinite(values), values, worst)
    if np.isfinite(ordered).all():
        return np.quantile(ordered, [0.25, 0.5, 0.75], axis=0)
    # Between a number and infinity there is nothing to interpolate.
    return np.quantile(ordered, [0.25, 0.5, 0.75], axis=0, method="nearest")


def _histograms(items: Sequence[Any]) -> list[HistogramAt]:
    return [
        HistogramAt(
            item.step,
            np.array([item.histogram_value.min, *item.histogram_value.bucket_limit]),
            np.array(item.histogram_value.bucket),
        )
        for item in sorted(items, key=lambda item: item.step)
    ]


def _tensors(events: Any, tags: Sequence[str], tag: str) -> list[tuple[int, NDArray[np.float32]]]:
    from tensorboard.util import tensor_util

    if tag not in tags:
        return []
    items = sorted(events.Tensors(tag), key=lambda item: item.step)
    return [(item.step, tensor_util.make_ndarray(item.tensor_proto)) for item in items]


def _text(events: Any, tags: Sequence[str], tag: str) -> tuple[int, str] | None:
    """The first text of a tag, and its step."""
    if f"{tag}/text_summary" not in tags:
        return None
    item = events.Tensors(f"{tag}/text_summary")[0]
    return item.step, item.tensor_proto.string_val[0].decode()


def _place(found: tuple[int, str] | None) -> tuple[int, str] | None:
    return None if found is None else (found[0], parse_place_text(found[1]))


def _seed(name: RunName, hparams: Mapping[str, Any]) -> int | None:
    seed = hparams.get("seed") if name.seed is None else name.seed
    return seed if isinstance(seed, int) else None


def _is_of_the_command(path: Path) -> bool:
    """Whether the command wrote the run; other programs of Hydra's do not say when one has finished."""
    try:
        return "app_name: python -m bnlightning.train\n" in (path / RUN_SETTINGS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _hparams(path: Path) -> dict[str, Any]:
    file = path / HPARAMS
    if not file.is_file():
        return {}
    try:
        hparams = load_hparams_from_yaml(str(file), use_omegaconf=False)
    except Exception:
        # Another project's file of the same name.
        return {}
    return hparams if isinstance(hparams, dict) else {}


def _paths(hparams: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of all hyperparameters. A nested one has a path with dots."""
    nested = [
        _paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [f"{prefix}{name}"]
        for name, value in hparams.items()
    ]
    return [path for paths in nested for path in paths]


def _by_last_name(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters by the last part of their paths, which directories are named by."""
    found: dict[str, Any] = {}
    for name, value in hparams.items():
        found |= _by_last_name(value) if isinstance(value, Mapping) else {str(name): value}
    return found
