"""What forward hooks have to know about the call that they are in, and what becomes of their copies."""

from typing import Any

import torch


class NoHook:
    """What a hook is in a copy of its module, pickled or deep: it does nothing and brings nothing along."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Be called as any hook is."""


def is_recomputation() -> bool:
    """Whether activation checkpointing runs a forward pass again, in the middle of a backward pass.

    ``False`` where a graph is traced for ``torch.compile``: what that computes again in its backward pass leaves alone
    what the forward pass has changed.
    """
    if torch.compiler.is_compiling():
        return False
    # Private, and the only way to tell; torch's own FSDP asks it, too.
    current_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)
    return current_graph_task_id is not None and current_graph_task_id() != -1
