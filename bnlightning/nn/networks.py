"""Networks that take their normalisation and activation as arguments, and the draws of their first weights."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from bnlightning._check import check_choice, check_integer, check_number

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
    """Return the constructor of an activation.

    Args:
        activation: Name of the activation, a key of :data:`ACTIVATIONS`.

    Returns:
        A callable without arguments that builds the activation.

    Raises:
        ValueError: If the name is not known.

    Example:
        >>> get_act_layer("tanh")()
        Tanh()
    """
    check_choice("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]


class MLP(nn.Sequential):
    """A multilayer perceptron: hidden layers of a linear map, a normalisation and an activation, then a linear output.

    The modules are ``input_norm``, then ``linear1 norm1 act1`` and so on, then ``output output_norm``. The linear
    layers always have a bias, even before a normalisation.

    Args:
        features: Numbers of features: of the input, of each hidden layer and of the output. At least two entries.
        norm_layer: Callable that takes a number of features and returns the normalisation for them. The default
            normalises nothing.
        act_layer: Callable without arguments that returns an activation.
        normalize_input: Whether to normalise the input too.
        normalize_output: Whether to normalise the output too.

    Shape:
        Input ``(N, features[0])``, output ``(N, features[-1])``.

    Raises:
        ValueError: If ``features`` has fewer than two entries, or one below 1.

    Example:
        >>> net = MLP([1, 30, 30, 1], norm_layer=nn.BatchNorm1d, act_layer=nn.Tanh)
        >>> net(torch.randn(8, 1)).shape
        torch.Size([8, 1])
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
                f"features={list(features)!r} is not possible: give at least the number of inputs and of outputs."
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
    """A convolutional network: convolutions, each with a pooling that halves the image, then linear layers.

    The modules are ``conv1 norm1 act1 pool1`` and so on, then ``flatten``, then ``linear1 linear_norm1 linear_act1``
    and so on, then ``output``. Convolutions and linear layers always have a bias, even before a normalisation.

    Args:
        in_shape: Channels, height and width of an input image.
        channels: Number of output channels of each convolution. At least one entry.
        features: Number of features of each hidden linear layer. Empty for no hidden linear layer.
        num_outputs: Number of outputs, such as the number of classes.
        kernel_size: Height and width of the convolutions' kernels, an odd number. Padding keeps the size of the image.
        conv_norm_layer: Callable that takes a number of channels and returns the normalisation for images. The default
            normalises nothing.
        linear_norm_layer: Callable that takes a number of features and returns the normalisation for them. The default
            normalises nothing.
        act_layer: Callable without arguments that returns an activation.
        norm_after_act: Whether the normalisation comes after the activation: ``conv1 act1 norm1 pool1``.

    Shape:
        Input ``(N, *in_shape)``, output ``(N, num_outputs)``.

    Raises:
        ValueError: If a number is below 1, ``kernel_size`` is even, ``channels`` is empty, or the poolings leave
            nothing of the image.

    Example:
        >>> net = ConvNet((1, 28, 28), [8, 16], [64], 10, conv_norm_layer=nn.BatchNorm2d)
        >>> net(torch.randn(8, 1, 28, 28)).shape
        torch.Size([8, 10])
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
        for number in features:
            check_integer("features", number, at_least=1)
        check_integer("num_outputs", num_outputs, at_least=1)
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
    """Check the arguments and return height and width of the image after the last pooling."""
    if len(in_shape) != 3:
        raise ValueError(f"in_shape={in_shape!r} is not possible: give channels, height and width.")
    for number in in_shape:
        check_integer("in_shape", number, at_least=1)
    if not channels:
        raise ValueError(f"channels={channels!r} is not possible: give the channels of at least one convolution.")
    for number in channels:
        check_integer("channels", number, at_least=1)
    check_integer("kernel_size", kernel_size, at_least=1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is not possible: give an odd number.")
    height, width = (size >> len(channels) for size in in_shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"channels={list(channels)!r} is not possible: {len(channels)} poolings leave nothing of an image of "
            f"{in_shape[1]}x{in_shape[2]}. Give fewer entries, one for each pooling."
        )
    return height, width


def init_normal_(module: nn.Module, std: float, bias: float) -> None:
    """Draw the weights of all linear and 2-D convolutional layers from N(0, std²), in place.

    Args:
        module: The network.
        std: Standard deviation of the weights.
        bias: Value of every bias.

    Raises:
        ValueError: If ``std`` is negative.

    Example:
        >>> net = MLP([1, 30, 1])
        >>> init_normal_(net, std=0.1, bias=0.0)
        >>> net.linear1.bias.abs().max().item()
        0.0
    """
    check_number("std", std, at_least=0.0)
    _init(module, lambda weight: nn.init.normal_(weight, std=std), bias)


def init_variance_scaling_(module: nn.Module, scale: float, bias: float = 0.0) -> None:
    """Draw the weights of all linear and 2-D convolutional layers from a truncated normal distribution, in place.

    The variance of the weights is ``scale / fan_in``. The distribution is cut at two standard deviations of the normal
    distribution that it is cut from, as in TensorFlow's and Keras's ``VarianceScaling``.

    Args:
        module: The network.
        scale: Variance of the weights times their number of inputs. 1 is LeCun's, 2 is He's (He et al., 2015).
        bias: Value of every bias.

    Raises:
        ValueError: If ``scale`` is not above 0.

    Example:
        >>> net = MLP([784, 300, 10])
        >>> init_variance_scaling_(net, scale=2.0)
        >>> round(net.linear1.weight.var().item() * 784, 1)
        2.0
    """
    check_number("scale", scale, above=0.0)

    def draw(weight: Tensor) -> None:
        # The cut makes the standard deviation smaller by this factor.
        std = math.sqrt(scale / weight[0].numel()) / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    _init(module, draw, bias)


def _init(module: nn.Module, draw: Callable[[Tensor], object], bias: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)
