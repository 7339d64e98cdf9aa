"""The writer for MLflow: scalars under names that it takes, and pictures and texts as files of the run."""

from typing import Any

from bnlightning.writing.plain_names import plain_name
from bnlightning.writing.summaries import Summaries


def write_to_mlflow(logger: Any, summaries: Summaries) -> None:
    """Tell Lightning's MLFlowLogger the scalars, and the newest pictures and texts as artifacts."""
    if summaries.scalars:
        scalars = {plain_name(tag): value for tag, value in summaries.scalars.items()}
        logger.log_metrics(scalars, step=summaries.step)
    for tag, draw in summaries.pictures.items():
        logger.experiment.log_figure(logger.run_id, draw(), f"{plain_name(tag)}.png")
    for tag, text in summaries.texts.items():
        logger.experiment.log_text(logger.run_id, text, f"{plain_name(tag)}.txt")
