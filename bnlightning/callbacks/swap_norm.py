"""A callback and a plugin that swap the batch norm layers of a LightningModule before it trains."""

import warnings
from collections.abc import Callable
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import nn

from bnlightning._check import by_import_path
from bnlightning.callbacks._packages import BothPackages, of_lightning
from bnlightning.callbacks._state_key import described
from bnlightning.nn.swap import SwapReport, swap_norm

# The hooks in which a module may build layers after the callbacks' setup, the last one first.
_LATE_HOOKS = ("configure_model", "setup")


class SwapNorm(BothPackages, Callback):
    """Swap the batch norm layers of the LightningModule, by :func:`bnlightning.swap_norm`.

    The swap happens in ``setup``. Some modules override ``setup`` or ``configure_model`` and may build their layers
    there: those are swapped right after the last of the two. In both cases, and with every strategy, the swap comes
    before checkpoints are restored, optimizers are built and the strategy wraps the module. List this callback before
    others that copy the module in ``setup``, such as ``WeightAveraging``.

    A module is swapped once and stays swapped through all later stages and Trainers. ``callback.report.revert()``
    undoes the swap.

    A checkpoint has the keys of the swapped module. With ``"custom"``, ``"torch"`` and ``"sync"`` these are the
    original's keys. A checkpoint also remembers ``to`` and the options, so Lightning warns if it is resumed without the
    callback. ``load_from_checkpoint`` builds the module as its class does, so a Trainer that continues with it needs
    the callback again.

    Strategies with spawned or forked processes (``ddp_spawn``, ``ddp_notebook``) leave the caller's module as it was.
    Only the trained values return to it. With those strategies use only the three choices that keep the keys.

    Args:
        to: Target of the swap: ``"none"``, ``"custom"``, ``"torch"``, ``"sync"`` or a callable. See
            :func:`bnlightning.swap_norm`.
        strict: Whether a layer that cannot be swapped is an error.
        **options: Options of the new layers. See :func:`bnlightning.swap_norm`.

    Attributes:
        report: The :class:`bnlightning.SwapReport` of the last swap; ``None`` before the first.

    Raises:
        ValueError: If an argument is not known. In ``setup``, for the reasons of :func:`bnlightning.swap_norm`.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[SwapNorm("custom", convention="keras", momentum=0.01)])
    """

    def __init__(self, to: str | Callable[..., nn.Module], strict: bool = True, **options: Any) -> None:
        to = by_import_path(to)
        if isinstance(to, str):
            with warnings.catch_warnings():
                # Errors in the arguments are told here, warnings when the swap happens.
                warnings.simplefilter("ignore")
                swap_norm(nn.BatchNorm1d(1, device="meta"), to, **options)
        self.to = to
        self.strict = strict
        self.options = options
        self.report: SwapReport | None = None
        self._swapped: list[nn.Module] = []
        self._put_back: Callable[[], None] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"to": described(self.to), "strict": self.strict, "options": described(self.options)}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if any(module is pl_module for module in self._swapped):
            return
        late = next((name for name in _LATE_HOOKS if _is_overridden(pl_module, name)), None)
        if late is None:
            self._swap(pl_module)
        else:
            self._swap_after(pl_module, late)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # The exception may have come before the hook was called.
        if self._put_back is not None:
            self._put_back()

    def _swap(self, module: lightning.LightningModule) -> None:
        self.report = swap_norm(module, self.to, strict=self.strict, **self.options)
        self._swapped.append(module)

    def _swap_after(self, module: lightning.LightningModule, name: str) -> None:
        """Swap after the module's next call of its own hook ``name``."""
        hook = getattr(module, name)
        attributes = vars(module)
        own = {name: attributes[name]} if name in attributes else {}

        def put_back() -> None:
            attributes.pop(name, None)
            attributes.update(own)
            self._put_back = None

        def hook_and_swap(*args: Any, **kwargs: Any) -> None:
            put_back()
            hook(*args, **kwargs)
            self._swap(module)

        attributes[name] = hook_and_swap
        self._put_back = put_back


class BatchNormSync(BothPackages, LayerSync):
    """Synchronise the batch norm layers during a fit, by :func:`bnlightning.swap_norm`. A plugin of the Trainer.

    Use it instead of ``Trainer(sync_batchnorm=True)``, which would replace our layers by torch's and lose their
    convention. During the fit torch's layers become ours with torch's convention, so this works on the CPU too. After
    the fit every layer is what it was.

    Only the strategies DDP and FSDP use such plugins, and only in a fit. With other strategies use
    ``SwapNorm("sync")``.

    Args:
        strict: Whether a layer that cannot be synchronised is an error, or a module without batch norm layers.

    Example:
        >>> trainer = lightning.Trainer(plugins=[BatchNormSync()], strategy="ddp", accelerator="cpu", devices=2)
    """

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self._report: SwapReport | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        self._report = swap_norm(model, "sync", strict=self.strict)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        if self._report is not None:
            self._report.revert()
        return model


def _is_overridden(module: lightning.LightningModule, name: str) -> bool:
    return name in vars(module) or not of_lightning(getattr(type(module), name))
