"""The registry of writers: one function for each kind of logger tells it the summaries of a step.

A logger of your own takes one function, which you register:

    >>> from bnlightning.writing.writers import register_writer
    >>> class Printer:
    ...     pass
    >>> def write_to_printer(printer, summaries):
    ...     for tag, value in summaries.scalars.items():
    ...         print(summaries.step, tag, value)
    >>> register_writer(Printer, write_to_printer)
"""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bnlightning.writing.canvas import draw_png
from bnlightning.writing.layout import Chart, charts_of, layout
from bnlightning.writing.mlflow import write_to_mlflow
from bnlightning.writing.plain_names import plain_name
from bnlightning.writing.summaries import Summaries

Write = Callable[[Any, Summaries], None]
"""A writer: it tells a logger, its first argument, the summaries, its second one."""


def write(loggers: Iterable[Any], summaries: Summaries) -> None:
    """Tell all loggers. With several ranks only the first one calls this.

    Args:
        loggers: Loggers of Lightning, a ``SummaryWriter``, or loggers that :func:`register_writer` knows.
        summaries: The numbers, histograms, texts and pictures of one step.

    A logger that raises must not end a training. The error is told once, and the other loggers are told as well.

    Raises:
        ValueError: If no writer is registered for a logger, and it has no ``log_metrics``.
    """
    for logger, tell in [(logger, writer_of(logger)) for logger in loggers]:
        with summaries.mishaps.forgiven(f"write to {type(logger).__name__}"):
            tell(logger, summaries)


def register_writer(logger: type | str, writer: Write) -> None:
    """Have ``writer`` tell the loggers of a class and of its subclasses.

    Args:
        logger: The class, or its name. A name needs no import of the logger's package.
        writer: Called with the logger and the :class:`~bnlightning.writing.summaries.Summaries` of a step.
    """
    _WRITERS[logger] = writer


def writer_of(logger: Any) -> Write:
    """The writer of a logger: that of its nearest registered class. Without one, scalars alone are told.

    Raises:
        ValueError: If no writer is registered for the logger, and it has no ``log_metrics``.
    """
    found = _registered(logger)
    if found is not None:
        return found
    if hasattr(logger, "log_metrics"):
        return write_scalars
    raise ValueError(
        f"logger={type(logger).__name__} is not known: give one of Lightning's loggers or a SummaryWriter, or register "
        "a function for it by bnlightning.writing.writers.register_writer."
    )


def summary_writers(loggers: Iterable[Any]) -> list[Any]:
    """The ``SummaryWriter`` of each logger that writes TensorBoard's files, under either name of Lightning."""
    found = []
    for logger in loggers:
        writer = _registered(logger)
        if writer is write_to_tensorboard_logger:
            found.append(logger.experiment)
        elif writer is write_to_summary_writer:
            found.append(logger)
    return found


def write_scalars(logger: Any, summaries: Summaries) -> None:
    """Tell any logger of Lightning the scalars, under names that every logger takes."""
    if summaries.scalars:
        scalars = {plain_name(tag): value for tag, value in summaries.scalars.items()}
        logger.log_metrics(scalars, step=summaries.step)


def write_scalars_by_tag(logger: Any, summaries: Summaries) -> None:
    """Tell a logger that takes any name the scalars, such as Lightning's CSVLogger."""
    if summaries.scalars:
        logger.log_metrics(summaries.scalars, step=summaries.step)


def write_to_tensorboard_logger(logger: Any, summaries: Summaries) -> None:
    """Tell Lightning's TensorBoardLogger everything."""
    write_to_summary_writer(logger.experiment, summaries)


def write_to_summary_writer(writer: Any, summaries: Summaries) -> None:
    """Tell a ``torch.utils.tensorboard.SummaryWriter`` everything, as one event.

    The first value of a tag in an event file carries its description. The Custom Scalars tab gets one chart for all
    layers of a statistic.
    """
    # One event instead of one for each value: a tenth of the time.
    from tensorboard.compat.proto.summary_pb2 import Summary

    # Not the attribute: a fit closes the file and leaves None there. This call opens a new file.
    file = writer._get_file_writer()
    told = _told(file)
    summary = Summary()
    for tag, value in summaries.scalars.items():
        summary.value.add(tag=tag, simple_value=_as_float32(value))
    # What is only for show must not take the numbers with it.
    forgiven = summaries.mishaps.forgiven
    for tag, histogram in summaries.histograms.items():
        with forgiven(f"write the histogram {tag}"):
            summary.value.add(tag=tag, histo=_histogram_proto(histogram))
    for tag, draw in summaries.pictures.items():
        with forgiven(f"draw {tag}"):
            png, width, height = draw_png(draw)
            image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
            summary.value.add(tag=tag, image=image)
    for tag, text in summaries.texts.items():
        with forgiven(f"write the text {tag}"):
            summary.value.append(_text_value(tag, text))
    new = [value for value in summary.value if _name(value) not in told.tags]
    for value in new:
        told.tags.add(_name(value))
        with forgiven(f"describe {_name(value)}"):
            if description := summaries.describe(_name(value)):
                describe(value, description)
    with forgiven("lay out the Custom Scalars tab"):
        charts = charts_of(value.tag for value in new if value.HasField("simple_value")) - told.charts
        if charts:
            told.charts |= charts
            summary.value.extend(layout(told.charts).value)
    if summary.value:
        file.add_summary(summary, summaries.step)


def describe(value: Any, description: str) -> None:
    """Give a value its description. TensorBoard reads the one at a tag's first value in an event file.

    Args:
        value: TensorBoard's ``Summary.Value``: a simple value, a histogram, an image or a text.
        description: The meaning of the tag, in Markdown.
    """
    from tensorboard.compat.proto import summary_pb2

    plugin, data_class = {
        "simple_value": ("scalars", summary_pb2.DATA_CLASS_SCALAR),
        "histo": ("histograms", summary_pb2.DATA_CLASS_TENSOR),
        "image": ("images", summary_pb2.DATA_CLASS_BLOB_SEQUENCE),
        "tensor": ("text", summary_pb2.DATA_CLASS_TENSOR),
    }[value.WhichOneof("value")]
    value.metadata.summary_description = description
    # TensorBoard's fast reader drops the description of a value that does not say its class.
    value.metadata.plugin_data.plugin_name = plugin
    value.metadata.data_class = data_class


def write_to_wandb(logger: Any, summaries: Summaries) -> None:
    """Tell Lightning's WandbLogger everything."""
    import wandb
    from PIL import Image

    media: dict[str, Any] = {}
    for tag, histogram in summaries.histograms.items():
        with summaries.mishaps.forgiven(f"write the histogram {tag}"):
            media[tag] = wandb.Histogram(np_histogram=(histogram.counts.tolist(), histogram.edges.tolist()))
    for tag, draw in summaries.pictures.items():
        with summaries.mishaps.forgiven(f"draw {tag}"):
            media[tag] = wandb.Image(Image.open(io.BytesIO(draw_png(draw)[0])))
    logger.log_metrics(summaries.scalars | media | summaries.texts, step=summaries.step)


# The one registry of the package. Users add their own writers to it.
_WRITERS: dict[type | str, Write] = {
    "SummaryWriter": write_to_summary_writer,
    "TensorBoardLogger": write_to_tensorboard_logger,
    "WandbLogger": write_to_wandb,
    "MLFlowLogger": write_to_mlflow,
    "CSVLogger": write_scalars_by_tag,
}


def _registered(logger: Any) -> Write | None:
    for base in type(logger).__mro__:
        found = _WRITERS.get(base) or _WRITERS.get(base.__name__)
        if found is not None:
            return found
    return None


# Of float32.
_SMALLEST, _LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127


@dataclass
class _Told:
    """The tags with a description, and the charts, that an event file has already."""

    tags: set[str] = field(default_factory=set)
    charts: set[Chart] = field(default_factory=set)


def _told(file: Any) -> _Told:
    # Kept with the file: several monitors write into it, and every fit begins a new one.
    told: _Told = vars(file).setdefault("_bnlightning_told", _Told())
    return told


def _name(value: Any) -> str:
    tag: str = value.tag
    return tag.removesuffix("/text_summary")


def _histogram_proto(histogram: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    return HistogramProto(
        min=histogram.edges[0],
        max=histogram.edges[-1],
        num=histogram.counts.sum(),
        sum=histogram.sum,
        sum_squares=histogram.sum_squares,
        bucket_limit=histogram.edges[1:].tolist(),
        bucket=histogram.counts.tolist(),
    )


def _as_float32(value: float) -> float:
    """The nearest that TensorBoard can hold: what is neither zero nor infinite stays so."""
    if value == 0 or not math.isfinite(value):
        return value
    return math.copysign(min(max(abs(value), _SMALLEST), _LARGEST), value)


def _text_value(tag: str, text: str) -> Any:
    from torch.utils.tensorboard.summary import text as text_summary

    return text_summary(tag, text).value[0]
