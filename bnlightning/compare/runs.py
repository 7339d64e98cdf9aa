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

COMPARISON_SUFFIX = ".comparison"
"""Ends the name of the event file that a comparison writes, so that it is not taken for a run."""

_SEED = re.compile(r"(?:^|[_/])seed-(\d+)(?=[_/]|$)")
_HIGHER_IS_BETTER = re.compile(
    r"(?:^|_)(?:acc|accuracy|auc|auroc|ap|map|precision|recall|f1|iou|dice|r2|psnr|ssim)(?:_|$)"
)


@dataclass(frozen=True)
class HistogramAt:
    """A histogram of one step: counts between ascending edges, one more of these."""

    step: int
    edges: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What one training run wrote.

    Args:
        path: Its directory.
        variant: The directory's name below the compared one, less the seed.
        seed: From the directory's name or from ``hparams.yaml``; ``None`` if neither tells.
        hparams: Hyperparameters from ``hparams.yaml``, nested as they were saved; empty without the file.
        scalars: Steps and values by tag.
        histograms: By tag, steps rising.
        predictions: ``(step, array of shape (N, 3) with columns x, y, prediction)``, steps rising.
        first_nonfinite: Step and module path of the first non-finite output, if there was one.
        note: What the run's module wrote under ``test/note``, if it did.
        seconds: From the first to the last event.
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

    def last(self, tag: str) -> float | None:
        """The last value of a scalar."""
        return float(self.scalars[tag][1][-1]) if tag in self.scalars else None

    def hparam(self, name: str) -> Any:
        """A hyperparameter; of a nested one the path with dots, such as ``norm_options.momentum``.

        Raises:
            ValueError: If the run has none of this name.
        """
        value: Any = self.hparams
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = ", ".join(_paths(self.hparams)) or "none"
                raise ValueError(f"{name!r} is no hyperparameter of the run in {self.path}: choose one of {known}.")
            value = value[part]
        return value

    def has_diverged(self, metric: str) -> bool:
        """Whether the run met NaN or infinity: a monitor saw it, or the last value of a loss or the metric is that.

        Accuracies stay finite in a run that diverged.
        """
        last = [self.last(tag) for tag in (metric, "train/loss", "val/loss")]
        return self.first_nonfinite is not None or not all(value is None or np.isfinite(value) for value in last)


def is_higher_better(metric: str) -> bool:
    """Whether a metric is known by its name for one that grows as a model gets better, such as ``val/acc``."""
    return _HIGHER_IS_BETTER.search(metric.rpartition("/")[2].lower()) is not None


def worst(metric: str) -> float:
    """What a run that diverged counts as, for the order of the runs."""
    return -np.inf if is_higher_better(metric) else np.inf


def find_runs(directory: Path) -> list[Path]:
    """The directories at or below ``directory`` with an event file of a run, sorted."""
    files = directory.rglob("events.out.tfevents.*")
    return sorted({file.parent for file in files if not file.name.endswith(COMPARISON_SUFFIX)})


def read_run(path: Path, root: Path) -> Run:
    """Read the event files in ``path``, a directory at or below ``root``."""
    # Takes 0.2 s, which importing the package should not.
    from tensorboard.backend.event_processing import event_accumulator as ea

    keep_all = {ea.SCALARS: 0, ea.HISTOGRAMS: 0, ea.TENSORS: 0, ea.IMAGES: 1, ea.AUDIO: 1, ea.COMPRESSED_HISTOGRAMS: 1}
    events = ea.EventAccumulator(str(path), size_guidance=keep_all)
    events.Reload()
    tags = events.Tags()
    name = path.relative_to(root).as_posix() if path != root else path.name
    hparams = _hparams(path)
    times: list[float] = []
    scalars = {}
    for tag in tags[ea.SCALARS]:
        # In the order of writing; the files of one directory are read in the order of their names.
        items = sorted(events.Scalars(tag), key=lambda item: item.wall_time)
        times += [items[0].wall_time, items[-1].wall_time]
        scalars[tag] = (np.array([item.step for item in items]), np.array([item.value for item in items]))
    if any((np.diff(steps) < 0).any() for steps, _ in scalars.values()):
        warnings.warn(f"{path} holds several trainings, which are read as one: give each a directory.", stacklevel=2)
    return Run(
        path=path,
        variant=_SEED.sub("", name).strip("_/") or name,
        seed=_seed(name, hparams),
        hparams=hparams,
        scalars=scalars,
        histograms={tag: _histograms(events.Histograms(tag)) for tag in tags[ea.HISTOGRAMS]},
        predictions=_tensors(events, tags[ea.TENSORS], "val/prediction"),
        first_nonfinite=_text(events, tags[ea.TENSORS], "health/first_nonfinite_layer"),
        note=note[1] if (note := _text(events, tags[ea.TENSORS], "test/note")) is not None else None,
        seconds=max(times, default=0.0) - min(times, default=0.0),
    )


def measured_in_tests(variants: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """What the runs' tests measured: the last values over a variant's runs, by metric and then by variant.

    The metrics are those logged as ``test/<metric>``. Where a run logged ``published/<metric>``, too, that value stands
    before the variants', as ``published``.
    """
    everything = [run for runs in variants.values() for run in runs]
    columns = {"published": ("published/", everything)} | {name: ("test/", runs) for name, runs in variants.items()}
    results: dict[str, dict[str, NDArray[np.float64]]] = {}
    for tag in dict.fromkeys(tag for run in everything for tag in run.scalars):
        group, _, metric = tag.partition("/")
        if group not in ("test", "published") or metric in results or _is_curve(metric, everything):
            continue
        found = {
            name: [run.scalars[prefix + metric][1][-1] for run in runs if prefix + metric in run.scalars]
            for name, (prefix, runs) in columns.items()
        }
        # One publication, however many runs stand beside it.
        results[metric] = {
            name: np.array(values[:1] if name == "published" else values) for name, values in found.items() if values
        }
    return results


def curves(runs: Sequence[Run], metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps all runs have, and their values there, one run a row; what is not finite counts as the worst."""
    logged = [run.scalars[metric] for run in runs if metric in run.scalars]
    if not logged:
        return np.array([], dtype=np.int64), np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in logged)))
    by_step = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in logged]
    table = np.array([[values[step] for step in steps] for values in by_step])
    return np.array(steps), np.where(np.isfinite(table), table, worst(metric))


def published_curves(variants: Mapping[str, Sequence[Run]], metric: str) -> dict[str, dict[int, float]]:
    """What was published for a metric, value by step, for each variant; no variants if nothing was.

    One publication that any of the runs logged is for all variants; if variants logged different ones, each is for
    those that did.
    """
    if not _is_curve(metric, [run for runs in variants.values() for run in runs]):
        return {}
    logged = {
        name: {
            int(step): float(value)
            for run in runs
            if (tag := f"published/{metric}") in run.scalars
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
    """Whether ``published/<metric>`` is of a metric that is logged over the steps, and not of ``test/<metric>``."""
    return not any(f"test/{metric}" in run.scalars for run in runs) and any(metric in run.scalars for run in runs)


def digits(value: float) -> str:
    """The digits that tell a float32 from its neighbours, at most eight behind the point, as numpy prints arrays."""
    return np.array2string(np.array([value], dtype=np.float32), precision=8, floatmode="maxprec")[1:-1].removesuffix(
        "."
    )


def quartiles(values: NDArray[np.float64], worst: float = np.inf) -> NDArray[np.float64]:
    """The quartiles over the first dimension, three along a new first one.

    A run that diverged is worse than any that did not: it counts as ``worst``, for the order; of costs that is
    infinity, of what is better the higher it is ``-inf``.
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


def _seed(name: str, hparams: Mapping[str, Any]) -> int | None:
    match = _SEED.search(name)
    seed = int(match[1]) if match else hparams.get("seed")
    return seed if isinstance(seed, int) else None


def _hparams(path: Path) -> dict[str, Any]:
    file = path / "hparams.yaml"
    if not file.is_file():
        return {}
    try:
        hparams = load_hparams_from_yaml(str(file), use_omegaconf=False)
    except Exception:
        # A run of somebody else's, with a file of the same name: it tells nothing.
        return {}
    return hparams if isinstance(hparams, dict) else {}


def _paths(hparams: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of all hyperparameters, of nested ones the paths."""
    nested = [
        _paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [f"{prefix}{name}"]
        for name, value in hparams.items()
    ]
    return [path for paths in nested for path in paths]
