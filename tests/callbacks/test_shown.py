"""What the monitors show in training: pictures, warnings and their table, and that none of it ends a training."""

import html
import warnings
from datetime import timedelta
from unittest.mock import patch

import lightning
import pytest
import torch
from helpers import MemoryLogger, quiet_trainer, read_events, run_on_lightning_ranks
from lightning.pytorch.strategies import DDPStrategy
from markdown import markdown
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import ActivationMonitor, BatchNormMonitor, GradientMonitor, tap
from bnlightning.monitors.counting.layers import Sum
from bnlightning.monitors.statistic import Look, Statistic


class Net(lightning.LightningModule):
    """A net whose layer dies, comes back and at last fails, as a test says."""

    def __init__(self, act=nn.ReLU, fail_at=None, error=RuntimeError):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), act(), nn.Linear(8, 8), act())
        self.head = nn.Linear(8, 1)
        self.fail_at, self.error = fail_at, error

    def training_step(self, batch):
        if self.global_step == self.fail_at:
            raise self.error("stop")
        return self.head(self.body(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(batches=20):
    x = torch.randn(64 * batches, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=64)


def monitors(**limits):
    return [ActivationMonitor(2, window_samples=8, **limits), GradientMonitor(2), BatchNormMonitor(2)]


PICTURES = {
    "health/layers_by_step",
    "health/values_by_step",
    "health/gradients_by_step",
    "health/norms_by_step",
}
# The loaders have no workers, as they need none.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


def picture_steps(directory):
    events = read_events(directory)
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


def warnings_text(directory):
    """The tables of warnings, by step the last one."""
    found = read_events(directory).Tensors("health/warnings/text_summary")
    return {each.step: each.tensor_proto.string_val[0].decode() for each in found}


def test_pictures_are_drawn_early_and_then_ever_more_seldom(tmp_path):
    quiet_trainer(tmp_path, max_epochs=5, callbacks=monitors()).fit(Net(), loader(10))
    # After the second sample, at the end of the epochs 1, 2 and 4, and at the end.
    assert picture_steps(tmp_path) == {tag: [2, 8, 18, 38, 48] for tag in PICTURES}


def test_a_picture_is_not_drawn_just_before_the_end_of_the_first_epoch(tmp_path):
    quiet_trainer(tmp_path, max_epochs=1, callbacks=monitors()).fit(Net(), loader(5))
    assert picture_steps(tmp_path) == {tag: [4] for tag in PICTURES}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_sampled_until_a_failure_is_drawn(error, tmp_path):
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=monitors()).fit(Net(fail_at=7, error=error), loader())
    assert picture_steps(tmp_path) == {tag: [2, 6] for tag in PICTURES}
    assert warnings_text(tmp_path)[6].startswith("Nothing that was looked for was found up to step 6.")


def test_an_early_picture_is_there_while_the_training_goes_on(tmp_path):
    class Killed(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                self.trainer.logger.experiment.flush()
                seen.update(picture_steps(tmp_path))

    seen = {}
    quiet_trainer(tmp_path, max_epochs=1, callbacks=monitors()).fit(Killed(), loader())
    assert seen == {tag: [2] for tag in PICTURES}


class Dying(Net):
    """Its second activation is dead from step 4 to step 11."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx in (4, 12):
            with torch.no_grad():
                self.body[3].bias.fill_(-1000.0 if batch_idx == 4 else 0.0)


def test_a_warning_stands_in_the_table_of_all_monitors_and_ends(tmp_path):
    callbacks = monitors(warn_dead_above=0.9)
    callbacks[1] = GradientMonitor(2, warn_grad_norm_ratio_above=1e3)
    callbacks[2] = BatchNormMonitor(2, warn_var_drift_above=1e-9)
    with pytest.warns(UserWarning) as caught, patch("bnlightning.callbacks._monitor.rank_zero_info") as info:
        quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(Dying(), loader())
    told = [str(warning.message) for warning in caught if "Usual cures" in str(warning.message)]
    assert sorted(text.split("=")[0] for text in told) == [
        "ActivationMonitor(warn_dead_above",
        "BatchNormMonitor(warn_var_drift_above",
        "GradientMonitor(warn_grad_norm_ratio_above",
    ]
    texts = warnings_text(tmp_path)
    last = texts[max(texts)]
    assert any(row.startswith("| 4 | body.3.weight (Linear) | The gradient is zero") for row in last.splitlines())
    rows = [line for line in last.splitlines() if line.startswith("| ")][1:]
    dead = [row for row in rows if "are dead" in row]
    assert len(dead) == 1 and "body.4 (ReLU)" in dead[0] and "ended at step" in dead[0]
    assert any("body.1 (BatchNorm1d)" in row and "goes on" in row for row in rows)
    ended = [call.args[0] for call in info.call_args_list if "warn_dead_above" in call.args[0]]
    assert len(ended) == 1 and "no layer is above the limit any more at step 1" in ended[0]
    # The newest stands first.
    steps = [int(row.split("|")[1]) for row in rows]
    assert steps == sorted(steps, reverse=True)


def test_nothing_found_is_said_once_a_step_with_what_was_looked_for(tmp_path):
    quiet_trainer(tmp_path, max_epochs=1, callbacks=monitors(warn_dead_above=0.9)).fit(Net(), loader())
    found = read_events(tmp_path).Tensors("health/warnings/text_summary")
    assert len({each.step for each in found}) == len(found)
    last = warnings_text(tmp_path)[18]
    assert last.startswith("Nothing that was looked for was found up to step 18.")
    assert "**Not looked for**, since no limit is set: warn\\_dormant\\_above," in last
    assert "NaN and infinities" in last and "warn\\_dead\\_above=0.9" in last


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_warnings_that_went_on_are_not_told_again_behind_a_checkpoint(tmp_path):
    def callbacks():
        return [ActivationMonitor(2, window_samples=8, warn_dead_above=0.5)]

    class Dead(Net):
        def on_train_start(self):
            with torch.no_grad():
                self.body[3].bias.fill_(-1000.0)

    with pytest.warns(UserWarning, match="warn_dead_above"):
        trainer = quiet_trainer(tmp_path / "first", max_steps=5, callbacks=callbacks())
        trainer.fit(Dead(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # A warning would be an error.
    again = quiet_trainer(tmp_path / "second", max_steps=10, callbacks=callbacks())
    again.fit(Dead(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert "goes on" in warnings_text(tmp_path / "second")[8]


def no_latex(*_, **__):
    raise RuntimeError("no latex")


SHOWN = [
    "bnlightning.writing.writers.draw_png",
    "bnlightning.writing.history.History.add_record",
    "bnlightning.writing.writers.layout",
    "bnlightning.callbacks._monitor.table",
    "bnlightning.callbacks._monitor.summarize",
    "bnlightning.callbacks._monitor.ill_layers",
    "bnlightning.callbacks._monitor.sentence",
    "bnlightning.monitors.statistic.Catalogue.description",
    "torch.utils.tensorboard.summary.text",
    "bnlightning.monitors.catching.observer.Observer.report",
    "bnlightning.callbacks.activation_monitor.where_nonfinite",
]


def fit_diverging(directory, callbacks):
    class Diverging(Net):
        def on_train_start(self):
            with torch.no_grad():
                self.body[3].bias.fill_(-1000.0)

        def training_step(self, batch):
            return super().training_step(batch) * (float("nan") if self.global_step == 5 else 1.0)

    trainer = quiet_trainer(directory, max_epochs=1, callbacks=callbacks)
    trainer.fit(Diverging(), loader())
    return trainer


@pytest.mark.parametrize("place", SHOWN)
def test_nothing_that_is_for_show_ends_a_training_and_what_ends_one_still_does(place, tmp_path):
    with patch(place, no_latex), warnings.catch_warnings(record=True, action="always") as caught:
        trainer = fit_diverging(tmp_path / "on", monitors(warn_dead_above=0.0))
        number = len(caught)
        stopped = fit_diverging(tmp_path / "off", [ActivationMonitor(2, warn_dead_above=0.0, stop_on_nonfinite=True)])
    assert trainer.global_step == 20 and stopped.global_step == 6
    messages = [str(warning.message) for warning in caught[:number] if "could not" in str(warning.message)]
    assert messages and len(set(messages)) == len(messages)
    assert all(message.endswith(": RuntimeError: no latex. The training goes on without it.") for message in messages)


class Failing(MemoryLogger):
    log_metrics = no_latex


def test_a_logger_that_raises_ends_no_training():
    with pytest.warns(UserWarning, match="ActivationMonitor could not write to Failing: RuntimeError: no latex"):
        trainer = quiet_trainer(max_epochs=1, logger=Failing(), callbacks=[ActivationMonitor(2)])
        trainer.fit(Net(), loader())
    assert trainer.global_step == 20


def half(layer):
    raise ZeroDivisionError("half of {nothing}")


BROKEN = [
    Statistic("half", half, "Half.", "Small."),
    Statistic("words", lambda layer: "many", "Words.", "Few."),
    Statistic("look", lambda layer: 1.0, "A look.", "Any.", look=Look("look", "no palette", ticks={"a": 1})),
    Statistic("alarmed", lambda layer: 1.0, "A.", "B.", sum=Sum("own", lambda key: (), half)),
    Statistic("shaped", lambda layer: 1.0, "A.", "B.", sum=Sum("other", lambda key: 1 / 0, half)),
]


@pytest.mark.parametrize("statistic", BROKEN, ids=lambda statistic: statistic.name)
def test_a_users_statistic_ends_no_training(statistic, tmp_path):
    with pytest.warns(UserWarning, match="^ActivationMonitor could not "):
        callbacks = [ActivationMonitor(2, statistics=[statistic])]
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
        trainer.fit(Net(), loader())
    assert trainer.global_step == 20
    events = read_events(tmp_path)
    assert len(events.Scalars("layer_dead/body.2")) == 10
    assert "health/values_by_step" in events.Tags()["images"]


def fit_with_a_failing_first_rank(rank, directory):
    """Only the first rank draws, so that only it can fail."""
    trainer = quiet_trainer(
        directory if rank == 0 else None,
        max_epochs=1,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
        callbacks=monitors(warn_dead_above=0.0),
    )
    with warnings.catch_warnings(), patch("bnlightning.writing.writers.draw_png", no_latex):
        warnings.simplefilter("ignore")
        with patch("bnlightning.callbacks._monitor.sentence", no_latex):
            trainer.fit(Net(), loader())
    return trainer.global_step


@pytest.mark.slow
def test_no_rank_waits_for_one_that_could_not_draw(tmp_path):
    assert run_on_lightning_ranks(fit_with_a_failing_first_rank, 2, tmp_path, tmp_path / "log") == [10, 10]


@pytest.mark.parametrize("name", ["a$b", "{a}", "a_b_", "<b>", "a|b", "`a`", "%s", "- a", "[a](b)"])
def test_a_layers_name_is_shown_as_it_stands(name, tmp_path):
    class Named(Net):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleDict({name: nn.Tanh()})

        def training_step(self, batch):
            return tap(self.acts[name](self.head(self.body(batch[0])) * 1e3), name).square().mean()

    with pytest.warns(UserWarning, match="warn_saturated_above") as caught:
        quiet_trainer(tmp_path, max_epochs=1, callbacks=monitors(warn_saturated_above=0.1)).fit(Named(), loader())
    assert any(f"in acts.{name} (Tanh), " in str(warning.message) for warning in caught)
    events = read_events(tmp_path)
    assert f"layer_dead/{name}" in events.Tags()["scalars"]
    watched = events.Tensors("health/watched/text_summary")[0].tensor_proto.string_val[0].decode()
    for text in (watched, warnings_text(tmp_path)[18]):
        page = html.unescape(markdown(text, extensions=["tables"]))
        assert f"acts.{name} (Tanh)" in page and page.count("<td>") % 4 == 0
    assert f"{name} (tap)" in html.unescape(markdown(watched))
