"""The sentences on the first NaN or infinity of a training: where it came from, and what helps."""


def where_nonfinite(place: str, step: int) -> str:
    """One sentence on where the first NaN or infinity came from.

    Args:
        place: What the check found: a module's path, ``"before <path>"``, ``"after <path>"``, ``"input"`` or
            ``"loss"``.
        step: Number of steps taken before.
    """
    if place == "input":
        return f"the batch of step {step} holds a NaN or an infinity"
    if place == "loss":
        return f"at step {step} the loss is the first NaN or infinity"
    side, _, module = place.rpartition(" ")
    where = {
        "": f"in the output of {module}",
        "before": f"in the input of {module}, made by an operation that is no module",
        "after": f"in the loss, made by an operation behind {module}",
    }[side]
    return f"at step {step} the first NaN or infinity is {where}"


def cures_nonfinite(place: str) -> str:
    """One sentence on what people do about it.

    Args:
        place: What the check found, as in :func:`where_nonfinite`.
    """
    if place == "input":
        return "Usual cures: clean the data, or skip such batches."
    return (
        "Usual cures: a lower learning rate or a warm-up, gradient clipping, a normalisation in front of the layer, "
        "smaller initial weights, bf16 in the place of fp16."
    )
