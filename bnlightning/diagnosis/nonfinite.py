"""The sentences on the first NaN or infinity of a training: where it came from, and what helps."""

from bnlightning.monitors.catching.finite_check import Place

_OPERATION = "made by an operation that is no module"


def where_nonfinite(place: Place, step: int) -> str:
    """One sentence on where the first NaN or infinity came from.

    Args:
        place: What the check found.
        step: Number of steps taken before.
    """
    if place.kind == "batch":
        number = "" if place.batch_idx is None else f" (batch_idx={place.batch_idx})"
        entry = f" in its entry {place.path.removeprefix(':')}" if place.path else ""
        return f"the batch of step {step}{number} holds a NaN or an infinity{entry}"
    if place.kind == "loss":
        return f"at step {step} the loss is the first NaN or infinity"
    made = "from the start" if step == 0 else f"since the update of step {step - 1}, or longer"
    where = {
        "output": f"in the output of {place.path}",
        "before": f"in the input of {place.path}, {_OPERATION}",
        "first": f"in the input of {place.path}, made in training_step or a forward method before {place.path}; the "
        "batch itself is finite",
        "after": f"in the loss, made by an operation behind {place.path}",
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
