"""Which backward pass a gradient comes from: that of a loss, or one that only asks for some gradients."""

from typing import Any

import torch
from torch import Tensor


class Backwards:
    """Tells the backward passes whose gradients count.

    A loop may say when the loss goes backward. Then only that counts. Otherwise each pass counts that adds to the
    ``grad`` of parameters, as ``backward()`` does. One of ``torch.autograd.grad`` does not, such as that of a gradient
    penalty or of a product with the Hessian.

    Attributes:
        is_of_loss: Whether the loss goes backward now. ``None``: nobody says so.
    """

    def __init__(self) -> None:
        self.is_of_loss: bool | None = None
        self._latest: tuple[int, bool] | None = None

    def counts(self, leaf: Any) -> bool:
        """Whether the gradients of the backward pass that is running count.

        Args:
            leaf: What :func:`leaf_behind` returned.
        """
        if self.is_of_loss is not None or leaf is None:
            return self.is_of_loss is not False
        # Private, as is the way to tell a recomputation.
        number = torch._C._current_graph_task_id()
        if self._latest is None or self._latest[0] != number:
            self._latest = number, _will_add(leaf)
        return self._latest[1]


def leaf_behind(x: Tensor) -> Any:
    """The node that adds to the ``grad`` of some leaf that ``x`` depends on. ``None`` if there is none.

    The node does not lead back to ``x``, so that a hook of ``x`` can hold it without a cycle.
    """
    node: Any = x.grad_fn
    while node is not None:
        behind = [each for each, _ in node.next_functions if each is not None]
        leaf = next((each for each in behind if hasattr(each, "variable")), None)
        if leaf is not None:
            return leaf
        node = behind[0] if behind else None
    return None


def _will_add(leaf: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:
        # The leaf is one of those that torch.autograd.grad returns the gradients of.
        return False
