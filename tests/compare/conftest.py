import warnings

import lightning
import pytest
import yaml
from helpers import quiet_trainer
from torch.utils.tensorboard import SummaryWriter

from bnlightning import (
    ActivationMonitor,
    LitMovingAverage,
    LitRegressor,
    PointsDataModule,
    PredictionMonitor,
    PublishedValues,
    SyntheticRegressionDataModule,
)
from bnlightning.compare.runs import find_runs, read_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Two variants, two seeds each, the first with a diverging seed."""
    root = tmp_path_factory.mktemp("finished")
    for norm in ("none", "custom"):
        for seed in (1, 2):
            lightning.seed_everything(seed, verbose=False)
            rate = 1e12 if (norm, seed) == ("none", 2) else 1e-3
            model = LitRegressor(norm=norm, activation="relu", depth=2, width=8, weight_std=0.3, learning_rate=rate)
            monitors = [ActivationMonitor(10, check_finite_every_n_steps=1), PredictionMonitor(10)]
            trainer = quiet_trainer(
                root / f"{norm}_seed-{seed}", max_steps=20, val_check_interval=5, callbacks=monitors
            )
            data = SyntheticRegressionDataModule(num_points=200, seed=seed)
            trainer.validate(model, data, verbose=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="ActivationMonitor: at step .* the first NaN")
                trainer.fit(model, data)
    return root


@pytest.fixture(scope="session")
def with_tests(tmp_path_factory):
    """Two variants whose tests measured something, beside what was published."""
    root = tmp_path_factory.mktemp("with_tests")
    for convention in ("keras", "pytorch"):
        options = {"convention": convention, "eps": 1e-3, "momentum": 0.5, "backend": "reference"}
        model, data = LitMovingAverage(norm_options=options), PointsDataModule(x=[[0.0], [1.0]], y=[[3.0], [4.0]])
        published = PublishedValues({"running_var": 0.74709475, "running_mean": 0.3514931, "loss": 0.5})
        monitors = [published, PredictionMonitor(), ActivationMonitor()]
        trainer = quiet_trainer(root / convention, max_steps=1, limit_val_batches=1, callbacks=monitors)
        trainer.fit(model, data)
        trainer.validate(model, data, verbose=False)
        trainer.test(model, data, verbose=False)
    return root


@pytest.fixture(scope="session")
def write_run():
    """Write a run's event file and ``hparams.yaml``.

    The values of a tag are a mapping by step or a list of every tenth step's. ``__`` in its name stands for a slash.
    """

    def write(directory, hparams=None, nonfinite_at=None, **tags):
        with SummaryWriter(str(directory)) as writer:
            for tag, values in tags.items():
                by_step = values if isinstance(values, dict) else {10 * i: value for i, value in enumerate(values)}
                for step, value in by_step.items():
                    writer.add_scalar(tag.replace("__", "/"), value, step)
            if nonfinite_at is not None:
                writer.add_text("health/first_nonfinite_layer", "net.act1", nonfinite_at)
        if hparams is not None:
            (directory / "hparams.yaml").write_text(yaml.safe_dump(hparams))

    return write


@pytest.fixture(scope="session")
def read_variants():
    """Read the runs below a directory, by variant."""

    def read(root):
        runs = [read_run(path, root) for path in find_runs(root)]
        return {name: [run for run in runs if run.variant == name] for name in sorted({run.variant for run in runs})}

    return read
