"""The monitor of gradients and updates of parameters: plain torch, for any training loop.

>>> import torch
>>> network = torch.nn.Linear(4, 1)
>>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
>>> monitor = Gradients()
>>> monitor.attach(network)
>>> network(torch.ones(8, 4)).mean().backward()
>>> monitor.open(step=0)
>>> monitor.take(network.parameters())
>>> optimizer.step()
>>> record = monitor.close()
>>> round(record.parameters["weight"].numbers["grad_norm"], 6)
2.0
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from bnlightning.monitors.catching.selection import device_of, user_path
from bnlightning.monitors.counting.histogram import TypicalRanges
from bnlightning.monitors.counting.parameter_statistics import parameter_catalogue
from bnlightning.monitors.counting.parameters import ParameterAccumulators, ParameterCounts
from bnlightning.monitors.record import Entry, Record

Predicate = Callable[[str, nn.Parameter], bool]
ParameterChoice = str | Sequence[str] | Predicate | None


class Gradients:
    """Watch the gradients and the updates of a network's parameters.

    Args:
        parameters: The parameters that get numbers of their own, as in :class:`~bnlightning.GradientMonitor`.
        max_parameters: Largest number of parameters with numbers of their own. The first ones are taken.
    """

    def __init__(self, parameters: ParameterChoice = None, *, max_parameters: int = 200) -> None:
        self.parameters = parameters
        self.max_parameters = max_parameters
        self._catalogue = parameter_catalogue()
        self.catalogues = (self._catalogue,)
        # In the order of the parameters.
        self.chosen: dict[str, None] = {}
        self.left_out: dict[str, None] = {}
        self._decided: set[str] = set()
        self._owners: dict[str, str] = {}
        self._ranges = TypicalRanges()
        self._module: nn.Module | None = None
        self._device = torch.device("cpu")
        self._step: int | None = None
        self._accumulators: ParameterAccumulators | None = None

    def attach(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Decide which parameters of ``module`` get numbers of their own.

        Args:
            module: The network.
            device: The device of collectives. ``None``: that of its first parameter.
        """
        self.detach()
        self._module = module
        self._device = device_of(module) if device is None else device
        self.chosen, self.left_out, self._decided = {}, {}, set()
        self._owners = {
            user_path(f"{name}.{own}" if name else own): type(part).__name__
            for name, part in module.named_modules()
            for own, _ in part.named_parameters(recurse=False)
        }
        self._choose(by_path(module))

    def detach(self) -> None:
        """Forget the network. The typical ranges stay, for it may be attached again."""
        self._module = None
        self.abandon()

    def forget(self) -> None:
        """Forget the typical ranges: a training begins anew."""
        self._ranges = TypicalRanges()

    def open(self, step: int) -> None:
        """Open a sample: what is taken from now on makes the record of ``step``."""
        self.abandon()
        self._step = step

    def abandon(self) -> None:
        """Drop what was taken since :meth:`open`. It makes no record."""
        self._step, self._accumulators = None, None

    @torch.no_grad()
    def take(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Take down gradients and weights just before a step. A parameter that is stepped again is taken down anew.

        Every rank computes by itself, since all ranks step with the same gradients. Of sharded parameters each takes
        down its part.

        Args:
            parameters: The parameters that the step is for. Those without a gradient are passed over.
            scale: Divisor of the gradients, such as the scale of fp16. 1 leaves them as they are.
        """
        if self._step is None:
            return
        if self._module is None:
            raise RuntimeError("Gradients.take was called before attach: call attach(module) first.")
        if self._accumulators is None:
            known = by_path(self._module)
            self._choose(known)
            self._accumulators = ParameterAccumulators(known, self.chosen, self._device)
        self._accumulators.record(parameters, scale)

    @torch.no_grad()
    def close(self) -> Record | None:
        """Take down what the steps made of the weights, and close the sample.

        With sharded parameters every rank must call this.

        Returns:
            The record, the same on all ranks. ``None`` if nothing was taken down.
        """
        step, accumulators = self._step, self._accumulators
        self.abandon()
        if step is None or accumulators is None:
            return None
        accumulators.finish()
        return self.record(step, accumulators.statistics())

    def record(self, step: int, found: Mapping[str, ParameterCounts]) -> Record:
        """Make the record of what was counted.

        Args:
            step: Step of the record, its place on the x-axis.
            found: The counts by path, of all parameters with a gradient.
        """
        entries = {path: self._entry(path, counts) for path, counts in found.items() if path in self.chosen}
        return Record(step, parameters=entries, health=self._catalogue.health(list(found.values())))

    def state_dict(self) -> dict[str, Any]:
        """The typical ranges as plain values, for a checkpoint."""
        return {"ranges": self._ranges.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._ranges.load_state_dict(state["ranges"])

    def _entry(self, path: str, counts: ParameterCounts) -> Entry:
        drawn = {} if counts.histogram is None else {"grad_hist": self._ranges.fit(path, counts.histogram)}
        owner = self._owners.get(path, "")
        return Entry(self._catalogue.numbers(counts), drawn, is_weight=counts.dims >= 2, module=owner)

    def _choose(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Decide on parameters that require a gradient only now. Earlier decisions stay."""
        for path, parameter in parameters.items():
            if not parameter.requires_grad or path in self._decided:
                continue
            self._decided.add(path)
            if self._selects(path, parameter):
                (self.chosen if len(self.chosen) < self.max_parameters else self.left_out)[path] = None

    def _selects(self, path: str, parameter: nn.Parameter) -> bool:
        if self.parameters is None:
            return True
        if callable(self.parameters):
            return bool(self.parameters(path, parameter))
        patterns = [self.parameters] if isinstance(self.parameters, str) else self.parameters
        return any(fnmatchcase(path, pattern) for pattern in patterns)


def by_path(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of a module. A shared parameter stands under its first path."""
    return {user_path(name): parameter for name, parameter in module.named_parameters()}
