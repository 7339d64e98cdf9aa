import os
import signal

import lightning
import pytest
import torch
from helpers import quiet_trainer, run_on_lightning_ranks
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bnlightning import LitRegressor, PreemptionCheckpoint, SyntheticRegressionDataModule


class Signal(lightning.Callback):
    """Sends this process a SIGTERM in the middle of a batch, as a cluster would at any time."""

    def __init__(self, batch, rank=0):
        self.batch = batch
        self.rank = rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(directory, batch, rank=0, **options):
    path = directory / "checkpoints" / "last.ckpt"
    callbacks = [PreemptionCheckpoint(path), Signal(batch, rank)]
    options |= {"enable_checkpointing": True}
    trainer = quiet_trainer(max_steps=5000, limit_val_batches=0, callbacks=callbacks, **options)
    torch.manual_seed(0)
    model = LitRegressor(depth=2)
    with pytest.raises(SIGTERMException):
        trainer.fit(model, SyntheticRegressionDataModule(num_points=1000))
    checkpoint = torch.load(path, weights_only=True)
    return trainer.global_step, checkpoint["global_step"], checkpoint["state_dict"], model.state_dict()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_process_stops_after_the_step_with_its_weights_saved(accumulate, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    reached, saved, weights, own = fit(tmp_path, 4, accumulate_grad_batches=accumulate)
    # Counted from 0: the fifth step has been taken, whatever batches it needs, and none begun after it.
    assert reached == saved == 5
    torch.testing.assert_close(weights, own, rtol=0, atol=0)
    assert f"Stopped by SIGTERM after step 5: {tmp_path}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def fit_on_rank(rank, directory, signalled):
    return fit(directory, 4, signalled, strategy="ddp", devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_all_ranks_stop_after_the_same_step_whichever_got_the_signal(signalled, tmp_path):
    first, second = run_on_lightning_ranks(fit_on_rank, 2, tmp_path, tmp_path, signalled)
    assert first[0] == second[0] == first[1] >= 5
    torch.testing.assert_close(first[2], first[3], rtol=0, atol=0)
    # Running statistics are of each rank's own batches.
    parameters = [{k: v for k, v in rank[3].items() if k.endswith(("weight", "bias"))} for rank in (first, second)]
    torch.testing.assert_close(*parameters, rtol=0, atol=0)


def test_without_a_signal_nothing_is_saved_or_changed(tmp_path):
    weights = []
    for callbacks in ([], [PreemptionCheckpoint(tmp_path / "last.ckpt")]):
        torch.manual_seed(0)
        model = LitRegressor(depth=2)
        trainer = quiet_trainer(
            max_steps=10, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        trainer.fit(model, SyntheticRegressionDataModule(num_points=100))
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", None, 3])
def test_a_bad_path_is_named(path):
    with pytest.raises(ValueError, match=r"^path=.* is not possible: give the path of a file\.$"):
        PreemptionCheckpoint(path)
