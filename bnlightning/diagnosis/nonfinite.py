"""The sentences on the first NaN or infinity of a training: where it came from, and what helps."""

from collections.abc import Callable

from bnlightning.monitors.catching.finite_check import Place
from bnlightning.monitors.words import labelled

_OPERATION = "made by an operation that is no module"


def where_nonfinite(place: Place, step: int, module_of: Callable[[str], str] = lambda path: "") -> str:
    """One sentence on where the first NaN or infinity came from.

    Args:
        place: What the check found.
        step: Number of steps taken before.
        module_of: Returns the class of a module by its path. Empty if it is not known.
    """
    if place.kind == "batch":
        number = "" if place.batch_idx is None else f" (batch_idx={place.batch_idx})"
        entry = f" in its entry {place.path.removeprefix(':')}" if place.path else ""
        return f"the batch of step {step}{number} holds a NaN or an infinity{entry}"
    if place.kind == "loss":
        return f"at step {step} the loss is the first NaN or infinity, and no module put one out before"
    made = "from the start" if step == 0 else f"since the update of step {step - 1}, or longer"
    module = labelled(place.path, module_of(place.path)) if place.is_of_module else ""
    where = {
        "output": f"in the output of {module}",
        "before": f"in the input of {module}, {_OPERATION}",
        "first": f"in the input of {module}, made in training_step or a forward method before {place.path}; the "
        "batch itself is finite",
        "after": f"in the loss, made by an operation behind {module}",
        "parameter": f"in the parameter {place.path}, {made}",
        "buffer": f"in the buffer {place.path}, {made}",
    }[place.kind]
    return f"at step {step} the first NaN or infinity is {where}"


def cures_nonfinite(place: Place) -> str:
    """One sentence on what people do about it.

    Args:
        place: What the check found.
    """
    if place.kind == "batch":
        return "Usual cures: clean the data, or skip such batches."
    if place.kind == "first":
        return "Usual cures: add a small number to what is divided by or rooted, such as a standard deviation of zero."
    if place.kind == "parameter":
        return (
            "Usual cures: look for a gradient that is not finite although the loss is, such as that of a square root "
            "at zero; gradient clipping, a lower learning rate."
        )
    return (
        "Usual cures: a lower learning rate or a warm-up, gradient clipping, a normalisation in front of the layer, "
        "smaller initial weights, bf16 in the place of fp16."
    )
