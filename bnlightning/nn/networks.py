"""Networks whose normalisation and activation are the caller's."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

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

    Its modules are ``input_norm``, then ``linear1 norm1 act1`` and so on, then ``output``; the linear layers keep their
    bias, also in front of a normalisation.

    Args:
        features: The number of features of the input, of each hidden layer and of the output, two entries or more.
        norm_layer: Called with a number of features, returns the normalisation for them. The default normalises
            nothing.
        act_layer: Called without arguments, returns an activation.
        normalize_input: Whether to normalise the input, too.

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
        super().__init__(layers)


def init_normal_(module: nn.Module, std: float, bias: float) -> None:
    """Draw the weight of every linear layer in ``module`` from N(0, std²) and set every bias to ``bias``, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)
