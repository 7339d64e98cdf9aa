import warnings

import lightning
import pytest
from helpers import quiet_trainer

from bnlightning import ActivationMonitor, GradientMonitor, LitRegressor, SyntheticRegressionDataModule


@pytest.fixture(scope="session")
def sweep(tmp_path_factory, read_variants):
    """Learning rates with two seeds each; without normalisation the largest makes all diverge."""
    root = tmp_path_factory.mktemp("sweep")
    for norm in ("none", "custom"):
        for rate in (1e-4, 1e-3, 1e12):
            for seed in (1, 2):
                directory = root / f"{norm}_learning_rate-{rate}_seed-{seed}"
                train(directory, seed, norm=norm, activation="relu", depth=2, learning_rate=rate, weight_std=0.3)
    return read_variants(root)


@pytest.fixture(scope="session")
def depths(tmp_path_factory, read_variants):
    """Two depths with and without normalisation, and one run that diverges at once."""
    root = tmp_path_factory.mktemp("depths")
    for norm in ("none", "custom"):
        for depth in (2, 11):
            rate = 1e12 if (norm, depth) == ("none", 2) else 1e-3
            train(root / f"{norm}_{depth}", 1, norm=norm, activation="sigmoid", depth=depth, learning_rate=rate)
    return read_variants(root)


def train(directory, seed, **hparams):
    lightning.seed_everything(seed, verbose=False)
    monitors = [ActivationMonitor(10, check_finite_every_n_steps=1), GradientMonitor(4)]
    trainer = quiet_trainer(directory, max_steps=12, val_check_interval=4, callbacks=monitors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ActivationMonitor: at step .* the first NaN")
        trainer.fit(LitRegressor(width=8, **hparams), SyntheticRegressionDataModule(num_points=120, seed=seed))
