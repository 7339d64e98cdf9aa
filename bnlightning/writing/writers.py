"""What a callback has to say at one step, and how each logger is told: a new logger is one function here."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from bnlightning.monitors.counting.histogram import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Publication:
    """Everything that is written at one step.

    Args:
        step: Where it stands on the x-axis.
        scalars: By tag.
        histograms: By tag; for loggers that have histograms.
        texts: By tag; for loggers that have texts.
        figures: By tag; for loggers that have images. They are drawn only if there is such a logger.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)

    def write(self, trainer: lightning.Trainer) -> None:
        """Give it to all loggers of the Trainer; on any rank but the first nothing happens."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            _writer(logger)(logger, self)


def _writer(logger: Logger) -> Callable[[Any, Publication], None]:
    if isinstance(logger, TensorBoardLogger):
        return _write_to_tensorboard
    # By name: importing it would need the package wandb.
    if any(base.__name__ == "WandbLogger" for base in type(logger).__mro__):
        return _write_to_wandb
    return _write_scalars


def _write_scalars(logger: Logger, publication: Publication) -> None:
    if publication.scalars:
        logger.log_metrics(publication.scalars, step=publication.step)


def _write_to_tensorboard(logger: TensorBoardLogger, publication: Publication) -> None:
    # One event instead of one for each value: a tenth of the time.
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    summary = Summary()
    for tag, value in publication.scalars.items():
        summary.value.add(tag=tag, simple_value=value)
    for tag, histogram in publication.histograms.items():
        proto = HistogramProto(
            min=histogram.edges[0],
            max=histogram.edges[-1],
            num=histogram.counts.sum(),
            sum=histogram.sum,
            sum_squares=histogram.sum_squares,
            bucket_limit=histogram.edges[1:].tolist(),
            bucket=histogram.counts.tolist(),
        )
        summary.value.add(tag=tag, histo=proto)
    for tag, draw in publication.figures.items():
        png, width, height = _png(draw())
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        summary.value.add(tag=tag, image=image)
    if summary.value:
        # Not the attribute: it is None after a fit, which closes the file, and this opens a new one.
        logger.experiment._get_file_writer().add_summary(summary, publication.step)
    for tag, text in publication.texts.items():
        logger.experiment.add_text(tag, text, global_step=publication.step)


def _write_to_wandb(logger: Any, publication: Publication) -> None:
    import wandb

    media: dict[str, Any] = {
        tag: wandb.Histogram(np_histogram=(histogram.counts.tolist(), histogram.edges.tolist()))
        for tag, histogram in publication.histograms.items()
    }
    media |= {tag: wandb.Image(draw()) for tag, draw in publication.figures.items()}
    logger.log_metrics(publication.scalars | media | publication.texts, step=publication.step)


def _png(figure: "Figure") -> tuple[bytes, int, int]:
    """The encoded image, its width and its height. Without pyplot, which takes long to import and has a state."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = figure.canvas.get_width_height()
    return buffer.getvalue(), width, height
