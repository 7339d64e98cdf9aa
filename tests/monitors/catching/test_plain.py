import pytest
import torch
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from bnlightning.monitors.catching.plain import plain

# Torch's own, also of what derivatives are made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


class Named(torch.Tensor):
    """A type of the user's own that changes nothing."""


def test_a_tensor_of_torch_is_itself():
    x = torch.ones(2, requires_grad=True)
    assert plain(x) is x


def test_a_type_of_the_user_is_seen_as_a_tensor():
    x = torch.ones(2).as_subclass(Named)
    assert type(plain(x)) is torch.Tensor and plain(x).data_ptr() == x.data_ptr()


def test_a_type_that_answers_every_operation_itself_is_left_aside():
    assert plain(TwoTensor(torch.ones(2), torch.ones(2))) is None
    with torch._subclasses.FakeTensorMode():
        assert plain(torch.ones(2)) is None


def test_a_value_with_a_derivative_is_a_value():
    x = torch.ones(2)
    with forward_ad.dual_level():
        value = plain(forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(value).tangent is None and torch.equal(value, x)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_stay_as_they_are(layout):
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=layout)
    assert plain(x) is x
