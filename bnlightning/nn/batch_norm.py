"""Batch norm layers that behave as torch's and can keep their running statistics by another framework's convention."""

import math
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from bnlightning._check import check_choice, check_number
from bnlightning.nn.convention import CONVENTIONS, Convention, convention_name
from bnlightning.nn.functional import (
    batch_norm_averaging,
    batch_norm_fast,
    batch_norm_inference_fast,
    batch_norm_inference_reference,
    batch_norm_reference,
    reduced_dims,
    statistics_dtype,
)
from bnlightning.nn.fusing import register_fusion
from bnlightning.nn.moments import world_size
from bnlightning.nn.sync import batch_norm_sync, moments_over_ranks

UpdateRule = Callable[[Any, Tensor, Tensor, int | Tensor], None]
_BACKENDS = {"fast": batch_norm_fast, "reference": batch_norm_reference}
_INFERENCE_BACKENDS = {"fast": batch_norm_inference_fast, "reference": batch_norm_inference_reference}


class _ConventionBatchNorm(_TorchBatchNorm):
    """The common part of the layers for one, two and three dimensions.

    Attributes:
        normalize_by: The statistics to normalise by: always those of the ``batch``, always the ``running`` ones, or by
            ``mode``. In the last case training uses the batch's and evaluation the running ones, as in torch.
        frozen: Whether training leaves the running statistics as they are.
        update_rule: Function called in the place of :meth:`update_running_stats`, which it may call. Its arguments are
            the layer, the batch's mean, its biased variance and the number of values per channel.
        batch_of_one: Treatment of a training batch of one value per channel: ``raise``, ``running`` or ``skip``.
        changes: The changes in force. The functions of :mod:`bnlightning.nn.statistics` add and remove them, and set
            the other attributes from them.
    """

    def __init__(
        self,
        num_features: int,
        eps: float | None = None,
        momentum: float | Literal["convention"] | None = "convention",
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        convention: str | Convention = "pytorch",
        backend: str = "fast",
        sync: bool = False,
        process_group: Any = None,
    ) -> None:
        check_choice("backend", backend, _BACKENDS)
        if not isinstance(convention, Convention):
            check_choice("convention", convention, CONVENTIONS)
        named = CONVENTIONS[convention] if isinstance(convention, str) else convention
        self.convention = named
        self.backend = backend
        self.sync = sync
        self.process_group = process_group
        self.normalize_by = "mode"
        self.frozen = False
        self.update_rule: UpdateRule | None = None
        self.batch_of_one = "raise"
        self.changes: list[Any] = []
        super().__init__(
            num_features,
            _given("eps", eps, named.eps, convention),
            momentum if momentum is None else _momentum(momentum, named, convention),
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            # torch before 2.15 does not know the argument, so the default is not passed on.
            **({} if bias else {"bias": False}),
        )

    def reset_running_stats(self) -> None:
        """Set the running statistics to the convention's initial values."""
        super().reset_running_stats()
        self._seen_untrained = True
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.fill_(self.convention.initial_mean)
            self.running_var.fill_(self.convention.initial_var)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` by the batch's statistics in training, by the running statistics in evaluation.

        As in torch, a layer without running statistics normalises by the batch's in evaluation too.
        """
        if not isinstance(input, Tensor):
            return cast(Tensor, _traced(self, input))
        # torch has no types for this method.
        check: Callable[[Tensor], None] = self._check_input_dim
        check(input)
        if self.convention.per_activation and input.dim() > 2:
            return self._normalize(input.flatten(1)).view_as(input)
        return self._normalize(input)

    def _normalize(self, input: Tensor) -> Tensor:
        if input.shape[1] != self.num_features:
            raise ValueError(_channels_message(self, input))
        n = input.numel() // max(self.num_features, 1)
        tracked = self.track_running_stats and self.running_mean is not None
        updates = tracked and self.training and not self.frozen
        synced = self.sync and self.training and world_size(self.process_group) > 1
        plain = self.backend == "fast" and self.update_rule is None and not synced and n > 1
        if plain and not self._normalizes_by_running():
            momentum = self.weight_of_next_batch() if updates else None
            if not isinstance(momentum, Tensor):
                return self._normalize_by_kernel(input, momentum)
        return self._normalize_in_parts(input, n, updates, synced)

    def _normalize_in_parts(self, input: Tensor, n: int, updates: bool, synced: bool) -> Tensor:
        """Compute the output, then update the running statistics."""
        if self._normalizes_by_running():
            return self._normalize_by_running(input, n, synced) if updates else self._infer(input)
        if n < 2 and not synced and (n == 0 or self.batch_of_one != "raise"):
            return self._normalize_too_few(input, n)
        count: int | Tensor = n
        if synced:
            output, mean, var, count = batch_norm_sync(input, self.weight, self.bias, self.eps, self.process_group)
        else:
            output, mean, var = _BACKENDS[self.backend](input, self.weight, self.bias, self.eps)
        if updates:
            self._update(mean, var, count)
        return output

    def _normalizes_by_running(self) -> bool:
        if self.running_mean is None or self.normalize_by == "batch":
            return False
        return not self.training or self.normalize_by == "running"

    def _normalize_by_running(self, input: Tensor, n: int, synced: bool) -> Tensor:
        """Update the running statistics from the batch, then normalise by them."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        if synced:
            self._update(*moments_over_ranks(input.detach(), self.process_group))
        elif n > 1:
            x = input.detach().to(statistics_dtype(input))
            batch_var, batch_mean = torch.var_mean(x, dim=reduced_dims(x), correction=0)
            self._update(batch_mean, batch_var, n)
        # The next batch will change the buffers, perhaps before this one's backward pass.
        infer = _INFERENCE_BACKENDS[self.backend]
        return infer(input, mean.clone(), var.clone(), self.weight, self.bias, self.eps)

    def _infer(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        if self._seen_untrained and self.convention.initial_var == 0 and not torch.compiler.is_compiling():
            self._warn_if_untrained(var)
        return _INFERENCE_BACKENDS[self.backend](input, mean, var, self.weight, self.bias, self.eps)

    def _warn_if_untrained(self, var: Tensor) -> None:
        # A tensor on the meta device or in a trace has no data to read.
        if var.is_meta or type(var) is not Tensor:
            return
        # Remembered, because reading the values waits for the device.
        self._seen_untrained = not self.num_batches_tracked and not var.any()
        if self._seen_untrained:
            warnings.warn(_UNTRAINED, stacklevel=5)

    def _normalize_too_few(self, input: Tensor, n: int) -> Tensor:
        """Treat a batch without values, or with one value per channel. The running statistics stay as they are."""
        if n == 0:
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.batch_of_one == "running" and self.running_mean is not None:
            return self._infer(input)
        dtype = self.weight.dtype if self.weight is not None else input.dtype
        zeros = torch.zeros(self.num_features, dtype=dtype, device=input.device)
        return F.batch_norm(input, zeros, zeros + 1, self.weight, self.bias, False, 0.0, 0.0)

    def _normalize_by_kernel(
        self, input: Tensor, momentum: float | None, kernel: Callable[..., Tensor] = F.batch_norm
    ) -> Tensor:
        """Normalise in one call, which also averages the statistics unless ``momentum`` is ``None``."""
        if momentum is None:
            return kernel(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and var is not None and count is not None
        unbiased = self.convention.unbiased
        output = batch_norm_averaging(input, mean, var, self.weight, self.bias, momentum, self.eps, unbiased, kernel)
        count.add_(1)
        return output

    def _update(self, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        if self.update_rule is not None:
            self.update_rule(self, mean, var, n)
        else:
            self.update_running_stats(mean, var, n)

    @torch.no_grad()
    def update_running_stats(self, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        """Add a batch to the running averages.

        Args:
            mean: Mean of the batch, shape ``(C,)``.
            var: Biased variance of the batch, shape ``(C,)``.
            n: Number of values per channel in the batch. Below 2 nothing changes. With a tensor the decision is made on
                the device, and nothing waits for it.
        """
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        weight = self.weight_of_next_batch()
        if isinstance(n, Tensor):
            seen = n > 1
            mean = torch.where(seen, mean, self.running_mean)
            var = torch.where(seen, var, self.running_var)
            # Half precision cannot hold a large count.
            count = n.to(torch.promote_types(var.dtype, torch.float32))
            bessel: float | Tensor = torch.where(seen, count / (count - 1), 1).to(var.dtype)
            self.num_batches_tracked.add_(seen)
        elif n < 2:
            return
        else:
            bessel = n / (n - 1)
            self.num_batches_tracked.add_(1)
        if self.convention.unbiased:
            var = var * bessel
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(var.to(self.running_var.dtype), weight)

    def weight_of_next_batch(self) -> float | Tensor:
        """Return the weight of the next batch in the running statistics, from 0 to 1.

        This is the momentum. With ``momentum=None`` or a convention that debiases, it starts from 1 and falls as
        batches are counted. On a device other than the CPU it then is a tensor, so that nothing waits for the device.
        """
        if self.momentum is not None and (not self.convention.debias or self.momentum == 1):
            return float(self.momentum)
        assert self.running_mean is not None and self.num_batches_tracked is not None
        # With debiasing, a momentum of 0 gives all batches the same weight, as None does.
        decay = math.log1p(-self.momentum) if self.momentum else None
        if self.num_batches_tracked.is_cpu and not torch.compiler.is_compiling():
            count = self.num_batches_tracked.item() + 1
            return 1 / count if decay is None else math.expm1(decay) / math.expm1(count * decay)
        dtype = torch.promote_types(self.running_mean.dtype, torch.float32)
        counted = (self.num_batches_tracked + 1).to(dtype)
        if decay is None:
            return counted.reciprocal().to(self.running_mean.dtype)
        # (1 - d) / (1 - d^k) for d = 1 - momentum, by expm1, because the differences lose digits while they are small.
        return (math.expm1(decay) / torch.expm1(counted * decay)).to(self.running_mean.dtype)

    @property
    def qconfig(self) -> Any:
        """The attribute that torch.ao's quantisation sets on a module. The layer has none until then.

        Raises:
            RuntimeError: If ``convert_sync_batchnorm`` reads it, torch's function or a copy of it. That function
                replaces every batch norm layer by torch's, whatever the convention. It reads no other attribute by
                which a layer could refuse.
        """
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise RuntimeError(
                f"convert_sync_batchnorm would replace {self} by torch.nn.SyncBatchNorm and lose its convention. "
                "Instead of Trainer(sync_batchnorm=True) pass Trainer(plugins=[BatchNormSync()]) or the callback "
                'SwapNorm("sync"). Without a Trainer, call swap_norm(model, "sync"). The layers before this one have '
                "been replaced already: build the model again."
            )
        if "qconfig" not in self.__dict__:
            # hasattr answers as on a module without the attribute.
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        if "qconfig" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")
        del self.__dict__["qconfig"]

    @property
    def parametrizations(self) -> Any:
        """The attribute that ``torch.nn.utils.parametrize`` sets on a module. The layer has none until then.

        Torch's ``fuse_modules`` reads it before it looks for a function that fuses. It is then told of our classes.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name in (
            "is_parametrized",
            "type_before_parametrizations",
            "<genexpr>",
        ):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_name == "fuse_known_modules":
            register_fusion({nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d})
        # nn.Module is asked next, as for any attribute that a class does not have.
        raise AttributeError("parametrizations")

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` asks for first.

        Raises:
            RuntimeError: Always. The compiler would fail in the middle of the layer's source.
        """
        raise RuntimeError(
            f"torch.jit.script cannot compile {self}. Call swap_norm(model, 'torch') first, or take torch.jit.trace or "
            "torch.export, which can."
        )

    def extra_repr(self) -> str:
        """Return torch's arguments and our own."""
        sync = ", sync=True" if self.sync else ""
        # torch has no types for this method.
        torchs: Callable[[], str] = super().extra_repr
        return f"{torchs()}, convention={convention_name(self.convention)}, backend={self.backend!r}{sync}"


class BatchNorm1d(_ConventionBatchNorm, nn.BatchNorm1d):
    """Batch normalisation of ``(N, C)`` or ``(N, C, L)`` input, by torch's convention or another framework's.

    The layer is a :class:`torch.nn.BatchNorm1d` with the same state_dict keys and, by default, the same numbers. In
    training it normalises by the statistics of the batch on this rank, or with ``sync`` by those of all ranks' batches.

    Args:
        num_features: Number of channels C. For a convention per activation, all features of a sample (C·L).
        eps: Number added to the variance. ``None``, the default, takes the convention's.
        momentum: Weight of the new batch in the running statistics, from 0 to 1. This is torch's direction,
            1 - TensorFlow's decay. The default takes the convention's; ``None`` averages over all batches.
        affine: Whether to learn a scale (``weight``) and a shift (``bias``).
        track_running_stats: Whether to keep running statistics. Without them evaluation uses the batch's.
        device: Device of parameters and buffers.
        dtype: Floating dtype of parameters and buffers.
        bias: Whether to learn the shift. ``False`` needs torch 2.15.
        convention: One of ``pytorch keras tf_fused tf_ema flax caffe from_scratch``, or a :class:`Convention`.
        backend: Implementation. ``fast`` uses torch's kernels. ``reference`` uses the formulas and the hand-derived
            backward pass of :mod:`bnlightning.nn.functional`.
        sync: Whether the batches of all ranks are normalised together in training, by :mod:`bnlightning.nn.sync` for
            both backends. Every rank must then run the layer; an empty batch is enough. Nothing changes on one rank.
        process_group: The ranks to take together; by default all.

    Raises:
        ValueError: If the convention or the backend is not known, or if the convention has no default for ``eps`` or
            ``momentum`` and none is given. In training, if a channel has fewer than two values: see
            :func:`bnlightning.nn.batch_of_one`.

    Warns:
        UserWarning: If the momentum is above 0.5, because this often is TensorFlow's decay by mistake. In evaluation,
            if the running variance starts from zero and no batch has updated it.

    Example:
        >>> layer = BatchNorm1d(30, momentum=0.5, eps=1e-3, convention="keras")
        >>> layer(torch.randn(10, 30)).shape
        torch.Size([10, 30])
    """


class BatchNorm2d(_ConventionBatchNorm, nn.BatchNorm2d):
    """Batch normalisation of ``(N, C, H, W)`` input. The arguments are those of :class:`BatchNorm1d`.

    Example:
        >>> BatchNorm2d(6)(torch.randn(10, 6, 5, 5)).shape
        torch.Size([10, 6, 5, 5])
    """


class BatchNorm3d(_ConventionBatchNorm, nn.BatchNorm3d):
    """Batch normalisation of ``(N, C, D, H, W)`` input. The arguments are those of :class:`BatchNorm1d`.

    Example:
        >>> BatchNorm3d(6)(torch.randn(10, 6, 5, 5, 5)).shape
        torch.Size([10, 6, 5, 5, 5])
    """


def _traced(layer: nn.Module, input: Any) -> Any:
    """The call of a layer as one node of a graph that ``torch.fx`` traces, as for torch's layers."""
    if not isinstance(input, Proxy):
        raise ValueError(f"input of {type(layer).__name__} is a {type(input).__name__}: give a tensor.")
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


_UNTRAINED = (
    "Evaluation with running statistics that no batch has updated: their variance is 0, so every value is divided by "
    "sqrt(eps). Train first, load trained statistics, or evaluate with bnlightning.nn.batch_statistics(model)."
)


def _channels_message(layer: _ConventionBatchNorm, input: Tensor) -> str:
    shape, features = tuple(input.shape), layer.num_features
    if layer.convention.per_activation:
        return (
            f"input has {shape[1]} features a sample, and num_features={features}: with a convention per activation "
            f"give num_features={shape[1]}, the product of all dimensions except the batch's."
        )
    return (
        f"input of shape {shape} has {shape[1]} channels, and num_features={features}: give input with {features} "
        f"channels, or build the layer with num_features={shape[1]}."
    )


def _momentum(value: Any, named: Convention, convention: str | Convention) -> float:
    momentum = _given("momentum", value, named.momentum, convention)
    if momentum > 1:
        raise ValueError(f"momentum={momentum!r} is not possible: give the weight of the new batch, from 0 to 1.")
    warn_of_momentum(momentum, stacklevel=4)
    return momentum


def warn_of_momentum(momentum: float, stacklevel: int) -> None:
    """Warn of a momentum that looks like TensorFlow's decay; ``stacklevel`` counts from this function."""
    if momentum > 0.5:
        warnings.warn(
            f"momentum={momentum!r} gives the newest batch most of the weight: torch's momentum is the weight of the "
            "new value, TensorFlow's and Keras's momentum is the weight of the old one. Did you mean "
            f"momentum={1 - momentum:.6g}?",
            stacklevel=stacklevel,
        )


def _given(name: str, value: Any, default: float | None, convention: str | Convention) -> float:
    value = default if value is None or value == "convention" else value
    if value is None:
        raise ValueError(
            f"{name}={value!r} is not possible: the convention {convention!r} has no default for it. Pass {name}=..."
        )
    check_number(name, value, at_least=0.0)
    number: float = value
    return number
