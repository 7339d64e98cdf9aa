"""A callback that sets the weights a training starts from."""

import os
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from bnlightning.callbacks._packages import BothPackages


class InitialWeights(BothPackages, Callback):
    """Start from the weights in a file, such as the first weights of another framework's training.

    The weights are set before the fit, or before an evaluation that precedes it. A resumed checkpoint replaces them.
    Parameters that the file does not hold keep their own initial values.

    Args:
        path: Path of a ``.npz`` file with one array for each parameter, by the parameter's name in the module's
            ``state_dict``, such as ``net.linear1.weight``.

    Raises:
        ValueError: If the file does not exist. In ``setup``, if the module has no parameter of an array's name and
            shape.

    Example:
        >>> np.savez("weights.npz", **{"net.linear1.weight": np.zeros((30, 1), np.float32)})
        >>> trainer = lightning.Trainer(callbacks=[InitialWeights("weights.npz")])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike) or not Path(path).is_file():
            raise ValueError(f"path={path!r} of InitialWeights is not a file: give the .npz file with the weights.")
        self.path = path
        self._is_done = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # A fit after an evaluation keeps the evaluated weights, and a test keeps the trained ones.
        if self._is_done or stage not in ("fit", "validate"):
            return
        self._is_done = True
        state = pl_module.state_dict()
        with np.load(self.path) as file, torch.no_grad():
            for name, array in file.items():
                if name not in state or state[name].shape != array.shape:
                    known = f"has shape {tuple(state[name].shape)}" if name in state else "is not there"
                    raise ValueError(
                        f"path={self.path!r} of InitialWeights holds {name!r} of shape {array.shape}, which "
                        f"{known} in {type(pl_module).__name__}: give the weights of this model."
                    )
                state[name].copy_(torch.from_numpy(array))
