"""The sentences on the first NaN or infinity of a training: where it came from, and what helps."""

from collections.abc import Callable

from bnlightning.monitors.words import labelled


def where_nonfinite(place: str, step: int, module_of: Callable[[str], str] = lambda path: "") -> str:
    """One sentence on where the first NaN or infinity came from.

    Args:
        place: What the check found: a module's path, ``"before <path>"``, ``"after <path>"``, ``"input"`` or
            ``"loss"``.
        step: Number of steps taken before.
        module_of: Returns the class of a module by its path. Empty if it is not known.
    """
    if place == "input":
        return f"the batch of step {step} holds a NaN or an infinity"
    if place == "loss":
        return f"at step {step} the loss is the first NaN or infinity, and no module put one out before"
    side, path = split_place(place)
    module = labelled(path, module_of(path))
    where = {
        "": f"in the output of {module}",
        "before": f"in the input of {module}, made by an operation that is no module",
        "after": f"in the loss, made by an operation behind {module}",
    }[side]
    return f"at step {step} the first NaN or infinity is {where}"


def split_place(place: str) -> tuple[str, str]:
    """The side, ``""``, ``"before"`` or ``"after"``, and the path of a module, which may have spaces in it.

    Example:
        >>> split_place("before net.1"), split_place("net.1")
        (('before', 'net.1'), ('', 'net.1'))
    """
    side, space, path = place.partition(" ")
    return (side, path) if space and side in ("before", "after") else ("", place)


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
