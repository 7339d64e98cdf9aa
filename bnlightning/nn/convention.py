"""How frameworks keep the running statistics of batch normalisation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """How a framework keeps its running statistics.

    Every framework normalises a training batch by its mean and its biased variance. They differ in what they average
    for evaluation:

    Args:
        momentum: Weight of the new batch in a running statistic, torch's direction: what TensorFlow and Keras call
            momentum or decay is ``1 - momentum``. ``None``: the framework has no default, the layer must be given one.
        eps: Added to the variance. ``None``: no default either.
        unbiased: Whether the running variance averages ``n / (n - 1)`` times the batch's (biased) variance.
        initial_mean: What the running mean starts from.
        initial_var: What the running variance starts from.
        debias: Whether the initial values are averaged out, as in Adam: after k batches an average that started from
            zero is divided by ``1 - (1 - momentum)**k``. The running statistics then are weighted means of what the
            batches had alone.
        per_activation: Whether input of more than two dimensions is taken as ``(N, C·H·W)``: every position has
            statistics, a scale and a shift of its own, and ``num_features`` is C·H·W.
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
"""The named conventions.

``pytorch``: :class:`torch.nn.BatchNorm1d` and its siblings. ``keras``: Keras 3, and TensorFlow's layer on 2-D input.
``tf_fused``: TensorFlow's fused kernel, its layer on 4-D input. ``tf_ema``: ``tf.nn.moments`` with
``tf.train.ExponentialMovingAverage``, whose averages start from zero and stay biased towards it. ``flax``: Flax NNX.
``caffe``: Caffe's BatchNorm layer, which keeps sums and divides them by the sum of their weights. ``from_scratch``: the
numpy class of Saito, "Deep Learning from Scratch" (``common/layers.py``).
"""


def convention_name(convention: Convention) -> str:
    """The name of a convention, in quotes, or what it is made of."""
    return next((repr(name) for name, known in CONVENTIONS.items() if known == convention), repr(convention))
