"""A callback that keeps the predictions of a regression, point by point, in TensorBoard's files."""

from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bnlightning._check import check_integer
from bnlightning.callbacks._packages import BothPackages
from bnlightning.callbacks._steps import EvaluationCadence, step_count, steps_taken
from bnlightning.compare.names import PREDICTION
from bnlightning.writing.writers import summary_writers


class PredictionMonitor(BothPackages, Callback):
    """Keep the evaluated points and their predictions, so that a finished run can be drawn.

    It works with any LightningModule whose ``validation_step`` takes batches ``(x, y)`` of one number a sample and
    returns a mapping with the ``prediction``. If a sample has more numbers, only the first one is kept.

    Logs:
        ``val/prediction``, to TensorBoard loggers: a float32 tensor of shape ``(N, 3)`` with the columns x, y and
        prediction. It holds the points of all batches and all ranks, up to ``max_points`` a rank. It is logged at the
        number of optimizer steps taken before the evaluation.

    Args:
        every_n_steps: Smallest number of optimizer steps between two evaluations of a fit that are kept. The evaluation
            of the final weights and every ``trainer.validate`` are kept too.
        max_points: Largest number of points to keep on each rank.

    Raises:
        ValueError: If an argument is below 1. In an evaluation, if the module returns no ``prediction``.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[PredictionMonitor(every_n_steps=100)])
    """

    def __init__(self, every_n_steps: int = 50, max_points: int = 5000) -> None:
        check_integer("every_n_steps", every_n_steps, at_least=1)
        check_integer("max_points", max_points, at_least=1)
        self.every_n_steps = every_n_steps
        self.max_points = max_points
        self._cadence = EvaluationCadence(every_n_steps)
        self._points: list[Tensor] | None = None
        # Those of an evaluation that may be the final one, and its step.
        self._aside: tuple[Tensor, int] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step_count(trainer).start(trainer)
        self._cadence.start(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._aside = None
        if self._cadence.is_looked_at(trainer):
            self._points = []

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._points is None or sum(map(len, self._points)) >= self.max_points:
            return
        if not isinstance(outputs, Mapping) or "prediction" not in outputs:
            raise ValueError(
                f"{type(pl_module).__name__}.validation_step returned {type(outputs).__name__} without a prediction: "
                'PredictionMonitor needs a mapping such as {"loss": loss, "prediction": prediction}.'
            )
        x, y = batch
        columns = [part.detach().reshape(len(part), -1)[:, :1].float() for part in (x, y, outputs["prediction"])]
        self._points.append(torch.cat(columns, dim=1))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        points, self._points = self._points, None
        if points is None:
            return
        local = torch.cat([*points, torch.zeros(0, 3, device=pl_module.device)])[: self.max_points]
        if self._cadence.is_aside:
            self._aside = local, steps_taken(trainer)
        else:
            self._log(trainer, local, steps_taken(trainer))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        aside, self._aside = self._aside, None
        if self._cadence.ends_with_aside(pl_module.device) and aside is not None:
            self._log(trainer, *aside)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        step_count(trainer).stop(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        step_count(trainer).stop(trainer)

    def _log(self, trainer: lightning.Trainer, local: Tensor, step: int) -> None:
        # Every rank gathers, even one that had no batch.
        everything = _gather(local).cpu()
        for writer in summary_writers(trainer.loggers) if trainer.is_global_zero else ():
            writer.add_tensor(PREDICTION, everything, global_step=step)


def _gather(points: Tensor) -> Tensor:
    """Return the points of all ranks, one rank after the other. The ranks may have different numbers of points."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return points
    number = torch.tensor([len(points)], device=points.device)
    numbers = [torch.zeros_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    longest = int(torch.stack(numbers).max())
    padded = points.new_zeros(longest, points.shape[1])
    padded[: len(points)] = points
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, numbers, strict=True)])
