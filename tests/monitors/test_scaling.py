"""What `docs/scaling.md` says of bytes, collectives and sums, held against the code."""

import os
import re
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import quiet_trainer, run_on_ranks
from lightning import LightningModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import ActivationMonitor, BatchNorm1d, BatchNormMonitor, GradientMonitor
from bnlightning.monitors.counting import ranks as _ranks
from bnlightning.monitors.counting.layer_statistics import LayerCounts, layer_catalogue
from bnlightning.monitors.counting.layers import LayerAccumulators, LayerKey
from bnlightning.monitors.counting.parameters import ParameterAccumulators

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CHANNELS, UNITS = 7, 6
SIZES = (2, 5)
STEPS = 2


@pytest.fixture
def document():
    return (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _traffic

    return _traffic


class Blocks(LightningModule):
    """Each with a batch norm, an activation without bounds and one with bounds."""

    def __init__(self, number):
        super().__init__()
        blocks = [
            (nn.Linear(UNITS, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, UNITS), nn.Tanh())
            for _ in range(number)
        ]
        self.net = nn.Sequential(*(layer for block in blocks for layer in block))

    def training_step(self, batch):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


MONITORS = {
    "ActivationMonitor": lambda: ActivationMonitor(every_n_steps=1),
    "no check": lambda: ActivationMonitor(every_n_steps=1, check_finite_every_n_steps=None),
    "output_gradients": lambda: ActivationMonitor(every_n_steps=1, output_gradients=True),
    "effective_rank": lambda: ActivationMonitor(every_n_steps=1, effective_rank=True),
    "GradientMonitor": lambda: GradientMonitor(every_n_steps=1),
    "BatchNormMonitor": lambda: BatchNormMonitor(every_n_steps=1),
}


def count_collectives(sent):
    """From here on ``sent`` gets the bytes of each collective that the package itself asks for."""

    def counted(real, own):
        def call(*tensors, **options):
            if sys._getframe(1).f_globals["__name__"].startswith("bnlightning"):
                sent.append(own(tensors))
            return real(*tensors, **options)

        return call

    gather = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    for name in ("all_reduce", gather):
        place = int(name == gather)
        size = lambda tensors, place=place: tensors[place].numel() * tensors[place].element_size()  # noqa: E731
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name), size))
    for name in ("all_gather_object", "broadcast_object_list"):
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name), lambda _, name=name: name))


def messages_on_rank(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    sent, found = [], {}
    count_collectives(sent)
    data = DataLoader(TensorDataset(torch.randn(4 * STEPS * 2, UNITS)), batch_size=4)
    for number in SIZES:
        for name, monitor in MONITORS.items():
            sent.clear()
            trainer = quiet_trainer(
                strategy="ddp", devices=2, plugins=[LightningEnvironment()], max_steps=STEPS, callbacks=[monitor()]
            )
            trainer.fit(Blocks(number), data)
            found[name, number] = sent.copy()
        mesh = init_device_mesh("cpu", (2,))
        parameters = {str(index): nn.Parameter(torch.randn(4, 3)) for index in range(number)}
        for path, parameter in parameters.items():
            parameters[path] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            parameters[path].grad = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        sent.clear()
        # One without a histogram.
        rows = ParameterAccumulators(parameters, list(parameters)[1:], CPU)
        rows.record(parameters.values())
        with torch.no_grad():
            rows.finish()
        found["GradientMonitor, sharded", number] = sent.copy()
        sent.clear()
        BatchNorm1d(number, sync=True)(torch.randn(4, number, requires_grad=True)).sum().backward()
        found["sync=True", number] = sent.copy()
    return found


def formulas(document):
    """By what it is of, the number of collectives and the bytes, as the document has them."""
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| (\d+) \| `([^`]+)`", document, re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows})
    return {name: (int(number), formula) for name, number, formula in rows}


@pytest.mark.slow
def test_bytes_and_collectives_are_those_of_the_document(document, traffic, tmp_path):
    stated = formulas(document)
    for found in run_on_ranks(messages_on_rank, 2, tmp_path):
        for number in SIZES:
            layers = [(0, False), (CHANNELS, False), (UNITS, True)] * number
            expected = {
                "ActivationMonitor": traffic.activation_messages(layers),
                "no check": traffic.activation_messages(layers, checks=False),
                "output_gradients": traffic.activation_messages([*layers, *[(0, False)] * len(layers)]),
                "effective_rank": traffic.activation_messages(layers, effective_rank=True),
                "BatchNormMonitor": traffic.batch_norm_messages([CHANNELS] * number),
            }
            for name, messages in expected.items():
                # When the training ends, it is asked whether the last evaluation is still to be written, and once more
                # whether a rank has seen a non-finite value.
                last = [2 * traffic.NUMBER] if "Batch" not in name else []
                last += [traffic.NUMBER] if "Batch" not in name and name != "no check" else []
                assert found[name, number] == messages * STEPS + last, name
            assert found["GradientMonitor", number] == []
            sharded = traffic.gradient_messages(number, number - 1, sharded=True)
            assert found["GradientMonitor, sharded", number] == sharded
            assert found["sync=True", number] == traffic.sync_messages(number)

            sizes = {
                "ActivationMonitor": {"L": 3 * number, "U": CHANNELS * number, "S": UNITS * number},
                "GradientMonitor": {"P": number, "H": number - 1},
                "BatchNormMonitor": {"L": number, "C": CHANNELS * number},
                "sync=True": {"C": number},
            }
            expected |= {"GradientMonitor": sharded, "sync=True": traffic.sync_messages(number)}
            assert stated.keys() == sizes.keys()
            for name, (collectives, formula) in stated.items():
                assert collectives == len(expected[name]), name
                assert eval(formula, {"__builtins__": {}}, sizes[name]) == sum(expected[name]), formula


def test_tables_of_the_document_are_the_program_s(document, traffic, capsys):
    import scaling

    results = (ROOT / "benchmarks" / "results" / "scaling.md").read_text(encoding="utf-8")
    scaling.print_models()
    models = capsys.readouterr().out
    assert models in results
    tables = re.findall(r"^(?:\|.*\n)+", document, re.MULTILINE)
    of_program = [table for table in tables if table in results]
    # Those of the models, of the seconds, of the parts of a publication, of the file, and of layers that differ.
    assert len(of_program) == 6
    assert sum(table in models for table in of_program) == 2


class Simulated:
    """Ranks that reduce one after another in this process: what all together would have got, the last one gets.

    Maxima come first, and what follows depends on them: they must be known from an earlier round.
    """

    def __init__(self, maxima=None):
        self.sums = []
        self.maxima = {}
        self.known = maxima or {}
        self.is_last = False

    def reduce(self, window):
        calls = iter(range(1000))
        with (
            patch.object(_ranks, "world_size", lambda: 2),
            patch.object(torch.distributed, "all_reduce", lambda tensor, op: self.add(next(calls), tensor, op)),
        ):
            return window.reduce(CPU)

    def add(self, call, tensor, op):
        if op == torch.distributed.ReduceOp.MAX and self.known:
            tensor.copy_(self.known[call])
        if call == len(self.sums):
            self.sums.append(tensor.clone())
        elif op == torch.distributed.ReduceOp.SUM:
            self.sums[call] += tensor
        else:
            torch.maximum(self.sums[call], tensor, out=self.sums[call])
        if op == torch.distributed.ReduceOp.MAX:
            self.maxima[call] = self.sums[call]
        if self.is_last:
            tensor.copy_(self.sums[call])


@pytest.mark.parametrize("ranks", [64, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [0, 1])
def test_many_ranks_in_any_order_are_one_process(ranks, seed):
    rng = np.random.default_rng(seed)
    samples = 8 * ranks
    x = rng.normal(size=(samples, 5)) * 10.0 ** rng.integers(-4, 4, size=(1, 5))
    x[:, 4] = 0.0
    x[rng.integers(samples), 0] = np.nan
    values = {
        LayerKey("relu", True, 5): torch.tensor(np.maximum(x, 0), dtype=torch.float32),
        LayerKey("tanh", True, 5, (-0.99, 0.99)): torch.tensor(np.tanh(x), dtype=torch.float32),
        LayerKey("far", False, is_gradient=True): torch.tensor(1e3 + x, dtype=torch.float32),
    }
    one, order = LayerAccumulators(), rng.permutation(samples)
    # Each at least one sample, some many.
    ends = np.sort(rng.choice(np.arange(1, samples), ranks - 1, replace=False))
    windows = []
    for part in np.split(order, ends):
        windows.append(LayerAccumulators())
        for key, all_values in values.items():
            windows[-1].update(key, all_values[part])
    first = Simulated()
    for window in windows:
        first.reduce(window)
    many = Simulated(first.maxima)
    for number, window in enumerate(windows):
        many.is_last = number == ranks - 1
        together = many.reduce(window)
    for key, all_values in values.items():
        one.update(key, all_values)
    assert len(many.sums) == 4
    for key, alone in one.reduce(CPU).items():
        found = together[key]
        exact = values[key].double().numpy()
        finite = exact[np.isfinite(exact)]
        np.testing.assert_array_equal(found.bins, alone.bins)
        assert (found.numel, found.finite) == (exact.size, finite.size)
        assert (found.minimum, found.maximum) == (finite.min(), finite.max())
        assert found.sum == pytest.approx(finite.sum(), abs=1e-6 * np.abs(finite).sum())
        assert found.sum_squares == pytest.approx((finite**2).sum(), rel=1e-5)
        if key.units:
            assert found.units.samples == samples
            np.testing.assert_array_equal(found.units.nonzero, (exact != 0).sum(axis=0))
            np.testing.assert_allclose(found.units.magnitude, np.nansum(np.abs(exact), axis=0), rtol=1e-5)
        numbers = [layer_catalogue().numbers(LayerCounts(key, each, each.units)) for each in (found, alone)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 40])
def test_ring_takes_the_steps_and_bytes_of_the_model(ranks, traffic):
    values = np.random.default_rng(0).integers(0, 100, size=(ranks, ranks, 4))
    held, steps, sent = values.copy(), 0, 0
    for phase in range(2):
        for step in range(ranks - 1):
            # Every rank passes one of the parts on to the next one: first what it has added up, then what is complete.
            moved = [held[rank, (rank - step + phase) % ranks].copy() for rank in range(ranks)]
            for rank, part in enumerate(moved):
                target = held[(rank + 1) % ranks, (rank - step + phase) % ranks]
                target[:] = target + part if phase == 0 else part
            steps += 1
            sent += moved[0].nbytes
    np.testing.assert_array_equal(held, np.broadcast_to(values.sum(axis=0), values.shape))
    slow = traffic.Network(launch=0, inside=1, between=1, bandwidth=float("inf"))
    narrow = traffic.Network(launch=0, inside=0, between=0, bandwidth=1)
    assert traffic.ring_all_reduce(values[0].nbytes, ranks, slow) == steps
    assert traffic.ring_all_reduce(values[0].nbytes, ranks, narrow) == pytest.approx(sent)
