"""The hooks of a monitor, which are on the modules only while a batch runs in which there is something to see.

Whatever else is done with the network meets a network without hooks: it is exported, scripted, pickled or copied as if
there were no monitor.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bnlightning.monitors.catching.compiled import has_compiled, is_compiled, number_of_compilations


class Switch:
    """Turns hooks on and off, all at once and in well under a microsecond each.

    A graph of ``torch.compile`` that is made while hooks are off never calls them. In a compiled network they are
    therefore on in every batch. Once something was compiled between two batches, they stay on for good.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._is_compiled = is_compiled(module)
        if self._is_compiled or has_compiled():
            torch.compiler.reset()
        self._is_on = self._stays_on = self._is_in_batch = False
        self._has_begun = False
        self._compilations = number_of_compilations()
        self._hooks: list[tuple[RemovableHandle, list[tuple[dict[int, Any], Any]]]] = []

    @property
    def is_compiled(self) -> bool:
        """Whether the network, or something else that its batches call, is compiled."""
        return self._is_compiled or (self._is_in_batch and self._compilations != number_of_compilations())

    def add(self, module: nn.Module, hook: Any) -> None:
        """Add a forward hook, which is off.

        Raises:
            RuntimeError: If the module is compiled by TorchScript, which takes no hooks.
        """
        # Private, like the other two: a handle takes a hook off, but nothing public puts it back.
        handle = module.register_forward_hook(hook, with_kwargs=True)
        self._add(handle, [(module._forward_hooks, hook), (module._forward_hooks_with_kwargs, True)])

    def add_before(self, module: nn.Module, hook: Any) -> None:
        """Add a hook that is called before the forward pass, with keywords. It is off.

        Raises:
            RuntimeError: If the module is compiled by TorchScript, which takes no hooks.
        """
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._add(handle, [(module._forward_pre_hooks, hook), (module._forward_pre_hooks_with_kwargs, True)])

    def begin(self, is_looking: bool) -> None:
        """Begin a batch, or say anew what is to be done in one that has begun.

        Args:
            is_looking: Whether the hooks have anything to see.
        """
        if not self._is_in_batch:
            self._is_in_batch = True
            self._look_between_batches()
        self._turn(is_looking or self.is_compiled)

    def end(self) -> None:
        """End a batch, if one has begun."""
        if not self._is_in_batch:
            return
        if not self._is_compiled and self.is_compiled:
            self._is_compiled = True
            if not self._is_on:
                torch.compiler.reset()
        self._is_in_batch = False
        self._compilations = number_of_compilations()
        self._turn(self._stays_on)

    def remove(self) -> None:
        """Take all hooks away for good."""
        for handle, _ in self._hooks:
            handle.remove()
        self._hooks.clear()

    def _look_between_batches(self) -> None:
        compilations = number_of_compilations()
        if compilations != self._compilations and not self._stays_on and (self._is_compiled or not self._has_begun):
            torch.compiler.reset()
            # A second time would compile everything once more, and so on.
            self._stays_on = self._has_begun
        self._has_begun, self._compilations = True, compilations

    def _add(self, handle: RemovableHandle, places: list[tuple[dict[int, Any], Any]]) -> None:
        self._hooks.append((handle, places))
        handle.remove()

    def _turn(self, on: bool) -> None:
        if on == self._is_on:
            return
        self._is_on = on
        for handle, places in self._hooks:
            if not on:
                handle.remove()
                continue
            for place, entry in places:
                place[handle.id] = entry
