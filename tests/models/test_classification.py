import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, read_events, run_on_lightning_ranks, scalar
from torch import nn
from torch.nn import functional as F

from bnlightning import BatchNorm1d, BatchNorm2d, LitClassifier, LitConvClassifier
from bnlightning.data.batches import TensorBatches
from bnlightning.models import PLACEMENTS

OPTIONS = {"eps": 1e-3, "momentum": 0.1, "convention": "keras"}


class Images(lightning.LightningDataModule):
    """Noise with a bright patch, whose place tells the class."""

    batch_size = 20

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(10, (110,), generator=generator)
        self.x = torch.rand(110, 1, 28, 28, generator=generator)
        for image, label in zip(self.x, self.y.tolist(), strict=True):
            image[0, 5 * (label // 5) : 5 * (label // 5) + 5, 5 * (label % 5) : 5 * (label % 5) + 5] += 2

    def batches(self):
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return TensorBatches(self.x, self.y, batch_size=self.batch_size // world_size, rank=rank, world_size=world_size)

    train_dataloader = val_dataloader = test_dataloader = batches


def small(**options):
    torch.manual_seed(0)
    return LitClassifier(norm_options=OPTIONS, **({"width": [8, 6]} | options))


def test_trains_as_a_bare_loop_does():
    data, model, bare = Images(), small(), small()
    data.setup("fit")
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
    optimizer = torch.optim.SGD(bare.net.parameters(), lr=0.01)
    for _ in range(2):
        for x, y in zip(data.x.split(20), data.y.split(20), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(bare.net(x.view(-1, 784)), y).backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), bare.state_dict(), rtol=0, atol=0)


def test_evaluations_are_over_all_samples_and_stand_at_the_steps_taken(tmp_path):
    data, model = Images(), small()
    trainer = quiet_trainer(tmp_path, max_epochs=2, log_every_n_steps=4)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    events = read_events(tmp_path)
    assert list(scalar(events, "val/acc")) == list(scalar(events, "val/loss")) == [6, 12]
    with torch.no_grad():
        logits = model.eval()(data.x).double().numpy()
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(110), data.y.numpy()]
    right = float((logits.argmax(axis=1) == data.y.numpy()).mean())
    for group, step in (("val", 12), ("test", 12)):
        assert scalar(events, f"{group}/acc")[step] == pytest.approx(right, abs=1e-7)
        assert scalar(events, f"{group}/loss")[step] == pytest.approx(losses.mean(), rel=1e-5)


def evaluate_on_rank(rank, directory):
    trainer = quiet_trainer(strategy="ddp", devices=2, max_epochs=1)
    (metrics,) = trainer.validate(small(), Images(), verbose=False)
    return metrics


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_process_does(tmp_path):
    first, second = run_on_lightning_ranks(evaluate_on_rank, 2, tmp_path, tmp_path)
    (alone,) = quiet_trainer().validate(small(), Images(), verbose=False)
    assert first == second == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_conv_net_learns_whatever_its_placement(placement):
    torch.manual_seed(0)
    model = LitConvClassifier(norm_options=OPTIONS, norm_placement=placement, channels=[4], features=[16])
    names = [name for name, _ in model.net.named_children()]
    kinds = [type(layer) for layer in (model.net.norm1, model.net.linear_norm1)]
    assert kinds == [
        BatchNorm2d if placement.startswith(("conv", "both")) else nn.Identity,
        BatchNorm1d if placement.startswith(("linear", "both")) else nn.Identity,
    ]
    assert (names.index("norm1") > names.index("act1")) == placement.endswith("_after")
    data, trainer = Images(), quiet_trainer(max_epochs=8)
    (before,) = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    assert trainer.callback_metrics["val/loss"] < before["val/loss"] - 0.1


@pytest.mark.parametrize("kind", [LitClassifier, LitConvClassifier])
@pytest.mark.parametrize("norm", ["none", "custom", "torch"])
def test_checkpoint_rebuilds_the_same_layers(kind, norm, tmp_path):
    model = kind(norm=norm, norm_options={"eps": 1e-2}, activation="tanh", init_scale=2.0)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, Images())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "model.ckpt")
    assert repr(loaded) == repr(model)
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_variants_start_from_the_same_weights():
    states = []
    for norm in ("none", "custom", "torch"):
        states.append({key: value for key, value in small(norm=norm).state_dict().items() if "norm" not in key})
    for state in states[1:]:
        torch.testing.assert_close(states[0], state, rtol=0, atol=0)


def test_widths_and_weights():
    assert [small(width=9, depth=3).net.get_submodule(f"linear{i}").out_features for i in (1, 2, 3)] == [9, 9, 9]
    wide = small(width=200, weight_std=0.5)
    assert wide.net.linear1.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert small(width=200).net.linear1.weight.std().item() == pytest.approx(784**-0.5, rel=0.02)
    assert isinstance(small(normalize_output=False).net.output_norm, nn.Identity)


def test_a_subclass_brings_its_own_network():
    class Mine(LitClassifier):
        def __init__(self):
            super().__init__(norm="none")
            self.net = nn.Sequential(nn.Linear(784, 10))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(Mine(), Images())
    assert trainer.callback_metrics["val/acc"] > 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm='batch' is not known"),
        ({"activation": "tan"}, "activation='tan' is not known"),
        ({"width": 0}, "width=0 is not possible"),
        ({"width": [8, 0]}, "width=0 is not possible"),
        ({"width": 8, "depth": 0}, "depth=0 is not possible"),
        ({"width": [8, 8], "depth": 3}, r"depth=3 is not possible with width=\[8, 8\], which has 2 hidden layers"),
        ({"init_scale": 0}, "init_scale=0 is not possible"),
        ({"weight_std": -1}, "weight_std=-1 is not possible"),
        ({"learning_rate": 0}, "learning_rate=0 is not possible"),
        ({"num_classes": 1}, "num_classes=1 is not possible"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LitClassifier(**options)


def test_a_bad_placement_is_named():
    with pytest.raises(ValueError, match="norm_placement='before' is not known: choose one of none, conv"):
        LitConvClassifier(norm_placement="before")


def test_a_batch_of_one_is_refused_before_training():
    data = Images()
    data.smallest_batch = 1
    with pytest.raises(ValueError, match="batch_size=20 is not possible with norm='custom': it leaves a batch of one"):
        quiet_trainer(max_epochs=1).fit(small(), data)
