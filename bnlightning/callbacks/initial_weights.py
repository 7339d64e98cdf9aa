"""A training that starts from given weights."""

from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class InitialWeights(Callback):
    """Start from the weights in a file, such as those that another framework's training started from.

    They are set before the fit, and before an evaluation in front of it; a checkpoint that is resumed from replaces
    them. What the file does not hold keeps its own initial values.

    Args:
        path: Of a ``.npz`` file with one array a parameter, by its name in the module's ``state_dict``, such as
            ``net.linear1.weight``.

    Raises:
        ValueError: If the file is not there, or an array in it is not one of the module's in name and shape.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[InitialWeights("weights.npz")])
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f"path={path!r} of InitialWeights is not a file: give the .npz file with the weights.")
        self.path = path
        self._is_done = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # A fit behind an evaluation goes on from the weights that were evaluated, a test from those that were trained.
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
