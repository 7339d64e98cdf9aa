import copy
import os
import socket
from datetime import timedelta

import lightning
import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnlightning import BatchNorm1d, BatchNormSync, LitRegressor, SwapNorm, SyntheticRegressionDataModule
from bnlightning.nn import CONVENTIONS, accumulate_statistics


def data(n=8, batch_size=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, generator=generator) * 2 + 1
    return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=batch_size)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


class Lit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.seen = []

    def training_step(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def test_step(self, batch):
        self.log("test/loss", self.training_step(batch))

    def configure_optimizers(self):
        self.seen.append(type(self.net[1]))
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ConfiguresModel(Lit):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = network()


class SetsUp(Lit):
    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        if self.net is None:
            self.net = network()


class Both(ConfiguresModel):
    def setup(self, stage):
        pass


def trainer(*callbacks, **options):
    return quiet_trainer(**({"callbacks": list(callbacks), "max_epochs": 1} | options))


def group_norm(num_features):
    return nn.GroupNorm(2, num_features)


MODULES = [Lit, ConfiguresModel, SetsUp, Both]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("to", "expected"),
    [("none", nn.Identity), ("custom", BatchNorm1d), ("sync", BatchNorm1d), (group_norm, nn.GroupNorm)],
)
def test_swaps_before_the_optimizers_are_built(kind, to, expected, capfd):
    module, callback = kind(), SwapNorm(to)
    trainer(callback).fit(module, data())
    assert module.seen == [expected]
    assert type(module.net[1]) is expected
    assert [each.paths for each in callback.report.swapped] == [("net.1",)]
    # The wrapped hook has gone again.
    assert not {"configure_model", "setup"} & vars(module).keys()
    assert "net.1" not in capfd.readouterr().out
    callback.report.revert()
    assert type(module.net[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("to", ["none", "custom", lambda num_features: nn.BatchNorm1d(num_features, momentum=0.5)])
def test_later_stages_and_trainers_do_not_swap_again(kind, to):
    module, callback = kind(), SwapNorm(to)
    first = trainer(callback)
    first.fit(module, data())
    layer, report = module.net[1], callback.report
    first.test(module, data())
    trainer(callback).fit(module, data())
    assert module.net[1] is layer
    assert callback.report is report
    other = kind()
    trainer(callback).test(other, data())
    assert [each.paths for each in callback.report.swapped] == [("net.1",)]
    assert callback.report is not report
    trainer(callback).test(module, data())
    assert module.net[1] is layer


def test_options_are_those_of_swap_norm():
    module = Lit()
    trainer(SwapNorm("custom", convention="keras", momentum=0.25)).fit(module, data())
    assert (module.net[1].convention, module.net[1].momentum) == (CONVENTIONS["keras"], 0.25)


def test_trains_as_a_module_that_was_built_so():
    swapped, built = Lit(), Lit()
    built.net[1] = BatchNorm1d(4, eps=1e-5, momentum=0.1, convention="keras")
    trainer(SwapNorm("custom", convention="keras"), max_epochs=3).fit(swapped, data())
    trainer(max_epochs=3).fit(built, data())
    torch.testing.assert_close(swapped.state_dict(), built.state_dict(), rtol=0, atol=0)


class Wrong(nn.BatchNorm1d):
    def forward(self, x):
        return x


def test_strict_and_not():
    module = Lit()
    module.net[1] = Wrong(4)
    with pytest.raises(ValueError, match=r"net\.1: Wrong has its own forward"):
        trainer(SwapNorm("custom")).fit(module, data())
    callback = SwapNorm("custom", strict=False)
    with pytest.warns(UserWarning, match=r"net\.1: Wrong has its own forward"):
        trainer(callback).fit(module, data())
    assert list(callback.report.skipped) == ["net.1"]


class Interrupts(lightning.pytorch.Callback):
    def setup(self, trainer, pl_module, stage):
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("kind", [ConfiguresModel, SetsUp])
def test_an_interrupted_setup_leaves_no_hook_behind(kind):
    module, callback = kind(), SwapNorm("custom")
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback, Interrupts()).fit(module, data())
    assert not {"configure_model", "setup"} & vars(module).keys()
    trainer(callback).fit(module, data())
    assert type(module.net[1]) is BatchNorm1d


def test_a_hook_of_the_instance_is_called_and_put_back():
    module, calls = Lit(), []
    module.net = None

    def configure_model():
        calls.append("called")
        module.net = network()

    module.configure_model = configure_model
    trainer(SwapNorm("custom"), SwapNorm("custom", momentum=0.25)).fit(module, data())
    assert calls == ["called"]
    assert module.configure_model is configure_model
    assert module.net[1].momentum == 0.25


@pytest.mark.parametrize("to", ["custom", "none", group_norm])
def test_resumes_from_a_checkpoint(tmp_path, to):
    whole, killed, resumed = Lit(), Lit(), Lit()
    options = {"convention": "tf_ema"} if to == "custom" else {}
    trainer(SwapNorm(to, **options), max_epochs=4).fit(whole, data())
    first = trainer(SwapNorm(to, **options), max_epochs=2)
    first.fit(killed, data())
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    trainer(SwapNorm(to, **options), max_epochs=4).fit(resumed, data(), ckpt_path=path)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_fit_then_load_from_checkpoint_then_test(tmp_path):
    module = Lit()
    first = trainer(SwapNorm("custom", convention="tf_ema"), max_epochs=2)
    first.fit(module, data())
    want = first.test(module, data(), verbose=False)
    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    loaded = Lit.load_from_checkpoint(path)
    assert type(loaded.net[1]) is nn.BatchNorm1d
    got = trainer(SwapNorm("custom", convention="tf_ema")).test(loaded, data(), verbose=False)
    # Trained statistics are not started again.
    assert got == want


class Halves(Lit):
    """Rank 0 takes the first half of every batch, rank 1 the second."""

    def training_step(self, batch):
        x, y = (part.chunk(self.trainer.world_size)[self.global_rank] for part in batch)
        return nn.functional.mse_loss(self.net(x), y)


def _fit_on_rank(rank, port, how, result):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    module = Halves()
    plugin = {"plugins": [BatchNormSync()]} if how == "plugin" else {}
    callbacks = [SwapNorm("sync", convention="keras")] if how == "callback" else []
    fit = trainer(
        *callbacks,
        max_epochs=2,
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)),
        use_distributed_sampler=False,
        **plugin,
    )
    during = []
    module.on_train_start = lambda: during.append((type(module.net[1]).__module__, module.net[1].sync))
    fit.fit(module, data())
    torch.save(
        {"during": during, "after": type(module.net[1]), "state": dict(module.state_dict())}, f"{result}/{rank}.pt"
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plugin", "callback"])
def test_two_ranks_are_as_one_with_the_whole_batch(tmp_path, how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_fit_on_rank, (port, how, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    alone = Lit()
    trainer(*([SwapNorm("custom", convention="keras")] if how == "callback" else []), max_epochs=2).fit(alone, data())
    for result in results:
        assert result["during"] == [("bnlightning.nn.batch_norm", True)]
        assert result["after"] is (nn.BatchNorm1d if how == "plugin" else BatchNorm1d)
        torch.testing.assert_close(result["state"], dict(alone.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.fixture
def _one_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
class TestDDPOfOneProcess:
    """Enough for the strategy to call its layer synchronisation."""

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        # Set by Lightning, which puts them back only at the end of the process.
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, "0")
            monkeypatch.delenv(name)

    def test_sync_batchnorm_is_refused_for_our_layers(self):
        module = Lit()
        with pytest.raises(RuntimeError, match=r"pass Trainer\(plugins=\[BatchNormSync\(\)\]\)"):
            trainer(SwapNorm("custom", convention="keras"), strategy="ddp", sync_batchnorm=True).fit(module, data())
        assert module.net[1].convention == CONVENTIONS["keras"]

    @pytest.mark.parametrize("kind", [Lit, ConfiguresModel])
    def test_the_plugin_synchronises_for_the_fit_only(self, kind):
        module, during = kind(), []
        module.on_train_start = lambda: during.append((type(module.net[1]), module.net[1].sync))
        callback, plugin = SwapNorm("custom", convention="keras"), BatchNormSync()
        for fits in (1, 2):
            trainer(callback, strategy="ddp", plugins=[plugin]).fit(module, data())
            assert during == [(BatchNorm1d, True)] * fits
            assert (module.net[1].sync, module.net[1].convention) == (False, CONVENTIONS["keras"])

    def test_the_plugin_reverts_after_an_exception(self):
        module, plugin = Lit(), BatchNormSync()

        def fail(*_):
            raise RuntimeError("interrupted")

        module.training_step = fail
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer(strategy="ddp", plugins=[plugin]).fit(module, data())
        assert type(module.net[1]) is nn.BatchNorm1d


def test_the_plugin_without_a_trainer():
    model, plugin = network(), BatchNormSync()
    assert plugin.revert(model) is model
    assert plugin.apply(model) is model
    assert model[1].sync
    assert plugin.revert(model) is model
    assert type(model[1]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="has no batch norm layer"):
        plugin.apply(nn.Linear(1, 1))
    BatchNormSync(strict=False).apply(nn.Linear(1, 1))


def test_the_plugin_does_nothing_on_one_device():
    module = Lit()
    trainer(plugins=[BatchNormSync()]).fit(module, data())
    assert type(module.net[1]) is nn.BatchNorm1d


def test_the_module_can_be_copied_after_the_fit():
    module = ConfiguresModel()
    trainer(SwapNorm("custom")).fit(module, data())
    assert type(copy.deepcopy(module).net[1]) is BatchNorm1d


class Accumulating(LitRegressor):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        accumulate_statistics(self, optimizer)
        return optimizer


def test_accumulated_statistics_are_updated_once_a_step_in_every_fit():
    model, data = Accumulating(norm="torch", depth=1), SyntheticRegressionDataModule(num_points=60, batch_size=10)
    for fit in (1, 2):
        trainer = quiet_trainer(
            max_epochs=1, accumulate_grad_batches=3, limit_val_batches=0, callbacks=[SwapNorm("custom")]
        )
        trainer.fit(model, data)
        assert trainer.global_step == 2
        assert model.net.norm1.num_batches_tracked == 2 * fit


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("keras", {}, "to='keras' is not known: choose one of none, custom, torch, sync"),
        ("custom", {"conv": 1}, "conv=1 is not known: choose among convention, backend"),
        ("custom", {"convention": "kears"}, "convention='kears' is not known"),
    ],
)
def test_bad_arguments_are_told_before_any_fit(to, options, message):
    with pytest.raises(ValueError, match=message):
        SwapNorm(to, **options)


def test_resuming_without_the_callback_is_warned_of(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[SwapNorm("custom", convention="keras")])
    data = SyntheticRegressionDataModule()
    trainer.fit(LitRegressor(norm="torch"), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="SwapNorm"):
        quiet_trainer(max_steps=2).fit(LitRegressor(norm="torch"), data, ckpt_path=tmp_path / "last.ckpt")
