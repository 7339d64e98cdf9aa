"""The monitor of batch norm layers, in training and as evaluation uses them: plain torch, for any training loop.

>>> import torch
>>> network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
>>> monitor = Norms()
>>> monitor.attach(network)
>>> _ = network(torch.randn(32, 4))
>>> monitor.open(step=1)
>>> monitor.observe()
>>> _ = network(torch.randn(32, 4))
>>> record = monitor.close()
>>> sorted(record.norms["1"].numbers)
['mean_drift', 'min_running_var', 'scale_near_zero', 'var_drift']
>>> monitor.detach()
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlightning.monitors.catching.compiled import (
    add_receiver,
    copied,
    is_exporting,
    make_one,
    observe,
    remove_receiver,
)
from bnlightning.monitors.catching.hooks import NoHook, apart, is_recomputation, is_recorded, is_transformed
from bnlightning.monitors.catching.plain import plain
from bnlightning.monitors.catching.selection import Choice, device_of, is_chosen, user_path
from bnlightning.monitors.catching.switch import Switch
from bnlightning.monitors.counting.norm_statistics import norm_catalogue
from bnlightning.monitors.counting.norms import NormAccumulators, NormCounts
from bnlightning.monitors.record import Entry, Record


class Norms:
    """Watch the batch norm layers of a network.

    Args:
        modules: The batch norm layers to watch, as in :class:`~bnlightning.BatchNormMonitor`.
        max_layers: Largest number of watched layers. The first ones in the order of ``named_modules`` are taken.
    """

    def __init__(self, modules: Sequence[Choice] | None = None, *, max_layers: int = 200) -> None:
        self.modules = modules
        self.max_layers = max_layers
        self._catalogue = norm_catalogue()
        self.catalogues = (self._catalogue,)
        self.watched: list[str] = []
        self.left_out: list[str] = []
        # The class of each watched layer.
        self.modules_of: dict[str, str] = {}
        # Whether no layer was called on any rank in the last sample.
        self.saw_nothing = False
        self._switch: Switch | None = None
        self._catcher: _Catcher | None = None
        self._step: int | None = None

    def attach(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Put one hook on every chosen batch norm layer of ``module``.

        Args:
            module: The network.
            device: Device of the accumulators. ``None``: that of its first parameter.
        """
        self.detach()
        layers = {
            user_path(name): layer
            for name, layer in module.named_modules()
            if isinstance(layer, _BatchNorm)
            and (self.modules is None or is_chosen(self.modules, user_path(name), layer))
        }
        paths = list(layers)
        self.watched, self.left_out = paths[: self.max_layers], paths[self.max_layers :]
        if not self.watched:
            return
        watched = [layers[path] for path in self.watched]
        self.modules_of = {path: type(layers[path]).__name__ for path in self.watched}
        self._switch = Switch(module)
        device = device_of(module) if device is None else device
        self._catcher = _Catcher(NormAccumulators(watched, device), make_one(device))
        for index, layer in enumerate(watched):
            self._switch.add_before(layer, _Hook(self._catcher, index))

    def detach(self) -> None:
        """Take all hooks away."""
        if self._switch is not None:
            self._switch.remove()
        if self._catcher is not None:
            remove_receiver(self._catcher.number)
        self._switch = self._catcher = self._step = None

    def open(self, step: int) -> None:
        """Open a sample: what is observed from now on makes the record of ``step``."""
        if self._catcher is not None:
            self._catcher.accumulators.start()
            self._step = step

    @property
    def is_open(self) -> bool:
        """Whether a sample is open."""
        return self._step is not None

    def observe(self) -> None:
        """Begin a training batch."""
        if self._catcher is not None and self._switch is not None:
            self._catcher.is_observing = self.is_open
            self._switch.begin(self.is_open)

    def pause(self) -> None:
        """End a training batch. An evaluation that comes before the next one is not observed."""
        if self._catcher is not None and self._switch is not None:
            self._catcher.is_observing = False
            self._switch.end()

    def close(self) -> Record | None:
        """Close the sample and reduce it over the ranks. Every rank must call this.

        Returns:
            The record, the same on all ranks. ``None`` if no sample was open.
        """
        self.pause()
        step, self._step = self._step, None
        if self._catcher is None or step is None:
            return None
        self._catcher.accumulators.reduce()
        read = zip(self.watched, self._catcher.accumulators.statistics(), strict=True)
        layers = {path: counts for path, counts in read if counts is not None}
        self.saw_nothing = bool(layers) and not any(counts.seen for counts in layers.values())
        return self.record(step, layers)

    def record(self, step: int, layers: Mapping[str, NormCounts]) -> Record:
        """Make the record of what was counted.

        Args:
            step: Step of the record, its place on the x-axis.
            layers: The counts by path.
        """
        entries = {
            path: Entry(self._catalogue.numbers(counts), module=self.modules_of.get(path, ""))
            for path, counts in layers.items()
        }
        return Record(step, norms=entries, health=self._catalogue.health(list(layers.values())))

    def __getstate__(self) -> dict[str, Any]:
        # A network that is copied in the middle of a fit brings a copy of this along. It has no part in that fit.
        return vars(self) | {"_switch": None, "_catcher": None, "_step": None, "watched": [], "left_out": []}


class _Catcher:
    """The state that the hooks of one network share."""

    def __init__(self, accumulators: NormAccumulators, one: Tensor) -> None:
        self.accumulators = accumulators
        self.one = one
        self.is_observing = False
        self.number = add_receiver(self._receive, lambda *_: None)
        self._lock = threading.Lock()

    def catch(self, index: int, input: Tensor) -> None:
        """Take the input of a call of layer ``index``."""
        if is_recomputation() or is_transformed() or is_recorded():
            return
        values = plain(input)
        if values is not None:
            with apart(), self._lock:
                self.accumulators.update(index, values)

    def _receive(self, index: int, position: int, input: Tensor) -> None:
        """Take a value from inside a compiled graph."""
        if self.is_observing:
            self.catch(index, input)


class _Hook:
    """A layer's forward pre-hook."""

    def __init__(self, catcher: _Catcher, index: int) -> None:
        self.catcher = catcher
        self.index = index
        with torch.inference_mode(False):
            self.index_tensor = torch.tensor(index)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs.get("input")
        if not self.catcher.is_observing or not isinstance(input, Tensor):
            return
        if not torch.compiler.is_compiling():
            self.catcher.catch(self.index, input)
        elif not is_exporting() and not is_transformed() and type(input) is Tensor:
            observe(copied(input, self.catcher.one), self.catcher.number, self.index_tensor, -1)

    def __reduce__(self) -> Any:
        return NoHook, ()
