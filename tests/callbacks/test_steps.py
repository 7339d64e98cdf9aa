import copy
from types import SimpleNamespace

import lightning
import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, Timer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnlightning import ActivationMonitor
from bnlightning.callbacks._steps import EvaluationCadence, StepAxis, logged_step, step_count, steps_taken

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:UserWarning"),
]


def trainer(step, fn="fit", sanity=False, batches=None, automatic=True, **options):
    """What the callbacks ask a Trainer, without one."""
    epoch_loop = SimpleNamespace() if batches is None else SimpleNamespace(_batches_that_stepped=batches)
    asked = {
        "global_step": step,
        "sanity_checking": sanity,
        "state": SimpleNamespace(fn=fn),
        "fit_loop": SimpleNamespace(epoch_loop=epoch_loop, batch_idx=step - 1),
        "lightning_module": SimpleNamespace(automatic_optimization=automatic),
        "callbacks": [],
        "should_stop": False,
        "val_check_batch": 4,
        "num_training_batches": 1000,
        "max_epochs": 1,
        "max_steps": -1,
        "check_val_every_n_epoch": 1,
        "current_epoch": 0,
    }
    return SimpleNamespace(**(asked | options))


def test_the_logged_step_counts_batches_where_lightning_tells():
    # Two optimizers: as many steps again.
    assert logged_step(trainer(8, batches=4)) == 4
    assert logged_step(trainer(8)) == 8


def test_an_evaluation_stands_behind_the_batch_that_has_stepped():
    axis = StepAxis()
    assert axis.evaluation(trainer(6, batches=6)) == 6
    axis.start_batch(trainer(6, batches=6))
    assert axis.batch == 6
    # Amid an accumulation nothing has stepped yet.
    assert axis.evaluation(trainer(6, batches=6)) == 6
    assert axis.evaluation(trainer(7, batches=6)) == 7
    # Raw optimizers do not count.
    assert axis.evaluation(trainer(6, batches=6, automatic=False)) == 7
    assert axis.evaluation(trainer(7, fn="validate", batches=7)) == 7


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Net):
    """Takes its steps in one of the ways that Lightning does not prescribe."""

    automatic_optimization = False

    def __init__(self, raw=True, every=1, optimizers=1, configured=True, closure=False):
        super().__init__()
        self.raw, self.every, self.number, self.configured, self.closure = raw, every, optimizers, configured, closure
        self.own = [] if configured else self.made()
        self.taken = 0

    def made(self):
        kind = torch.optim.LBFGS if self.closure else torch.optim.SGD
        return [kind(self.parameters(), lr=0.01) for _ in range(self.number)]

    def loss(self, batch):
        self.zero_grad()
        loss = self.net(batch[0]).square().mean()
        self.manual_backward(loss)
        return loss

    def training_step(self, batch, batch_idx):
        found = self.optimizers(use_pl_optimizer=not self.raw) if self.configured else self.own
        for optimizer in found if isinstance(found, list) else [found]:
            if not self.closure:
                self.loss(batch)
            if (batch_idx + 1) % self.every == 0:
                optimizer.step(lambda: self.loss(batch)) if self.closure else optimizer.step()
                self.taken += 1

    def configure_optimizers(self):
        return self.made() if self.configured else None


class Stream(IterableDataset):
    def __init__(self, data=None):
        self.data = torch.ones(8, 2) if data is None else data

    def __iter__(self):
        return iter([(x,) for x in self.data])


def batches(number=8):
    return DataLoader(TensorDataset(torch.ones(number, 2)), batch_size=1)


class Counted(lightning.Callback):
    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        step_count(trainer).start(trainer)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(steps_taken(trainer))
        assert self.steps[-1] == pl_module.taken

    def on_train_end(self, trainer, pl_module):
        step_count(trainer).stop(trainer)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4]),
        ({"raw": False}, [1, 2, 3, 4]),
        ({"optimizers": 2}, [2, 4, 6, 8]),
        ({"optimizers": 2, "raw": False}, [2, 4, 6, 8]),
        ({"every": 2}, [0, 1, 1, 2]),
        ({"configured": False}, [1, 2, 3, 4]),
        ({"closure": True}, [1, 2, 3, 4]),
        ({"closure": True, "raw": False}, [1, 2, 3, 4]),
    ],
)
def test_steps_are_counted_however_they_are_taken(options, expected):
    counted, model = Counted(), Manual(**options)
    made = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[counted])
    made.fit(model, batches(4))
    assert counted.steps == expected
    # Steps behind the fit, and of other networks, are none of it.
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert steps_taken(made) == expected[-1]


def test_the_count_goes_on_in_a_second_fit_and_a_copy_has_no_part_in_it():
    counted, model = Counted(), Manual()
    made = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[counted])
    made.fit(model, batches(4))
    made.fit_loop.max_epochs = 2
    made.fit(model, batches(4))
    assert steps_taken(made) == 8
    count = step_count(made)
    count.start(made)
    other = copy.deepcopy(count)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    made.optimizers[0].step()
    assert (count.taken(made), other.taken(made)) == (9, 8)
    count.stop(made)


class Evaluated(lightning.Callback):
    """Notes the steps of all evaluations, of those looked at, and of those that count."""

    def __init__(self, every=1000):
        self.cadence = EvaluationCadence(every)
        self.all, self.looked_at, self.due = [], [], []

    def on_train_start(self, trainer, pl_module):
        step_count(trainer).start(trainer)
        self.cadence.start(trainer)

    def on_validation_start(self, trainer, pl_module):
        self.all.append(steps_taken(trainer))
        if self.cadence.is_looked_at(trainer):
            self.looked_at.append(self.all[-1])
            if not self.cadence.is_aside:
                self.due.append(self.all[-1])

    def on_train_end(self, trainer, pl_module):
        if self.cadence.ends_with_aside(pl_module.device):
            self.due.append(self.cadence.last)
        step_count(trainer).stop(trainer)


def stop_at_five(trainer, pl_module):
    trainer.should_stop = trainer.should_stop or trainer.current_epoch == 4


class Stopping(lightning.Callback):
    def on_validation_end(self, trainer, pl_module):
        stop_at_five(trainer, pl_module)


class StoppingAmidTheEpoch(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.current_epoch == 4 and batch_idx == 3


class StoppingNet(Net):
    def on_train_epoch_end(self):
        stop_at_five(self.trainer, self)


EPOCHS = {"max_epochs": 8}


@pytest.mark.filterwarnings("ignore:.*should_stop.*:UserWarning")
@pytest.mark.parametrize(
    ("module", "data", "options", "callbacks", "first", "last"),
    [
        pytest.param(Net, batches, EPOCHS, [], 8, 64, id="epochs"),
        pytest.param(Net, lambda: DataLoader(Stream()), EPOCHS, [], 8, 64, id="no length"),
        pytest.param(lambda: Manual(raw=False, optimizers=2), batches, EPOCHS, [], 16, 128, id="two steps a batch"),
        pytest.param(lambda: Manual(optimizers=2), batches, EPOCHS, [], 16, 128, id="two raw steps a batch"),
        pytest.param(Net, batches, EPOCHS, [EarlyStopping, "val/loss", 2, 1e9], 8, 24, id="early stopping"),
        pytest.param(Net, batches, EPOCHS, [Stopping], 8, 40, id="a callback behind the evaluation"),
        pytest.param(Net, batches, EPOCHS, [StoppingAmidTheEpoch], 8, 36, id="a callback amid the epoch"),
        pytest.param(Net, batches, EPOCHS, [LambdaCallback, stop_at_five], 8, 40, id="a function"),
        pytest.param(StoppingNet, batches, EPOCHS, [], 8, 40, id="the module"),
        pytest.param(Net, batches, {"max_epochs": -1, "max_steps": 60}, [], 8, 56, id="steps"),
        pytest.param(Net, batches, {"max_epochs": -1}, [Stopping], 8, 40, id="no end"),
        pytest.param(Net, batches, EPOCHS | {"limit_train_batches": 3}, [], 3, 24, id="limit"),
        pytest.param(Net, batches, EPOCHS | {"val_check_interval": 3}, [], 3, 62, id="within epochs"),
        pytest.param(
            Net,
            batches,
            EPOCHS | {"val_check_interval": 5, "check_val_every_n_epoch": None},
            [],
            5,
            60,
            id="over epochs",
        ),
        pytest.param(
            Net,
            lambda: DataLoader(Stream()),
            EPOCHS | {"val_check_interval": 5, "check_val_every_n_epoch": None},
            [],
            5,
            60,
            id="over epochs, no length",
        ),
        pytest.param(Net, batches, {"max_epochs": 7, "check_val_every_n_epoch": 3}, [], 24, 48, id="some epochs"),
        pytest.param(Net, batches, EPOCHS | {"accumulate_grad_batches": 4}, [], 2, 16, id="accumulation"),
    ],
)
def test_the_first_and_the_last_evaluation_count_however_the_fit_ends(module, data, options, callbacks, first, last):
    evaluated = Evaluated()
    if callbacks and callbacks[0] is EarlyStopping:
        _, monitor, patience, delta = callbacks
        others = [EarlyStopping(monitor, patience=patience, min_delta=delta, check_on_train_epoch_end=True)]
    elif callbacks and callbacks[0] is LambdaCallback:
        others = [LambdaCallback(on_validation_end=callbacks[1])]
    else:
        others = [make() for make in callbacks]
    quiet_trainer(callbacks=[evaluated, *others], **options).fit(module(), data(), batches(1))
    assert evaluated.due == [first, last]
    assert evaluated.all[0] == first and evaluated.all[-1] == last


@pytest.mark.parametrize(
    ("options", "at_most"),
    [
        (EPOCHS, 2),
        ({"max_epochs": -1, "max_steps": 60}, 4),
        (EPOCHS | {"val_check_interval": 1}, 2),
        ({"max_epochs": -1, "max_steps": 63, "val_check_interval": 1}, 4),
    ],
)
def test_an_evaluation_that_cannot_be_the_last_is_not_looked_at(options, at_most):
    evaluated = Evaluated()
    quiet_trainer(callbacks=[evaluated], **options).fit(Net(), batches(), batches(1))
    assert len(evaluated.looked_at) <= at_most and len(evaluated.all) >= 7


@pytest.mark.parametrize("stopping", [Timer(), ActivationMonitor(stop_on_nonfinite=True), SimpleNamespace(name="mine")])
def test_what_may_stop_a_fit_makes_every_evaluation_a_possible_last_one(stopping):
    if isinstance(stopping, SimpleNamespace):
        stopping.on_validation_end = test_what_may_stop_a_fit_makes_every_evaluation_a_possible_last_one
    cadence = EvaluationCadence(10)
    assert cadence.is_looked_at(trainer(4)) and not cadence.is_aside
    assert not cadence.is_looked_at(trainer(8))
    assert cadence.is_looked_at(trainer(8, callbacks=[stopping])) and cadence.is_aside


def test_evaluations_are_due_at_a_distance():
    cadence = EvaluationCadence(10)
    due = [step for step in range(0, 101, 4) if cadence.is_looked_at(trainer(step))]
    assert due == [0, 12, 24, 36, 48, 60, 72, 84, 96]


@pytest.mark.parametrize("fn", ["validate", "test"])
def test_an_evaluation_outside_of_a_fit_is_always_due_and_a_sanity_check_never(fn):
    cadence = EvaluationCadence(10)
    assert cadence.is_looked_at(trainer(5, fn=fn)) and cadence.is_looked_at(trainer(5, fn=fn))
    assert not EvaluationCadence(10).is_looked_at(trainer(0, sanity=True))


@pytest.mark.parametrize(("start", "due"), [(5, False), (7, True)])
def test_an_evaluation_of_the_very_weights_that_a_fit_starts_from_counts(start, due):
    cadence = EvaluationCadence(10)
    cadence.is_looked_at(trainer(5, fn="validate"))
    cadence.start(trainer(start))
    assert cadence.is_looked_at(trainer(start + 1)) is due


def test_a_resumed_fit_keeps_the_distance():
    cadence = EvaluationCadence(10)
    cadence.resume(20)
    cadence.start(trainer(20), anew=False)
    assert [step for step in (22, 28, 30) if cadence.is_looked_at(trainer(step))] == [30]
