"""What makes the callbacks and the plugin count under both names of Lightning: ``lightning`` and ``pytorch_lightning``.

The two packages have the same classes twice. A Trainer of ``pytorch_lightning`` asks in some places whether an object
is an instance of its own class: a plugin, a progress bar, a checkpoint callback, and what its LightningCLI reads.
"""

import sys
from typing import Any

_OURS, _OTHER = "lightning.pytorch", "pytorch_lightning"


class BothPackages:
    """A base of classes that inherit from ``lightning``: they inherit from the other package's same class, too.

    Only where ``pytorch_lightning`` has been imported. It costs nothing where it has not.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _inherit_from_both(cls)

    def __new__(cls, *args: Any, **options: Any) -> Any:
        # The other package may have been imported after this one.
        _inherit_from_both(cls)
        return super().__new__(cls)


def of_lightning(defined: Any) -> bool:
    """Whether a class or function is Lightning's own, under either name."""
    return _root(defined) in ("lightning", _OTHER)


def of_this_package(defined: Any) -> bool:
    """Whether a class or function is of this package."""
    return _root(defined) == _root(BothPackages)


def _root(defined: Any) -> str:
    return str(getattr(defined, "__module__", "")).partition(".")[0]


def _inherit_from_both(cls: type) -> None:
    """Add to the bases of a class of this package, and of its parents, the other package's class of the same name."""
    if _OTHER not in sys.modules:
        return
    for parent in cls.__mro__:
        if parent is not BothPackages and BothPackages in parent.__mro__:
            missing = [twin for twin in map(_twin, parent.__bases__) if twin is not None and twin not in cls.__mro__]
            if missing:
                # Not a second class: pickles name a class, and an older instance has to count, too.
                parent.__bases__ = (*parent.__bases__, *missing)


def _twin(base: type) -> type | None:
    """The other package's class of the same name. ``None`` for a class that is not Lightning's."""
    if not base.__module__.startswith(f"{_OURS}."):
        return None
    module = sys.modules.get(base.__module__.replace(_OURS, _OTHER, 1))
    twin: type | None = getattr(module, base.__name__, None)
    return twin
