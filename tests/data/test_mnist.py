import gzip
import hashlib
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import lightning
import numpy as np
import pytest
import torch
from helpers import quiet_trainer, run_on_lightning_ranks, write_mnist
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision import datasets

from bnlightning import CONF_DIR, MNISTDataModule

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def numbers(x: torch.Tensor) -> list[int]:
    """Which of their file's images these are, by the two pixels that count them."""
    first, second = (x[:, 0, 0, :2] * 255).round().int().unbind(1)
    return (first + 256 * second).tolist()


def published_order(seed: int, epochs: int, num_train: int) -> list[np.ndarray]:
    state = np.random.get_state()
    np.random.seed(seed)
    orders = [np.random.permutation(num_train) for _ in range(epochs)]
    np.random.set_state(state)
    return orders


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(784, 10)
        self.seen = []

    def training_step(self, batch, index):
        x, y = batch
        assert x.device == y.device == self.device
        self.seen.append((self.current_epoch, numbers(x)))
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def evaluate(self, batch):
        return (self.layer(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean()

    def validation_step(self, batch, index):
        self.log("val/acc", self.evaluate(batch), sync_dist=True)

    def test_step(self, batch, index):
        self.log("test/acc", self.evaluate(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, ckpt_path=None, callbacks=(), **options):
    model = Classifier()
    trainer = quiet_trainer(callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_serves_what_the_files_hold(tmp_path, dataset):
    arrays = write_mnist(tmp_path, dataset)
    data = MNISTDataModule(dataset, tmp_path, batch_size=60, num_val=50, eval_batch_size=40)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    images, labels = arrays[IMAGES], arrays[LABELS]
    (order,) = published_order(0, 1, 250)
    parts = [
        (data.train_dataloader(), images[50:][order], labels[50:][order], [60] * 4 + [10]),
        (data.val_dataloader(), images[:50], labels[:50], [40, 10]),
        (
            data.test_dataloader(),
            arrays["t10k-images-idx3-ubyte"],
            arrays["t10k-labels-idx1-ubyte"],
            [40, 40, 20],
        ),
    ]
    for loader, pixels, classes, sizes in parts:
        batches = list(loader)
        assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == sizes and len(loader) == len(sizes)
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        np.testing.assert_array_equal(x.numpy(), pixels[:, None].astype(np.float32) / 255)
        np.testing.assert_array_equal(y.numpy(), classes)


def test_agrees_with_torchvision(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=1)
    data.setup("test")
    reference = datasets.MNIST(tiny_mnist, train=False)
    x, y = data.test_set
    assert torch.equal((x[:, 0] * 255).round().byte(), reference.data) and torch.equal(y, reference.targets)


def test_the_data_set_itself():
    directory = os.environ.get("BNLIGHTNING_DATA_DIR")
    if not directory or not Path(directory, "MNIST", "raw").is_dir():
        pytest.skip("BNLIGHTNING_DATA_DIR holds no MNIST")
    data = MNISTDataModule(seed=42)
    data.prepare_data()
    assert data.smallest_batch == 200 and data.num_train == 55000
    data.setup("fit")
    data.setup("test")
    assert [len(y) for _, y in (data.train_set, data.val_set, data.test_set)] == [55000, 5000, 10000]
    assert data.val_set[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test_set[1][:5].tolist() == [7, 2, 1, 0, 4]
    # The mean and standard deviation that every tutorial normalises by.
    x = torch.cat([data.val_set[0], data.train_set[0]])
    assert round(x.mean(dtype=torch.float64).item(), 4) == 0.1307 and round(x.double().std().item(), 4) == 0.3081
    loader = data.train_dataloader()
    assert len(loader) == 275 and sum(len(y) for _, y in loader) == 55000


def test_num_train_takes_the_first_of_the_rest(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50, num_train=120, batch_size=50, seed=4)
    data.setup("fit")
    assert numbers(data.train_set[0]) == list(range(50, 170)) and data.smallest_batch == 20
    (order,) = published_order(4, 1, 120)
    assert [number for x, _ in data.train_dataloader() for number in numbers(x)] == (order + 50).tolist()


def test_order_is_that_of_the_published_script_whatever_is_asked_first(tiny_mnist):
    orders = published_order(42, 4, 250)
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50, seed=42)
    for epoch in (2, 2, 0, 3, 1):
        order = data.order(epoch)
        assert order.dtype == torch.int64
        np.testing.assert_array_equal(order.numpy(), orders[epoch])
        # What a user does with it is not to reach the next.
        order.zero_()


def test_does_not_touch_the_global_generators(tiny_mnist):
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), torch.rand(())
    np.random.seed(3)
    torch.manual_seed(3)
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50)
    data.setup("fit")
    list(data.train_dataloader())
    assert (np.random.rand(), torch.rand(())) == expected


def test_a_fit_takes_each_epoch_in_its_order(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50, batch_size=100, seed=3)
    model, _ = fit(data, max_epochs=3, num_sanity_val_steps=2)
    expected = [
        (epoch, (order[first : first + 100] + 50).tolist())
        for epoch, order in enumerate(published_order(3, 3, 250))
        for first in (0, 100, 200)
    ]
    assert model.seen == expected


def test_a_classifier_learns_it(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50, batch_size=25)
    model, trainer = fit(data, max_epochs=4)
    assert trainer.callback_metrics["val/acc"] > 0.9
    (metrics,) = trainer.test(model, data, verbose=False)
    assert metrics["test/acc"] > 0.9


# Resumed runs keep no checkpoints.
without_checkpoints = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


# Lightning counts one epoch too many where max_steps and max_epochs are both given, with any loader: not here, then.
@without_checkpoints
@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 3}, {"max_steps": 9}, {"max_steps": 9, "val_check_interval": 2}],
    ids=["epochs", "steps", "steps_val_amid"],
)
@pytest.mark.parametrize(
    "when",
    [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    ],
    ids=["every_step", "epoch_end", "validation_end"],
)
def test_resumes_with_the_batch_that_would_have_been_next(tiny_mnist, tmp_path, when, options):
    def data():
        return MNISTDataModule(data_dir=tiny_mnist, num_val=50, batch_size=100, seed=3)

    checkpoints = tmp_path / "checkpoints"
    keep_all = ModelCheckpoint(checkpoints, filename="{step}", save_top_k=-1, **when)
    whole, _ = fit(data(), callbacks=[keep_all], **options)
    assert len(whole.seen) == 9
    paths = list(checkpoints.iterdir())
    assert len(paths) >= 3
    for path in paths:
        resumed, trainer = fit(data(), ckpt_path=path, **options)
        assert resumed.seen == whole.seen[int(path.stem.removeprefix("step=")) :], path.stem
        assert trainer.global_step == 9 and torch.equal(resumed.layer.weight, whole.layer.weight)


@without_checkpoints
def test_resumes_after_an_epoch_cut_short(tiny_mnist, tmp_path):
    def data():
        return MNISTDataModule(data_dir=tiny_mnist, num_val=50, batch_size=100, seed=3)

    options = {"max_steps": 4, "limit_train_batches": 2}
    keep_all = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_epochs=1)
    whole, _ = fit(data(), callbacks=[keep_all], **options)
    resumed, _ = fit(data(), ckpt_path=tmp_path / "checkpoints" / "step=2.ckpt", **options)
    assert len(whole.seen) == 4 and resumed.seen == whole.seen[2:]


def fit_on_rank(rank: int, data_dir: Path) -> tuple[list, list, int]:
    data = MNISTDataModule(data_dir=data_dir, num_val=47, batch_size=50, seed=3, eval_batch_size=20)
    model, _ = fit(data, strategy="ddp", devices=2, max_epochs=2)
    return model.seen, [numbers(x) for x, _ in data.val_dataloader()], data.smallest_batch


@pytest.mark.slow
def test_two_ranks_take_together_what_one_process_takes(tiny_mnist, tmp_path):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=47, batch_size=100, seed=3, eval_batch_size=40)
    whole, _ = fit(data, max_epochs=2)
    ranks = run_on_lightning_ranks(fit_on_rank, 2, tmp_path, tiny_mnist)
    together = [(epoch, first + second) for (epoch, first), (_, second) in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert together == whole.seen and len(together) == 6
    evaluated = [first + second for first, second in zip(ranks[0][1], ranks[1][1], strict=True)]
    assert evaluated == [numbers(x) for x, _ in data.val_dataloader()]
    # 253 images: of the last step's 53, rank 1 has 26.
    assert [smallest for *_, smallest in ranks] == [26, 26]


def test_files_are_read_once(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50)
    data.setup("validate")
    before = data.train_set[0]
    (tiny_mnist / "MNIST" / "raw" / IMAGES).unlink()
    data.setup("fit")
    assert data.train_set[0] is before


def test_everything_is_placed_once_on_the_device_that_trains(tiny_mnist):
    class Elsewhere(MNISTDataModule):
        def _device(self):
            return torch.device("meta")

    data = Elsewhere(data_dir=tiny_mnist, num_val=50)
    for stage in ("validate", "fit", "test"):
        data.setup(stage)
    images = data.train_set[0], data.val_set[0], data.test_set[0]
    for stage in ("fit", "test"):
        data.setup(stage)
    again = data.train_set[0], data.val_set[0], data.test_set[0]
    assert all(x is y for x, y in zip(images, again, strict=True))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert all(x.is_meta and y.is_meta for x, y in loader)


@pytest.mark.parametrize(("num_val", "batch_size", "smallest"), [(50, 100, 50), (99, 100, 1), (50, 1000, 250)])
def test_smallest_batch_before_and_after_reading(tiny_mnist, num_val, batch_size, smallest):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=num_val, batch_size=batch_size)
    assert data.smallest_batch == smallest
    data.setup("fit")
    assert data.smallest_batch == smallest == min(len(y) for _, y in data.train_dataloader())


def test_smallest_batch_without_files(tmp_path):
    assert MNISTDataModule(data_dir=tmp_path, batch_size=54999).smallest_batch == 1
    assert MNISTDataModule(data_dir=tmp_path, batch_size=54999, num_train=54998).smallest_batch == 54998


def test_hyperparameters_are_plain(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50)
    expected = {"dataset": "MNIST", "data_dir": str(tiny_mnist), "batch_size": 200, "num_val": 50}
    assert dict(data.hparams) == expected | {"num_train": None, "seed": 0, "eval_batch_size": 1000}
    assert type(data.hparams["data_dir"]) is str


def test_can_be_handed_to_other_processes(tiny_mnist):
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50)
    data.setup("fit")
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.order(1), data.order(1))


@pytest.mark.parametrize("variables", [("BNLIGHTNING_DATA_DIR",), ("XDG_CACHE_HOME",), ("HOME",)])
def test_directory(monkeypatch, tmp_path, variables):
    for name in ("BNLIGHTNING_DATA_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variables[0], str(tmp_path))
    monkeypatch.setenv("HOME", os.environ.get("HOME", str(tmp_path / "home")))
    below = {"BNLIGHTNING_DATA_DIR": "", "XDG_CACHE_HOME": "bnlightning", "HOME": ".cache/bnlightning"}[variables[0]]
    assert MNISTDataModule("KMNIST").directory == tmp_path / below / "KMNIST" / "raw"
    assert MNISTDataModule(data_dir="elsewhere").directory == Path("elsewhere/MNIST/raw")


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_configuration(tmp_path, dataset):
    write_mnist(tmp_path, dataset)
    overrides = ["data=mnist", f"data.dataset={dataset}", f"data.data_dir={tmp_path}", "data.num_val=50", "seed=6"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        data = instantiate(compose("train", overrides).data, _convert_="all")
    assert isinstance(data, MNISTDataModule) and data.hparams["seed"] == 6 and data.batch_size == 200
    data.setup("fit")
    np.testing.assert_array_equal(data.order(0).numpy(), published_order(6, 1, 250)[0])


class Mirror:
    """Stands for torchvision's download: files of another data set, packed, or no network."""

    def __init__(self, monkeypatch, source: Path | None, dead: tuple[str, ...] = ()):
        self.source, self.dead, self.asked = source, dead, []
        monkeypatch.setattr("torchvision.datasets.utils.download_url", self.download_url)

    def download_url(self, url, root, filename=None, md5=None, max_redirect_hops=3):
        self.asked.append(url)
        assert md5 is not None and len(md5) == len(hashlib.md5(b"").hexdigest())
        path = Path(root, filename)
        if self.source is None or url.startswith(self.dead):
            path.write_bytes(b"half")
            raise URLError("[Errno -3] Temporary failure in name resolution")
        path.write_bytes(gzip.compress((self.source / filename.removesuffix(".gz")).read_bytes()))


def test_downloads_only_what_is_missing(tiny_mnist, tmp_path, monkeypatch):
    source, target = tiny_mnist / "MNIST" / "raw", tmp_path / "target" / "MNIST" / "raw"
    target.mkdir(parents=True)
    (target / IMAGES).write_bytes((source / IMAGES).read_bytes())
    (target / IMAGES).chmod(0o400)
    mirror = Mirror(monkeypatch, source, dead=(datasets.MNIST.mirrors[0],))
    data = MNISTDataModule(data_dir=tmp_path / "target", num_val=50)
    data.prepare_data()
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    assert all((target / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
    # Each of the other three from the first mirror, which fails, and from the second.
    assert len(mirror.asked) == 6 and not any(IMAGES in url for url in mirror.asked)
    data.prepare_data()
    assert len(mirror.asked) == 6


def test_without_network_one_message_and_nothing_left(tmp_path, monkeypatch):
    Mirror(monkeypatch, source=None)
    data = MNISTDataModule("KMNIST", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"could not be downloaded \(.*name resolution") as raised:
        data.prepare_data()
    message = str(raised.value)
    assert str(tmp_path / "data" / "KMNIST" / "raw") in message and "BNLIGHTNING_DATA_DIR" in message
    assert all(f"{split}-labels-idx1-ubyte" in message for split in ("train", "t10k")) and "\n" not in message
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told(tiny_mnist, tmp_path, monkeypatch):
    Mirror(monkeypatch, tiny_mnist / "MNIST" / "raw")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.* could not be downloaded \(.*Not a directory"):
        MNISTDataModule(data_dir=tmp_path / "file").prepare_data()


def test_setup_without_files_tells_which(tmp_path):
    with pytest.raises(ValueError, match=r"lacks train-images-idx3-ubyte, .*BNLIGHTNING_DATA_DIR"):
        MNISTDataModule(data_dir=tmp_path).setup("fit")


def test_a_missing_file_names_what_said_where(tmp_path, monkeypatch):
    monkeypatch.setenv("BNLIGHTNING_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"^BNLIGHTNING_DATA_DIR='{tmp_path}': .*MNIST/raw lacks"):
        MNISTDataModule().setup("fit")
    with pytest.raises(ValueError, match=r"^data_dir='other': other/MNIST/raw lacks"):
        MNISTDataModule(data_dir="other").setup("fit")


def test_loaders_before_setup_are_refused(tiny_mnist):
    with pytest.raises(RuntimeError, match=r'call prepare_data\(\) and setup\("test"\) first'):
        MNISTDataModule(data_dir=tiny_mnist).test_dataloader()


def idx(magic: str, *sizes: int) -> bytes:
    return bytes.fromhex(magic) + b"".join(size.to_bytes(4, "big") for size in sizes)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, lambda content: content[:-1], "has 235215 bytes, but its header of 300 images makes 235216"),
        (IMAGES, lambda content: content + b"\0", "has 235217 bytes, but its header"),
        (IMAGES, lambda content: b"", r"is not a file of images\. It begins with nothing"),
        (IMAGES, lambda content: content[:7], r"is not a file of images\. It begins with 00000803"),
        (IMAGES, lambda content: b"<htm" + content[4:], r"is not a file of images\. It begins with 3c68746d"),
        (IMAGES, lambda content: idx("00000d03") + content[4:], r"is not a file of images\. It begins with 00000d03"),
        (IMAGES, lambda content: idx("00000803", 300, 14, 56) + content[16:], "has images of 14 × 56, not 28 × 28"),
        (IMAGES, lambda content: idx("00000803", 0, 28, 28), "has no images"),
        (IMAGES, gzip.compress, r"is compressed: unpack it \(gzip -d\), or remove the files"),
        (IMAGES, lambda content: idx("00000803", 299, 28, 28) + content[16:-784], "has 299 images and train-labels"),
        (LABELS, lambda content: content[:-9], "has 299 bytes, but its header of 300 labels makes 308"),
        (LABELS, lambda content: idx("00000803") + content[4:], r"is not a file of labels\. It begins with 00000803"),
        (LABELS, lambda content: content[:-1] + b"\x0a", "has the label 10, beyond 9"),
        (LABELS, gzip.compress, "is compressed"),
    ],
)
def test_bad_files_are_named(tiny_mnist, name, damage, message):
    path = tiny_mnist / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    data = MNISTDataModule(data_dir=tiny_mnist, num_val=50)
    with pytest.raises(ValueError, match=f"{message}.*(download them again|header)") as raised:
        data.setup("fit")
    assert str(path.parent) in str(raised.value) and "put the right ones there" in str(raised.value)
    data.setup("test")


def test_an_empty_batch_on_a_rank_is_refused(tiny_mnist):
    class OfThree(MNISTDataModule):
        def _ranks(self):
            return 0, 3

    data = OfThree(data_dir=tiny_mnist, num_val=61, num_train=61, batch_size=20, eval_batch_size=20)
    data.setup("fit")
    assert data.smallest_batch == 0
    with pytest.raises(ValueError, match=r"^batch_size=20 is not possible with 61 train images on 3 ranks"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"^eval_batch_size=20 is not possible with 61 val images on 3 ranks"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_val": 300}, "num_val=300 is not possible: MNIST in .* has 300 training images. Give at most 299"),
        ({"num_val": 50, "num_train": 251}, "num_train=251 is not possible: .* num_val=50 .* Give at most 250"),
    ],
)
def test_splits_that_do_not_fit_are_refused_early_and_late(tiny_mnist, options, message):
    data = MNISTDataModule(data_dir=tiny_mnist, **options)
    with pytest.raises(ValueError, match=message):
        _ = data.smallest_batch
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "EMNIST"}, "dataset='EMNIST' is not known: choose one of MNIST, FashionMNIST, KMNIST"),
        ({"batch_size": 0}, "batch_size=0 is not possible: give an integer of at least 1"),
        ({"num_val": 0}, "num_val=0 is not possible"),
        ({"num_train": 0}, "num_train=0 is not possible"),
        ({"seed": -1}, "seed=-1 is not possible: give an integer from 0 to 4294967295"),
        ({"eval_batch_size": True}, "eval_batch_size=True is not possible"),
        ({"data_dir": 3}, "data_dir=3 is not possible: give the path of a directory, or None"),
        ({"data_dir": ""}, "data_dir='' is not possible"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MNISTDataModule(**options)
