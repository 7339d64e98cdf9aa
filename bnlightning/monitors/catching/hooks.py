"""What all hooks share: what their copies become, which calls they leave out, how they look without being seen."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

_functorch: Any = torch._C._functorch
_is_included: Any = torch._C._dispatch_tls_is_dispatch_key_included
_peek: Any = _functorch.peek_interpreter_stack
_num_modes: Any = torch._C._len_torch_dispatch_stack
_num_function_modes: Any = torch._C._len_torch_function_stack
_is_tracing: Any = torch._C._is_tracing
_BEFORE_DISPATCH = torch._C.DispatchKey.PreDispatch


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


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is running, such as ``vmap`` or ``grad``.

    Its tensors stand for others: a batch as a single sample, or a value with its derivative.
    """
    # Private, and the only way to tell. In this form torch.compile understands it, too.
    return isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter)


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for a batch of itself, without a transform of ``torch.func``.

    The gradients of ``torch.autograd.grad(is_grads_batched=True)`` do, and those of torch's vectorised Jacobians.
    """
    return bool(_functorch.is_legacy_batchedtensor(x))


def is_recorded() -> bool:
    """Whether a program is being recorded: by ``torch.jit.trace``, ``make_fx``, ``torch.export``, or by fake tensors.

    What a hook computes would become a part of that program. ``False`` while a graph is traced for ``torch.compile``.
    """
    if _is_tracing():
        return True
    # Private, like what they are made of. Modes of the user, such as a counter of operations, record no program.
    modes = _python_dispatch._get_current_dispatch_mode_stack() if _num_modes() else ()
    return any(getattr(mode, "_mode_key", None) is not None for mode in modes) or _is_included(_BEFORE_DISPATCH)


def is_usual() -> bool:
    """Whether there is no transform, no recording and no mode: a single quick question for each call."""
    # By name, for this is asked in every call that is checked.
    return not (_num_modes() or _num_function_modes() or _is_tracing() or _is_included(_BEFORE_DISPATCH) or _peek())


def apart() -> contextlib.AbstractContextManager[Any]:
    """A context in which no mode of the user sees what is computed, such as a counter of operations."""
    if not (_num_modes() or _num_function_modes()):
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(_python_dispatch._disable_current_modes())
    return stack
