"""Networks whose normalisation and activation are the caller's."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from bnlightning._check import check_choice, check_integer

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def get_act_layer(activation: str) -> Callable[[], nn.Module]:
    """The constructor of an activation by its name, a key of :data:`ACTIVATIONS`; otherwise ``ValueError``."""
    check_choice("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]


class MLP(nn.Sequential):
    """A multilayer perceptron: in every hidden layer a linear map, a normalisation, an activation; a linear output.

    Its modules are ``input_norm``, then ``linear1 norm1 act1`` and so on, then ``output output_norm``; the linear
    layers keep their bias, also in front of a normalisation.

    Args:
        features: The number of features of the input, of each hidden layer and of the output, two entries or more.
        norm_layer: Called with a number of features, returns the normalisation for them. The default normalises
            nothing.
        act_layer: Called without arguments, returns an activation.
        normalize_input: Whether to normalise the input, too.
        normalize_output: Whether to normalise the output, too.

    Shape:
        ``(N, features[0])`` to ``(N, features[-1])``.

    Raises:
        ValueError: For fewer than two entries in ``features``, or one below 1.

    Example:
        >>> net = MLP([1, 30, 30, 1], norm_layer=nn.BatchNorm1d, act_layer=nn.Tanh)
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        norm_layer: Callable[[int], nn.Module] = nn.Identity,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        normalize_input: bool = False,
        normalize_output: bool = False,
    ) -> None:
        if len(features) < 2:
            raise ValueError(
                f"features={list(features)!r} is not possible: give the input's and the output's at least."
            )
        for number in features:
            check_integer("features", number, at_least=1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["input_norm"] = norm_layer(features[0]) if normalize_input else nn.Identity()
        for index, (fan_in, fan_out) in enumerate(pairwise(features[:-1]), start=1):
            layers[f"linear{index}"] = nn.Linear(fan_in, fan_out)
            layers[f"norm{index}"] = norm_layer(fan_out)
            layers[f"act{index}"] = act_layer()
        layers["output"] = nn.Linear(features[-2], features[-1])
        layers["output_norm"] = norm_layer(features[-1]) if normalize_output else nn.Identity()
        super().__init__(layers)


class ConvNet(nn.Sequential):
    """A convolutional network: convolutions, each followed by a pooling that halves the image, then linear layers.

    Its modules are ``conv1 norm1 act1 pool1`` and so on, then ``flatten``, then ``linear1 linear_norm1 linear_act1``
    and so on, then ``output``. Convolutions and linear layers keep their bias, also in front of a normalisation.

    Args:
        in_shape: Channels, height and width of the input.
        channels: Of each convolution's output, one entry or more.
        features: Of each hidden linear layer, none if empty.
        num_outputs: Of the last linear layer, such as the number of classes.
        kernel_size: Of the convolutions, odd; they are padded, so that the image keeps its size.
        conv_norm_layer: Called with a number of channels, returns the normalisation for images of them. The default
            normalises nothing.
        linear_norm_layer: Called with a number of features, returns the normalisation for them.
        act_layer: Called without arguments, returns an activation.
        norm_after_act: Whether a normalisation stands behind the activation of its layer and not in front of it; then
            ``conv1 act1 norm1 pool1``.

    Shape:
        ``(N, *in_shape)`` to ``(N, num_outputs)``.

    Raises:
        ValueError: For a number below 1, an even ``kernel_size``, no channels, or an image that the poolings leave
            nothing of.

    Example:
        >>> net = ConvNet((1, 28, 28), [8, 16], [64], 10, conv_norm_layer=nn.BatchNorm2d)
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int],
        features: Sequence[int],
        num_outputs: int,
        *,
        kernel_size: int = 3,
        conv_norm_layer: Callable[[int], nn.Module] = nn.Identity,
        linear_norm_layer: Callable[[int], nn.Module] = nn.Identity,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        norm_after_act: bool = False,
    ) -> None:
        height, width = _checked_image(in_shape, channels, kernel_size)
        for number in (*features, num_outputs):
            check_integer("features", number, at_least=1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (fan_in, fan_out) in enumerate(pairwise([in_shape[0], *channels]), start=1):
            layers[f"conv{index}"] = nn.Conv2d(fan_in, fan_out, kernel_size, padding=kernel_size // 2)
            pair = [(f"norm{index}", conv_norm_layer(fan_out)), (f"act{index}", act_layer())]
            layers |= reversed(pair) if norm_after_act else pair
            layers[f"pool{index}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        sizes = [channels[-1] * height * width, *features]
        for index, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            layers[f"linear{index}"] = nn.Linear(fan_in, fan_out)
            pair = [(f"linear_norm{index}", linear_norm_layer(fan_out)), (f"linear_act{index}", act_layer())]
            layers |= reversed(pair) if norm_after_act else pair
        layers["output"] = nn.Linear(sizes[-1], num_outputs)
        super().__init__(layers)


def _checked_image(in_shape: Sequence[int], channels: Sequence[int], kernel_size: int) -> tuple[int, int]:
    """Height and width of what the last pooling leaves."""
    if len(in_shape) != 3:
        raise ValueError(f"in_shape={in_shape!r} is not possible: give channels, height and width.")
    for number in in_shape:
        check_integer("in_shape", number, at_least=1)
    if not channels:
        raise ValueError(f"channels={channels!r} is not possible: give those of one convolution at least.")
    for number in channels:
        check_integer("channels", number, at_least=1)
    check_integer("kernel_size", kernel_size, at_least=1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is not possible: give an odd number.")
    height, width = (size >> len(channels) for size in in_shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"channels={list(channels)!r} is not possible: {len(channels)} poolings leave nothing of an image of "
            f"{in_shape[1]}x{in_shape[2]}. Give fewer."
        )
    return height, width


def init_normal_(module: nn.Module, std: float, bias: float) -> None:
    """Draw the weight of every linear and convolutional layer from N(0, std²), set every bias, in place."""
    _init(module, lambda weight: nn.init.normal_(weight, std=std), bias)


def init_variance_scaling_(module: nn.Module, scale: float, bias: float = 0.0) -> None:
    """Draw the weight of every linear and convolutional layer from a truncated normal distribution, set every bias.

    Its variance is ``scale / fan_in``, and it is cut at two standard deviations of the normal distribution before the
    cut, as TensorFlow's and Keras's ``VarianceScaling`` do it. A scale of 1 is LeCun's, 2 is He's (He et al., 2015).
    """

    def draw(weight: Tensor) -> None:
        # What the cut takes of the standard deviation.
        std = math.sqrt(scale / weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    _init(module, draw, bias)


def _init(module: nn.Module, draw: Callable[[Tensor], object], bias: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)
