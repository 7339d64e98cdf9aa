"""What all hooks share: what a copied hook becomes, and how a hook tells a recomputation from a call."""

from typing import Any

import torch


class NoHook:
    """What a hook becomes when its module is pickled or copied. It does nothing and holds nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def is_recomputation() -> bool:
    """Whether activation checkpointing is running a forward pass again, within a backward pass.

    ``False`` while a graph is traced for ``torch.compile``. A compiled backward pass may compute values again, but does
    not repeat the side effects of the forward pass.
    """
    if torch.compiler.is_compiling():
        return False
    # Private, and the only way to tell. Torch's own FSDP asks it, too.
    current_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)
    return current_graph_task_id is not None and current_graph_task_id() != -1
