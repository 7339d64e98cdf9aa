"""Promises that callbacks, monitors and writers keep together, for many kinds of training.

- Training is bit-identical with and without the monitors.
- Two ranks write what one process with the whole batch writes, and no rank waits for another one's batches.
- Compiled networks are watched like others.
"""

import math
import pickle
import re
import threading
from datetime import timedelta

import lightning
import numpy as np
import pytest
import torch
from helpers import MemoryLogger, quiet_trainer, read_events, run_on_lightning_ranks, scalar
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnlightning import ActivationMonitor, BatchNorm1d, BatchNormMonitor, GradientMonitor, PredictionMonitor, tap

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")]


class Halves(lightning.LightningModule):
    """Each rank takes its part of every batch, so that any number of ranks sees the same samples in each step."""

    def __init__(self, act=nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), act(), nn.Dropout(0.0))
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.second(self.first(x)))

    def own(self, x):
        return x.tensor_split(self.trainer.world_size)[self.global_rank]

    def training_step(self, batch):
        x = self.own(batch[0])
        # The mean over all ranks of this is the mean over the whole batch, however uneven the parts are.
        return self(x).square().sum() * self.trainer.world_size / len(batch[0])

    def validation_step(self, batch):
        self(self.own(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InPlace(Halves):
    def __init__(self):
        super().__init__(lambda: nn.ReLU(inplace=True))


class Twice(Halves):
    def forward(self, x):
        return self.head(self.second(self.second(self.first(x))))


class Recomputed(Halves):
    def forward(self, x):
        return self.head(self.second(checkpoint(self.first, x, use_reentrant=False)))


class Mapped(Halves):
    class Both(nn.Tanh):
        def forward(self, x):
            return {"tanh": super().forward(x), "length": len(x)}

    def __init__(self):
        super().__init__()
        self.second[1] = self.Both()

    def forward(self, x):
        return self.head(self.second(self.first(x))["tanh"])


class Tapped(Halves):
    def forward(self, x):
        return self.head(tap(torch.sigmoid(self.second(self.first(x))), "gate", (0.01, 0.99)))


class Frozen(Halves):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


class Manual(Halves):
    automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()


SCENARIOS = {
    "plain": (Halves, {}),
    "uneven": (Halves, {"batch_size": 7}),
    "a rank without samples": (Halves, {"batch_size": 1, "samples": 6}),
    "accumulated gradients": (Halves, {"accumulate_grad_batches": 3, "batch_size": 3}),
    "bf16": (Halves, {"precision": "bf16-mixed"}),
    "deterministic": (Halves, {"deterministic": True}),
    "in-place ReLU": (InPlace, {}),
    "a module called twice": (Twice, {}),
    "activation checkpointing": (Recomputed, {}),
    "mapping as output": (Mapped, {}),
    "tap": (Tapped, {}),
    "frozen part": (Frozen, {}),
    "manual optimisation": (Manual, {}),
}


@pytest.fixture(autouse=True)
def _deterministic_cublas(monkeypatch):
    # Lightning would set it for good.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def monitors():
    return [ActivationMonitor(every_n_steps=2, output_gradients=True, effective_rank=True)]


def fit(name, directory, callbacks, **options):
    module_class, more = SCENARIOS[name]
    options = {"batch_size": 8, "samples": 40} | more | options
    batch_size, samples = options.pop("batch_size"), options.pop("samples")
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    loaders = [DataLoader(TensorDataset(x), batch_size=batch_size) for _ in range(2)]
    module = module_class()
    trainer = quiet_trainer(
        directory, max_epochs=2, callbacks=callbacks, val_check_interval=2, use_distributed_sampler=False, **options
    )
    trainer.fit(module, *loaders)
    torch.use_deterministic_algorithms(False)
    return module, trainer


@pytest.mark.parametrize("name", SCENARIOS)
def test_training_is_bit_identical(name, tmp_path):
    states = []
    for callbacks in ([], monitors()):
        module, trainer = fit(name, tmp_path / str(len(callbacks)), callbacks)
        states.append((module.state_dict(), trainer.optimizers[0].state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def _fit_all(rank, directory):
    for name in SCENARIOS:
        strategy = DDPStrategy(timeout=timedelta(seconds=60), find_unused_parameters=True)
        fit(name, directory / "ranks" / name, monitors(), devices=2, strategy=strategy)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The event files of all scenarios on two ranks."""
    directory = tmp_path_factory.mktemp("two")
    run_on_lightning_ranks(_fit_all, 2, directory, directory)
    return directory / "ranks"


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_write_what_one_process_writes(name, ranks, tmp_path):
    fit(name, tmp_path, monitors())
    one, two = read_events(tmp_path), read_events(ranks / name)
    assert len(list((ranks / name).glob("*tfevents*"))) == 1
    tags = one.Tags()
    assert two.Tags()["scalars"] == tags["scalars"] and two.Tags()["histograms"] == tags["histograms"]
    assert {"layer_dead/first.2", "layer_grad_std/first.2", "layer_val_dead/first.2"} <= set(tags["scalars"]) or (
        name == "frozen part"
    )
    tolerance = 2e-2 if name == "bf16" else 1e-4
    for tag in tags["scalars"]:
        mine, theirs = scalar(one, tag), scalar(two, tag)
        assert mine.keys() == theirs.keys(), tag
        for step, value in mine.items():
            assert theirs[step] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), (tag, step)
    for tag in tags["histograms"]:
        for mine, theirs in zip(one.Histograms(tag), two.Histograms(tag), strict=True):
            assert mine.step == theirs.step
            assert mine.histogram_value.num == theirs.histogram_value.num, (tag, mine.step)
            assert math.isclose(mine.histogram_value.max, theirs.histogram_value.max, rel_tol=tolerance, abs_tol=1e-6)
            assert np.isclose(mine.histogram_value.sum, theirs.histogram_value.sum, rtol=tolerance, atol=tolerance)


class Streamed(IterableDataset):
    """Without a length, as a stream has none; nothing on some ranks."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Predicting(Halves):
    """With a batch normalisation over all ranks, and the values that :class:`PredictionMonitor` keeps."""

    def __init__(self):
        super().__init__()
        self.second.insert(0, BatchNorm1d(8, sync=True))

    def validation_step(self, batch):
        return {"prediction": self(batch[0])}


def _validate_where_one_has_all(rank, directory, has_all):
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    streamed = Streamed([(row, row[:1]) for row in x] if rank == has_all else [])
    # With DDP's broadcasts of buffers, evaluations of unequal numbers of batches wait for ever without any monitor.
    strategy = DDPStrategy(timeout=timedelta(seconds=30), broadcast_buffers=False) if has_all is not None else "auto"
    trainer = quiet_trainer(
        directory / str(has_all),
        max_epochs=2,
        devices=1 if has_all is None else 2,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[*monitors(), GradientMonitor(2), BatchNormMonitor(2), PredictionMonitor(2)],
    )
    module, evaluation = Predicting(), DataLoader(streamed, batch_size=4)
    # Before the first step, so that what is told first is told of this.
    trainer.validate(module, evaluation, verbose=False)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=6), evaluation)
    return module.state_dict()


def _validate_where_either_has_all(rank, directory):
    return [_validate_where_one_has_all(rank, directory, has_all) for has_all in (0, 1)]


@pytest.mark.slow
def test_a_rank_without_any_batch_in_an_evaluation_is_not_waited_for(tmp_path):
    ranks = run_on_lightning_ranks(_validate_where_either_has_all, 2, tmp_path, tmp_path)
    state = _validate_where_one_has_all(None, tmp_path, None)
    one = read_events(tmp_path / "None")
    for has_all in (0, 1):
        for rank in ranks:
            torch.testing.assert_close(rank[has_all], state, rtol=1e-4, atol=1e-5)
        two = read_events(tmp_path / str(has_all))
        tags = [tag for tag in two.Tags()["scalars"] if "norm_rank_spread" not in tag]
        assert tags == one.Tags()["scalars"] and two.Tags()["histograms"] == one.Tags()["histograms"]
        for tag in (tag for tag in tags if "val_" in tag):
            assert scalar(two, tag) == pytest.approx(scalar(one, tag), rel=1e-3, abs=1e-4), (tag, has_all)
        for tag in ("health/watched/text_summary", "val/prediction"):
            first, second = (tensor_of(each, tag) for each in (one, two))
            assert first.dtype == second.dtype and (
                np.allclose(first, second, rtol=1e-3, atol=1e-4) if tag == "val/prediction" else first == second
            )


def tensor_of(events, tag):
    """The first."""
    return make_ndarray(events.Tensors(tag)[0].tensor_proto)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"first.1", "first.2", "second.1"}),
        ("a module called twice", {"first.1", "first.2", "second.1", "second.1#1"}),
        ("mapping as output", {"first.1", "first.2", "second.1:tanh"}),
        ("tap", {"first.1", "first.2", "second.1", "gate"}),
    ],
)
def test_what_is_watched(name, expected, tmp_path):
    fit(name, tmp_path, monitors())
    tags = read_events(tmp_path).Tags()["histograms"]
    assert {tag.removeprefix("layer_hist/") for tag in tags if tag.startswith("layer_hist/")} == expected


@pytest.mark.parametrize("name", ["plain", "activation checkpointing", "accumulated gradients", "uneven"])
def test_every_value_counts_once(name, tmp_path):
    fit(name, tmp_path, monitors())
    per_step = {"plain": 8, "activation checkpointing": 8, "accumulated gradients": 9, "uneven": 7}[name]
    events = read_events(tmp_path)
    for tag, units in (("layer_hist/first.2", 8), ("layer_grad_hist/first.2", 8)):
        assert events.Histograms(tag)[0].histogram_value.num == per_step * units
    assert {h.histogram_value.num for h in events.Histograms("layer_val_hist/second.1")} == {40 * 8}


class Compiled(Halves):
    """How people compile: the network, or parts of it."""

    def __init__(self, how="network", **options):
        super().__init__()
        self.how = how
        if how == "parts":
            self.first.compile(**options)
            self.second.compile(**options)
        elif how == "wrapped":
            self.first = torch.compile(self.first, **options)


# Parts share torch's limit of graphs, which an incomplete batch would exceed, with or without monitors.
SAMPLES = {"network": 42, "parts": 40, "wrapped": 40}


def fit_compiled(how, backend, directory, callbacks, **options):
    torch.compiler.reset()
    module = Compiled(how, backend=backend, fullgraph=True)
    fitted = torch.compile(module, backend=backend) if how == "network" else module
    x = torch.randn(SAMPLES[how], 6, generator=torch.Generator().manual_seed(1))
    loaders = [DataLoader(TensorDataset(x), batch_size=8) for _ in range(2)]
    trainer = quiet_trainer(directory, max_epochs=2, callbacks=callbacks, num_sanity_val_steps=1, **options)
    trainer.fit(fitted, *loaders)
    return module, trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
# Dynamo's own, of the second of two parts.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("network", "aot_eager"),
        # What is watched is settled before a backend gets the graph: one with code of its own is enough.
        pytest.param("network", "inductor", marks=pytest.mark.slow),
        pytest.param("parts", "aot_eager", marks=pytest.mark.slow),
        pytest.param("wrapped", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_are_watched_like_others(how, backend, tmp_path):
    monitor = ActivationMonitor(every_n_steps=3)
    compiled, _ = fit_compiled(how, backend, tmp_path / "compiled", [monitor])
    plain = Halves()
    x = torch.randn(SAMPLES[how], 6, generator=torch.Generator().manual_seed(1))
    loaders = [DataLoader(TensorDataset(x), batch_size=8) for _ in range(2)]
    trainer = quiet_trainer(
        tmp_path / "plain", max_epochs=2, callbacks=[ActivationMonitor(every_n_steps=3)], num_sanity_val_steps=1
    )
    trainer.fit(plain, *loaders)
    one, two = read_events(tmp_path / "plain"), read_events(tmp_path / "compiled")
    assert one.Tags()["scalars"] == two.Tags()["scalars"]
    for tag in one.Tags()["scalars"]:
        mine, theirs = scalar(one, tag), scalar(two, tag)
        assert list(mine) == list(theirs), tag
        assert list(theirs.values()) == pytest.approx(list(mine.values()), rel=1e-3, abs=1e-4), tag
    # And training is what it is without.
    without, _ = fit_compiled(how, backend, tmp_path / "without", [])
    torch.testing.assert_close(compiled.state_dict(), without.state_dict(), rtol=0, atol=0)


class Normed(Halves):
    def __init__(self):
        super().__init__()
        self.first[1] = nn.BatchNorm1d(8)


class Convolutional(Normed):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.first = nn.Sequential(*layers, self.first)
        self.first.compile()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning")
def test_inductor_computes_the_same_in_steps_that_are_looked_at():
    states = []
    for callbacks in ([], [ActivationMonitor(2), BatchNormMonitor(2)]):
        torch.compiler.reset()
        module = Convolutional()
        x = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        quiet_trainer(max_epochs=5, callbacks=callbacks).fit(module, DataLoader(TensorDataset(x), batch_size=16))
        states.append(module.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning")
@pytest.mark.parametrize(("where", "place"), [("second.0", "parameter second.0.weight"), ("input", "input:0")])
def test_a_compiled_network_names_the_layer_of_the_first_nonfinite_value(where, place, tmp_path):
    class Overflowing(Tapped):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 2:
                with torch.no_grad():
                    (batch[0] if where == "input" else self.get_submodule(where).weight).mul_(1e38).mul_(1e38)

    torch.compiler.reset()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).abs() + 0.1
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ActivationMonitor(every_n_steps=2)])
    model = torch.compile(Overflowing(), backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="at step 2 the first NaN|the batch of step 2"):
        trainer.fit(model, DataLoader(TensorDataset(x), batch_size=8))
    events = read_events(tmp_path)
    (found,) = events.Tensors("health/first_nonfinite_layer/text_summary")
    assert (found.step, found.tensor_proto.string_val[0].decode()) == (2, place)
    assert scalar(events, "layer_mean/gate")[0] > 0


class Derivative(Tapped):
    """A step as those of physics have it: derivatives of the network, one by one, and the network itself."""

    def training_step(self, batch):
        derivative = torch.func.vmap(torch.func.grad(lambda x: super(Derivative, self).forward(x).sum()))(batch[0])
        return derivative.square().mean() + self(batch[0]).square().mean()


def fit_derivative(callbacks, logger=False):
    torch.manual_seed(0)
    module = Derivative()
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, logger=logger)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    return module.state_dict()


@pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning")
@pytest.mark.parametrize("options", [{}, {"check_finite_every_n_steps": None}, {"output_gradients": True}])
def test_transforms_of_the_network_do_no_harm_and_are_told_once(options):
    logger = MemoryLogger()
    with pytest.warns(UserWarning, match=r"leaves out first\.0 and whatever else is called inside a transform") as told:
        watched = fit_derivative([ActivationMonitor(2, **options), GradientMonitor(1)], logger)
    assert sum("transform" in str(each.message) for each in told) == 1
    torch.testing.assert_close(watched, fit_derivative([]), rtol=0, atol=0)
    assert ("layer_mean/gate", 2) in logger.scalars and ("layer_mean/gate#1", 2) not in logger.scalars


class Exports(lightning.Callback):
    """Exports the network in all ways, in the middle of a fit and at its end."""

    def __init__(self):
        self.programs = []

    def on_train_end(self, *hook):
        net, x = hook[1].first, torch.ones(4, 6)
        program = torch.export.export(net, (x,)).run_decompositions()
        recorded = [program.graph, torch.jit.script(net).inlined_graph, torch.jit.trace(net, x).inlined_graph]
        self.programs += [re.sub(r" #.*|___torch_mangle_\d+\.|\d+", "", str(each)) for each in recorded]
        self.programs.append(b"bnlightning.monitors" in pickle.dumps(net))
        torch.compile(net, backend="eager")(x)

    on_train_epoch_end = on_train_batch_end = on_validation_end = on_train_end


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_network_is_exported_as_if_there_were_no_monitor():
    programs = []
    for monitors in ([], [ActivationMonitor(1), GradientMonitor(1), BatchNormMonitor(1)]):
        torch.manual_seed(0)
        exports, logger = Exports(), MemoryLogger()
        loader = DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=8)
        trainer = quiet_trainer(max_epochs=2, callbacks=[*monitors, exports], logger=logger)
        trainer.fit(Normed(), loader, loader)
        programs.append(exports.programs)
    assert programs[0] == programs[1] and len(programs[0]) == 4 * (6 + 2 + 2 + 1)
    # And the monitors went on.
    assert [step for tag, step in logger.scalars if tag == "layer_mean/first.2"] == list(range(6))
    assert [step for tag, step in logger.scalars if tag == "layer_val_mean/first.2"] == [3, 6]


class CompiledMethod(Normed):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


@torch.compile(backend="eager")
def call(module, x):
    return module(x)


class CompiledFunction(Normed):
    """The module knows nothing of what is compiled."""

    def forward(self, x):
        return self.head(self.second(call(self.first, x)))


@pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning")
@pytest.mark.parametrize("kind", [CompiledMethod, CompiledFunction])
def test_what_was_compiled_before_the_fit_is_watched(kind):
    torch.compiler.reset()
    module, logger = kind(), MemoryLogger()
    loader = DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=8)
    quiet_trainer(max_epochs=1).fit(module, loader)
    monitors = [ActivationMonitor(2), BatchNormMonitor(2)]
    quiet_trainer(max_epochs=1, callbacks=monitors, logger=logger).fit(module, loader)
    for tag in ("layer_mean/first.2", "norm_mean_drift/first.1"):
        assert [step for name, step in logger.scalars if name == tag] == [0, 2]


class Constant(Halves):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        tap(torch.full((len(x), 3), self.number), "number")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning")
def test_trainings_in_two_threads_have_their_own_taps():
    loggers = {1.0: MemoryLogger(), 2.0: MemoryLogger()}

    def train(number, logger):
        trainer = quiet_trainer(max_epochs=10, callbacks=[ActivationMonitor(2)], logger=logger)
        trainer.fit(Constant(number), DataLoader(TensorDataset(torch.randn(24, 6)), batch_size=8))

    threads = [threading.Thread(target=train, args=each) for each in loggers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logger in loggers.items():
        values = [value for (tag, _), value in logger.scalars.items() if tag.startswith("layer_mean/number")]
        assert values == [number] * 15
