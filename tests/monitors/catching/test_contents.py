import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.contents import UnreadableError, tensors_in, values_of


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


@dataclass
class Unset:
    logits: torch.Tensor
    cache: torch.Tensor = field(init=False)


@dataclass(frozen=True, slots=True)
class Slots:
    logits: torch.Tensor
    cache: torch.Tensor | None


class Attrs:
    """As the decorator of attrs makes a class."""

    __attrs_attrs__ = (SimpleNamespace(name="logits"), SimpleNamespace(name="unset"))

    def __init__(self, logits):
        self.logits = logits


class Failing(UserDict):
    def items(self):
        raise RuntimeError("no items")


Pair = namedtuple("Pair", ["first", "second"])
X = torch.ones(2)


@pytest.mark.parametrize(
    ("output", "paths"),
    [
        (X, [""]),
        ((X, [X, "text"]), [":0", ":1.0"]),
        ({"a": X, "b": None}, [":a"]),
        (Output(X, (X, X)), [":logits", ":hidden.0", ":hidden.1"]),
        (Pair(X, X.long()), [":0"]),
        ([[[[[X]]]]], []),
        (X.to_sparse(), [""]),
        (X > 0, []),
        (Unset(X), [":logits"]),
        (Slots(X, None), [":logits"]),
        (Attrs(X), [":logits"]),
        (OrderedDict(loss=X, logits=(X,)), [":loss", ":logits.0"]),
        (Failing(), []),
        (Output, []),
        ((x for x in [X]), []),
        (nn.utils.rnn.pack_sequence([X, X]), [":0"]),
        (torch.complex(X, X), [""]),
        ("text", []),
    ],
    ids=[
        "tensor",
        "nested",
        "mapping",
        "dataclass",
        "named tuple",
        "too deep",
        "sparse",
        "bool",
        "unset field",
        "slots",
        "attrs",
        "ordered",
        "failing",
        "class",
        "generator",
        "packed",
        "complex",
        "text",
    ],
)
def test_tensors_in_what_a_module_returned(output, paths):
    assert [path for path, _ in tensors_in(output)] == paths


def masked():
    from torch.masked import masked_tensor

    return masked_tensor(torch.ones(2), torch.tensor([True, False]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (X.to_sparse, "sparse"),
        (torch.eye(2).to_sparse_csr, "sparse"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (masked, "masked"),
        (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(2, 4)]), "differ in more than"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "quantised"),
    ],
    ids=["sparse", "csr", "meta", "masked", "nested", "quantised"],
)
def test_what_cannot_be_counted_says_why(make, reason):
    with pytest.raises(UnreadableError, match=reason):
        values_of(make())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_give_the_values_of_their_parts(layout):
    parts = [torch.randn(length, 3) for length in (2, 0, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(parts, layout=layout)
    values = values_of(nested)
    assert values.lengths == (2, 0, 5) and torch.equal(values.x, torch.cat(parts))


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
def test_complex_numbers_are_two_values(shape):
    x = torch.randn(shape, dtype=torch.complex64)
    values = values_of(x.conj())
    assert values.x.shape[-1] == 2 and values.x.shape[:-1] == values.shape and values.x.numel() == 2 * x.numel()
    assert torch.equal(values.x[..., 1].flatten(), -x.imag.flatten())
