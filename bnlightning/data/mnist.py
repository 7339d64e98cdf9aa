"""A data module for MNIST and the data sets of its format."""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import lightning
import numpy as np
import torch
from torch import Tensor

from bnlightning._check import check_choice, check_integer
from bnlightning.data.batches import TensorBatches, smallest_batch

_DATASETS = ("MNIST", "FashionMNIST", "KMNIST")
_NUM_CLASSES = 10
_VARIABLE = "BNLIGHTNING_DATA_DIR"
_CURE = "remove the files to download them again, or put the right ones there."
_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


class MNISTDataModule(lightning.LightningDataModule):
    """The images of MNIST, Fashion-MNIST or Kuzushiji-MNIST, kept in memory on the device that trains.

    The first ``num_val`` training images are for validation. The next ``num_train`` are for training, by default all
    others. The test images are for the test.

    Every epoch has an order of its own, also in a resumed run. Epoch ``e``, counted from 0, uses the ``e``-th result of
    ``numpy.random.permutation`` after ``numpy.random.seed(seed)``.

    Args:
        dataset: ``"MNIST"``, ``"FashionMNIST"`` or ``"KMNIST"``, as torchvision names them.
        data_dir: Directory of ``<dataset>/raw/train-images-idx3-ubyte`` and the other three files. Missing files are
            downloaded to it. With ``None`` it is the environment variable ``BNLIGHTNING_DATA_DIR``, or
            ``~/.cache/bnlightning`` if that is not set.
        batch_size: Number of images of a training step on one rank.
        num_val: Number of images for validation.
        num_train: Number of images for training. ``None`` takes all that are not for validation.
        seed: Seed of the order, from 0 to 2**32 - 1.
        eval_batch_size: Number of images of a validation or test step on one rank.

    Attributes:
        train_set: Images and labels for training, in the files' order. Set by :meth:`setup` for a fit.
        val_set: Images and labels for validation, in the files' order. Set by :meth:`setup` for a fit.
        test_set: Images and labels for the test, in the files' order. Set by :meth:`setup` for the test.

    Shape:
        Batches ``(x, y)``: images of shape ``(N, 1, 28, 28)``, float32, the files' bytes divided by 255; labels of
        shape ``(N,)``, int64, from 0 to 9.

    Raises:
        ValueError: If an argument is out of range. In :meth:`prepare_data`, if a file is missing and cannot be
            downloaded. In :meth:`setup`, if a file is missing, damaged, or too small for ``num_val`` and ``num_train``.
            In the data loaders, if a rank would get an empty last batch.

    Example:
        >>> data = MNISTDataModule(dataset="FashionMNIST", batch_size=100, num_train=20000)
        >>> data.num_train, data.smallest_batch
        (20000, 100)
    """

    def __init__(
        self,
        dataset: str = "MNIST",
        data_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 200,
        num_val: int = 5000,
        num_train: int | None = None,
        seed: int = 0,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__()
        check_choice("dataset", dataset, _DATASETS)
        check_integer("batch_size", batch_size, at_least=1)
        check_integer("num_val", num_val, at_least=1)
        if num_train is not None:
            check_integer("num_train", num_train, at_least=1)
        check_integer("seed", seed, at_least=0, at_most=2**32 - 1)
        check_integer("eval_batch_size", eval_batch_size, at_least=1)
        if data_dir is not None:
            if not isinstance(data_dir, str | os.PathLike) or not os.fspath(data_dir):
                raise ValueError(f"data_dir={data_dir!r} is not possible: give the path of a directory, or None.")
            # A checkpoint loads without trust only if its hyperparameters are plain values.
            data_dir = os.fspath(data_dir)
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.train_set: tuple[Tensor, Tensor] | None = None
        self.val_set: tuple[Tensor, Tensor] | None = None
        self.test_set: tuple[Tensor, Tensor] | None = None
        self._permutations = _Permutations(seed)

    @property
    def directory(self) -> Path:
        """The directory of the four files."""
        dataset: str = self.hparams["dataset"]
        return _data_dir(self.hparams["data_dir"]) / dataset / "raw"

    @property
    def num_train(self) -> int:
        """Number of images for training.

        Before :meth:`setup` the file's header tells it. Without a file the data set is taken to have 60000 images,
        including those for validation.
        """
        if self.train_set is not None:
            return len(self.train_set[1])
        images = self.directory / "train-images-idx3-ubyte"
        return self._split(_count(images, (28, 28)) if images.is_file() else 60000)

    @property
    def smallest_batch(self) -> int:
        """Number of images in the smallest training batch of any rank."""
        return smallest_batch(self.num_train, self.batch_size, self._ranks()[1])

    def order(self, epoch: int) -> Tensor:
        """Return the order of an epoch: indices of training images, shape ``(num_train,)``, int64, on the CPU."""
        return self._permutations.draw(epoch, self.num_train)

    def prepare_data(self) -> None:
        """Download the files that are missing. torchvision does it and checks its MD5 sums."""
        missing = self._missing()
        if not missing:
            return
        from torchvision import datasets  # takes a second, which a run with its files need not spend

        source = getattr(datasets, self.hparams["dataset"])
        archives = dict(source.resources)
        try:
            for name in missing:
                _download(source.mirrors, f"{name}.gz", archives[f"{name}.gz"], self.directory / name)
        except (OSError, RuntimeError, HTTPException) as error:
            raise self._missing_error(f"could not be downloaded ({_first_line(error)})") from None

    def setup(self, stage: str) -> None:
        """Read the files of the stage once, and move the images to the device that trains."""
        if stage == "test":
            self.test_set = self._place(self.test_set or self._read("t10k"))
        elif stage in ("fit", "validate"):
            if self.train_set is None or self.val_set is None:
                x, y = self._read("train")
                first, last = self.hparams["num_val"], self.hparams["num_val"] + self._split(len(x))
                self.val_set, self.train_set = (x[:first], y[:first]), (x[first:last], y[first:last])
            self.train_set, self.val_set = self._place(self.train_set), self._place(self.val_set)

    def train_dataloader(self) -> TensorBatches:
        """Return batches of ``batch_size`` images a rank, in the order of the Trainer's epoch (0 without a Trainer)."""
        return self._batches("train", self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches:
        """Return batches of ``eval_batch_size`` validation images a rank, in the files' order."""
        return self._batches("val", self.val_set, self.hparams["eval_batch_size"])

    def test_dataloader(self) -> TensorBatches:
        """Return batches of ``eval_batch_size`` test images a rank, in the files' order."""
        return self._batches("test", self.test_set, self.hparams["eval_batch_size"])

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def _order_there(self, epoch: int) -> Tensor:
        return self.order(epoch).to(self._device())

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def _read(self, split: str) -> tuple[Tensor, Tensor]:
        if self._missing():
            raise self._missing_error("have not been downloaded")
        return _read(self.directory, split)

    def _place(self, samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = samples
        return x.to(self._device()), y.to(self._device())

    def _batches(
        self, split: str, samples: tuple[Tensor, Tensor] | None, batch_size: int, shuffle: bool = False
    ) -> TensorBatches:
        if samples is None:
            stage = "test" if split == "test" else "fit"
            raise RuntimeError(
                f'The {split} images have not been read: call prepare_data() and setup("{stage}") first.'
            )
        rank, world_size = self._ranks()
        if smallest_batch(len(samples[1]), batch_size, world_size) < 1:
            argument = "batch_size" if split == "train" else "eval_batch_size"
            raise ValueError(
                f"{argument}={batch_size} is not possible with {len(samples[1])} {split} images on {world_size} ranks: "
                f"one rank would get an empty last batch. Choose another data.{argument}."
            )
        return TensorBatches(
            *samples,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            epoch=self._epoch,
            order=self._order_there if shuffle else None,
        )

    def _split(self, num_images: int) -> int:
        """Return the number of images for training, out of ``num_images`` for training and validation."""
        num_val, num_train = self.hparams["num_val"], self.hparams["num_train"]
        dataset = f"{self.hparams['dataset']} in {self.directory}"
        if num_val >= num_images:
            raise ValueError(
                f"num_val={num_val} is not possible: {dataset} has {num_images} training images. "
                f"Give at most {num_images - 1}."
            )
        rest = num_images - num_val
        if num_train is not None and num_train > rest:
            raise ValueError(
                f"num_train={num_train} is not possible: {dataset} has {num_images} training images, and "
                f"num_val={num_val} of them are for validation. Give at most {rest}, or null for all others."
            )
        return rest if num_train is None else int(num_train)

    def _missing(self) -> list[str]:
        return [name for name in _FILES if not (self.directory / name).is_file()]

    def _missing_error(self, reason: str) -> ValueError:
        missing = ", ".join(self._missing())
        given, variable = self.hparams["data_dir"], os.environ.get(_VARIABLE)
        place = f"{_VARIABLE}={variable!r}" if given is None and variable else f"data_dir={given!r}"
        return ValueError(
            f"{place}: {self.directory} lacks {missing}, which {reason}. "
            f"Put them there, or set {_VARIABLE} to a directory that holds {self.hparams['dataset']}/raw."
        )


class _Permutations:
    """The permutations that ``numpy.random.permutation`` gives one after another after ``numpy.random.seed(seed)``."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._drawn = 0
        self._num_samples = 0

    def draw(self, epoch: int, num_samples: int) -> Tensor:
        if num_samples != self._num_samples or epoch + 1 < self._drawn or self._drawn == 0:
            # The legacy generator, because the published script uses its stream.
            self._rng = np.random.RandomState(self.seed)
            self._drawn, self._num_samples = 0, num_samples
        while self._drawn <= epoch:
            self._last = self._rng.permutation(num_samples)
            self._drawn += 1
        return torch.from_numpy(self._last.astype(np.int64))


def _data_dir(given: str | None) -> Path:
    if given is None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        given = os.environ.get(_VARIABLE) or os.path.join(cache, "bnlightning")
    return Path(given).expanduser()


def _download(mirrors: Sequence[str], archive: str, md5: str, path: Path) -> None:
    """Download one archive from the first mirror that has it, and put its content at ``path``.

    After an error there is no file at ``path``.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    with tempfile.TemporaryDirectory() as scratch:
        for mirror in mirrors:
            try:
                download_and_extract_archive(f"{mirror}{archive}", scratch, filename=archive, md5=md5)
                break
            except (OSError, RuntimeError, HTTPException):
                if mirror == mirrors[-1]:
                    raise
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may do the same, and none of them may see half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            os.replace(shutil.copy(Path(scratch, path.name), beside), path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read(directory: Path, split: str) -> tuple[Tensor, Tensor]:
    images, labels = directory / f"{split}-images-idx3-ubyte", directory / f"{split}-labels-idx1-ubyte"
    num_images, num_labels = _count(images, (28, 28)), _count(labels, ())
    if num_images != num_labels:
        raise ValueError(f"{images} has {num_images} images and {labels.name} has {num_labels} labels: {_CURE}")
    pixels, classes = _content(images, 3), _content(labels, 1)
    if classes.max() >= _NUM_CLASSES:
        raise ValueError(f"{labels} has the label {classes.max()}, beyond {_NUM_CLASSES - 1}: {_CURE}")
    # Divided here because CUDA multiplies by the reciprocal, which is not the same to the last bit.
    x = pixels.astype(np.float32)
    x /= 255
    return torch.from_numpy(x).view(num_images, 1, 28, 28), torch.from_numpy(classes.astype(np.int64))


def _count(path: Path, shape: tuple[int, ...]) -> int:
    """Return the number of samples of ``shape`` in a file by its header, which must fit the length of the file."""
    dims = 1 + len(shape)
    with path.open("rb") as file:
        start = file.read(4 + 4 * dims)
    kind = "images" if shape else "labels"
    if start[:2] == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed: unpack it (gzip -d), or {_CURE}")
    # The magic number: two zeros, the type (8 for unsigned bytes), the number of dimensions.
    if len(start) < 4 + 4 * dims or start[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path} is not a file of {kind}. It begins with {start[:4].hex() or 'nothing'}: {_CURE}")
    sizes: list[int] = np.frombuffer(start, ">u4", offset=4).tolist()
    count, *rest = sizes
    if tuple(rest) != shape:
        raise ValueError(f"{path} has images of {' × '.join(map(str, rest))}, not 28 × 28: {_CURE}")
    if count == 0:
        raise ValueError(f"{path} has no {kind}: {_CURE}")
    expected, size = len(start) + count * math.prod(shape), path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, but its header of {count} {kind} makes {expected}: {_CURE}")
    return count


def _content(path: Path, dims: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, offset=4 + 4 * dims)
