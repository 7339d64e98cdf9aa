"""Our layers in torch's ``fuse_modules``, which folds a batch norm layer into the convolution before it."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_Fuse = Callable[..., nn.Module]


@dataclass(frozen=True)
class _FuseInEvaluation:
    """Torch's function for its own classes. In evaluation it reads numbers only, which ours have, too."""

    fuse: _Fuse

    def __call__(self, is_qat: bool, *modules: nn.Module) -> nn.Module:
        by_mode = all(getattr(module, "normalize_by", "mode") == "mode" for module in modules)
        if is_qat or not by_mode or isinstance(modules[0], nn.modules.batchnorm._BatchNorm):
            names = " and ".join(type(module).__name__ for module in modules)
            raise RuntimeError(
                f"fuse_modules cannot fuse bnlightning's {names}: what comes out would train or evaluate otherwise. "
                "Call swap_norm(model, 'torch') first."
            )
        return self.fuse(is_qat, *modules)


def register_fusion(ours: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Tell ``fuse_modules`` that our classes fuse as torch's do. It knows classes by themselves, not their subclasses.

    Call it from within ``fuse_modules``. Importing that function takes long, so nobody does for its sake.

    Args:
        ours: Our class for each of torch's.

    Raises:
        RuntimeError: If this version of torch has no table of classes where it was.
    """
    table: dict[tuple[type, ...], Any] | None = getattr(
        sys.modules.get("torch.ao.quantization.fuser_method_mappings"), "_DEFAULT_OP_LIST_TO_FUSER_METHOD", None
    )
    if table is None:
        raise RuntimeError(
            "fuse_modules of this version of torch knows torch's own layers only. Call swap_norm(model, 'torch') first."
        )
    for types, fuse in list(table.items()):
        for torchs, own in ours.items():
            if torchs in types:
                table.setdefault(tuple(own if each is torchs else each for each in types), _FuseInEvaluation(fuse))
