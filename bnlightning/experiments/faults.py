"""What a failure is told as."""

import errno
import os
import re
import threading
import traceback
import warnings

from hydra.errors import InstantiationException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

# What is wrong with what the user gave, said in one message.
REFUSALS = (InstantiationException, ValueError, MisconfigurationException)
# What a rank says when another one has gone without a word.
LOST = (
    "another rank's process or its connection has gone: it may have been killed, for want of memory or by the cluster"
)


def message(error: Exception) -> str:
    """One message for the user; the traceback, too, where Hydra's own variable asks for it."""
    if "HYDRA_FULL_ERROR" in os.environ:
        traceback.print_exception(error)
    cause = error.__cause__
    if isinstance(error, InstantiationException) and isinstance(cause, ValueError | MisconfigurationException):
        if "No supported gpu backend" in str(cause):
            return "trainer.accelerator='gpu' is not possible: no GPU is found. Give trainer=cpu or trainer=ddp_cpu."
        return str(cause)
    if isinstance(cause, OmegaConfBaseException):
        return f"{error}\n{cause}"
    return str(error)


def reason(error: Exception) -> str:
    """What other ranks are told of an error."""
    said = f"{type(error).__name__}: {message(error)}"
    return LOST if re.search("by peer|remote process", said) else said


def full_disk(error: BaseException | None) -> OSError | None:
    """The error that says so; Lightning's logger wraps what the writing of a scalar raises."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__
    return None


def excepthook(arguments: threading.ExceptHookArgs) -> None:
    """Leave a full disk that a thread meets to the main thread."""
    # TensorBoard's thread cannot write, either; the next to write is the main thread, which tells it.
    if full_disk(arguments.exc_value) is None:
        threading.__excepthook__(arguments)


def ignore_warnings() -> None:
    """Leave out warnings that say nothing to who runs the command."""
    # Lightning 2.6 with torch 2.15.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # The comparison tells which runs diverged, where and when.
    warnings.filterwarnings("ignore", message="ActivationMonitor: at step .* the first NaN")
    # The variant without batch normalisation has the monitors of the others.
    warnings.filterwarnings("ignore", message="BatchNormMonitor.modules=None. finds nothing to watch")
