"""The promise that models, data and monitors keep together: several ranks are as one process with the whole batch.

That holds for weights, logged losses and everything monitors log, even if the ranks' parts of a batch differ in size.
Also here: the modules' check of the data for batches of one.
"""

from contextlib import nullcontext

import lightning
import pytest
import torch
from helpers import quiet_trainer, read_events, run_on_lightning_ranks, scalar
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn.modules.batchnorm import _BatchNorm

from bnlightning import (
    CONF_DIR,
    ActivationMonitor,
    BatchNormMonitor,
    GradientMonitor,
    LitClassifier,
    LitConvClassifier,
    LitRegressor,
    SyntheticRegressionDataModule,
)
from bnlightning.data import TensorBatches

SYNC = {"eps": 1e-3, "momentum": 0.3, "convention": "keras", "sync": True}
# On two ranks the last of the steps of 12 has parts of 3 and 2 samples, on three parts of 1, 1 and none.
SAMPLES = {2: 41, 3: 38}


class Samples(lightning.LightningDataModule):
    def __init__(self, world_size, images):
        super().__init__()
        x = torch.randn(SAMPLES[world_size], 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x[:, 0, 0, :5].argmax(dim=1)
        self.samples = (x, y) if images else (x[:, 0, 0, :1] * 3, (x[:, 0, 0, :1] * 3).square() - 5)

    def batches(self):
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return TensorBatches(*self.samples, batch_size=12 // world_size, rank=rank, world_size=world_size)

    train_dataloader = val_dataloader = test_dataloader = batches


def regressor(**options):
    return LitRegressor(depth=2, width=6, weight_std=0.5, learning_rate=0.01, **options)


def classifier(**options):
    return LitClassifier(width=[7, 6], in_features=36, num_classes=5, learning_rate=0.1, **options)


def conv_classifier(**options):
    return LitConvClassifier(
        channels=[3], features=[6], in_shape=[1, 6, 6], num_classes=5, learning_rate=0.1, **options
    )


SCENARIOS = {
    "regressor": (regressor, {"norm_options": SYNC}, {}),
    "no normalisation": (regressor, {"norm": "none"}, {}),
    "classifier": (classifier, {"norm_options": SYNC}, {}),
    "convolutions": (conv_classifier, {"norm_options": SYNC}, {}),
    "accumulated gradients": (classifier, {"norm_options": SYNC}, {"accumulate_grad_batches": 2}),
}
SAMPLE_A_RANK = [("custom", {"sync": True}), ("custom", {}), ("torch", {"sync": True})]


def fit(name, world_size, directory, **ranks):
    make, options, trainer_options = SCENARIOS[name]
    torch.manual_seed(0)
    # In float64, so that what differs by more than rounding shows.
    model = make(**options).double()
    monitors = [
        ActivationMonitor(every_n_steps=3, output_gradients=True, effective_rank=True),
        GradientMonitor(every_n_steps=3),
        *([BatchNormMonitor(every_n_steps=3)] if "norm_options" in options else []),
    ]
    trainer = quiet_trainer(directory / name, max_epochs=2, callbacks=monitors, **trainer_options, **ranks)
    data = Samples(world_size, images=make is not regressor)
    trainer.fit(model, data)
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
    if make is not regressor:
        (tested,) = trainer.test(model, data, verbose=False)
        metrics |= tested
    return {key: value.clone() for key, value in model.state_dict().items()}, metrics


def sample_a_rank(norm, options):
    """Steps taken with a last step of two samples, one on each of two ranks; or why none were."""
    data = SyntheticRegressionDataModule(num_points=22, batch_size=10)
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=1, limit_val_batches=0)
    try:
        trainer.fit(LitRegressor(norm=norm, norm_options=options, depth=1, width=3), data)
    except ValueError as error:
        return str(error)
    return trainer.global_step


def fit_on_rank(rank, world_size, directory):
    refused = [sample_a_rank(*each) for each in SAMPLE_A_RANK] if world_size == 2 else []
    return {name: fit(name, world_size, directory, devices=world_size, strategy="ddp") for name in SCENARIOS}, refused


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """How many there are, where they write, and what each returns."""
    directory, world_size = tmp_path_factory.mktemp("ranks"), request.param
    return world_size, directory, run_on_lightning_ranks(fit_on_rank, world_size, directory, world_size, directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_are_as_one_process_with_the_whole_batch(name, ranks, tmp_path):
    world_size, directory, returned = ranks
    state, metrics = fit(name, world_size, tmp_path)
    for results, _ in returned:
        torch.testing.assert_close(results[name][0], state, rtol=1e-9, atol=1e-9)
        # The one number that a process alone does not have.
        shared = {tag: value for tag, value in results[name][1].items() if "norm_rank_spread" not in tag}
        assert shared == pytest.approx(metrics, rel=1e-6)
    one, several = read_events(tmp_path / name), read_events(directory / name)
    scalars, histograms = set(one.Tags()["scalars"]), set(one.Tags()["histograms"])
    more = {tag for tag in several.Tags()["scalars"] if "norm_rank_spread" in tag}
    assert set(several.Tags()["scalars"]) - more == scalars and bool(more) == (name != "no normalisation")
    assert set(several.Tags()["histograms"]) == histograms
    for tag in scalars:
        mine, theirs = without_noise(one, tag), without_noise(several, tag)
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-6), tag
    for tag in histograms:
        mine, theirs = ({item.step: item.histogram_value for item in each.Histograms(tag)} for each in (one, several))
        assert theirs.keys() == mine.keys()
        for step in mine.keys() - noisy_steps(one, tag):
            first, second = mine[step], theirs[step]
            assert second.num == first.num and counts(second) == counts(first), (tag, step)
            for number in ("min", "max", "sum", "sum_squares"):
                assert getattr(second, number) == pytest.approx(getattr(first, number), rel=1e-5, abs=1e-4), tag


def noisy_steps(events, tag):
    """Those at which the parameter's gradient is rounding alone: in front of a normalisation a bias has none."""
    norm = f"param_grad_norm/{tag.partition('/')[2]}"
    if norm not in events.Tags()["scalars"]:
        return set()
    return {step for step, value in scalar(events, norm).items() if value < 1e-9}


def counts(histogram):
    """Those of the bins. Where the outermost value is rounding alone, its sign decides how many empty bins follow."""
    counted = list(histogram.bucket)
    if min(abs(histogram.min), abs(histogram.max)) < 1e-12:
        return [count for count in counted if count]
    return counted


def without_noise(events, tag):
    return {step: value for step, value in scalar(events, tag).items() if step not in noisy_steps(events, tag)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_sample_a_rank_is_enough_where_they_are_taken_together(ranks):
    _, _, returned = ranks
    assert len(returned) == 2
    for _, found in returned:
        assert found[0] == 2
        for norm, message in zip(("custom", "torch"), found[1:], strict=True):
            assert message.startswith(f"batch_size=10 is not possible with norm='{norm}': it leaves a batch of one")


@pytest.mark.parametrize("model", ["regressor", "classifier", "conv_classifier", "moving_average"])
def test_the_configuration_synchronises_by_one_key(model):
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        config = compose("train", overrides=[f"model={model}", "model.norm_options.sync=true"])
    module = instantiate(config.model, _convert_="all")
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    assert layers and all(layer.sync for layer in layers)


@pytest.mark.parametrize("sync", [False, True])
def test_a_batch_of_one_with_sync_is_refused_only_by_a_trainer_of_one_rank(sync):
    options = {"depth": 1, "width": 4, "norm_options": {"sync": sync}}
    model, data = LitRegressor(**options), SyntheticRegressionDataModule(num_points=20, batch_size=1)
    refused = pytest.raises(ValueError, match=r"^batch_size=1 is not possible with norm='custom'")
    # Before there is a Trainer nobody knows how many ranks there will be.
    with nullcontext() if sync else refused:
        model.check_data(data)
    with refused:
        quiet_trainer(max_epochs=1).fit(model, data)
