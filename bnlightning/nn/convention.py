"""The rules by which frameworks keep the running statistics of batch normalisation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """The rule by which a framework keeps its running statistics.

    Every framework normalises a training batch by its mean and its biased variance. Frameworks differ in the averages
    that they keep for evaluation.

    Args:
        momentum: Weight of the new batch in a running statistic, from 0 to 1. This is torch's direction: TensorFlow and
            Keras call ``1 - momentum`` momentum or decay. With ``None`` the layer must be given a momentum.
        eps: Number added to the variance. With ``None`` the layer must be given an eps.
        unbiased: Whether the running variance averages the unbiased variance of a batch. That is ``n / (n - 1)`` times
            the biased one, for n values per channel.
        initial_mean: Start value of the running mean.
        initial_var: Start value of the running variance.
        debias: Whether the start values are averaged out, as in Adam. An average that started from zero is divided by
            ``1 - (1 - momentum)**k`` after k batches. The running statistics are then weighted means of the batches
            alone.
        per_activation: Whether every position of an image is normalised by itself. Input of more than two dimensions is
            taken as ``(N, C·H·W)``, and ``num_features`` is C·H·W.

    Example:
        >>> mine = Convention(momentum=0.05, eps=1e-4, unbiased=False)
        >>> BatchNorm1d(30, convention=mine).momentum
        0.05
    """

    momentum: float | None
    eps: float | None
    unbiased: bool
    initial_mean: float = 0.0
    initial_var: float = 1.0
    debias: bool = False
    per_activation: bool = False


CONVENTIONS: dict[str, Convention] = {
    "pytorch": Convention(momentum=0.1, eps=1e-5, unbiased=True),
    "keras": Convention(momentum=0.01, eps=1e-3, unbiased=False),
    "tf_fused": Convention(momentum=0.01, eps=1e-3, unbiased=True),
    "tf_ema": Convention(momentum=None, eps=None, unbiased=False, initial_var=0.0),
    "flax": Convention(momentum=0.01, eps=1e-5, unbiased=False),
    "caffe": Convention(momentum=1e-3, eps=1e-5, unbiased=True, initial_var=0.0, debias=True),
    "from_scratch": Convention(momentum=0.1, eps=1e-6, unbiased=False, initial_var=0.0, per_activation=True),
}
"""The conventions that have a name.

- ``pytorch``: :class:`torch.nn.BatchNorm1d`, ``2d`` and ``3d``.
- ``keras``: Keras 3, and TensorFlow's layer on 2-D input.
- ``tf_fused``: TensorFlow's fused kernel, which its layer uses on 4-D input.
- ``tf_ema``: ``tf.nn.moments`` with ``tf.train.ExponentialMovingAverage``. The averages start from zero and stay biased
  towards it.
- ``flax``: Flax NNX.
- ``caffe``: Caffe's BatchNorm layer. It keeps sums and divides them by the sum of their weights.
- ``from_scratch``: the numpy class of Saito, "Deep Learning from Scratch" (``common/layers.py``).
"""


def convention_name(convention: Convention) -> str:
    """Return the name of a convention in quotes, or its repr if it has no name."""
    return next((repr(name) for name, known in CONVENTIONS.items() if known == convention), repr(convention))
