import copy
import inspect

import pytest
import torch
from torch import nn

from bnlightning import BatchNorm1d, BatchNorm2d, BatchNorm3d, swap_norm

PAIRS = [
    (BatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (BatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 2)),
    (BatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 2)),
]
BACKENDS = ["fast", "reference"]


def batches(shape, count=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * (k + 1) + k for k in range(count)]


@pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.filterwarnings("ignore:momentum=1.0 gives the newest batch")
def test_by_default_the_same_numbers_as_torch(ours, torchs, shape, backend, momentum, affine):
    mine, theirs = (
        ours(4, momentum=momentum, affine=affine, backend=backend),
        torchs(4, momentum=momentum, affine=affine),
    )
    for x in batches(shape):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, want = mine(a), theirs(b)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        out.sin().sum().backward()
        want.sin().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert isinstance(mine, torchs)
    mine.eval(), theirs.eval()
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm1d).parameters, reason="needs torch 2.15")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bias(backend):
    mine, theirs = BatchNorm1d(4, bias=False, backend=backend), nn.BatchNorm1d(4, bias=False)
    x = batches((6, 4))[1]
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert mine.state_dict().keys() == theirs.state_dict().keys() and mine.bias is None
    mine(x).square().sum().backward()
    assert mine.weight.grad is not None


def test_state_dicts_load_strictly_both_ways():
    mine, theirs = BatchNorm1d(4, convention="keras"), nn.BatchNorm1d(4)
    theirs(torch.randn(8, 4))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_without_data_and_under_vmap():
    layer = BatchNorm1d(3, convention="caffe", device="meta")
    assert layer(torch.randn(4, 3, device="meta")).shape == layer.eval()(torch.randn(4, 3, device="meta")).shape
    x = torch.randn(2, 5, 3)
    untracked = BatchNorm1d(3, track_running_stats=False)
    torch.testing.assert_close(torch.func.vmap(untracked)(x), torch.stack([untracked(part) for part in x]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_way_of_freezing(backend):
    # As Lightning's BaseFinetuning.freeze does it.
    layer, theirs, x = BatchNorm1d(3, backend=backend), nn.BatchNorm1d(3), torch.randn(6, 3)
    for each in (layer, theirs):
        each(x)
        each.track_running_stats = False
        before = copy.deepcopy(each.state_dict())
        each(x + 5)
        torch.testing.assert_close(each.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(layer(x), theirs(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_modules(backend):
    layer, x = BatchNorm1d(3, convention="keras", backend=backend, dtype=torch.bfloat16), torch.randn(64, 3)
    skip = copy.deepcopy(layer)
    skip.update_rule = lambda layer, mean, var, n: layer.update_running_stats(mean, var, n)
    for each in (layer, skip):
        output = each(x.bfloat16())
        assert output.dtype == each.running_mean.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), (x - x.mean(0)) / x.std(0), rtol=0.05, atol=0.05)
        assert each.eval()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "kears"}, r"convention='kears' is not known: choose one of pytorch, keras"),
        ({"backend": "slow"}, r"backend='slow' is not known: choose one of fast, reference"),
        ({"convention": "tf_ema"}, r"eps=None is not possible: the convention 'tf_ema' has no default"),
        ({"eps": -1.0}, r"eps=-1.0 is not possible: give a number of at least 0"),
        ({"convention": None}, r"convention=None is not known: choose one of pytorch"),
        ({"momentum": 5}, r"momentum=5 is not possible: give the weight of the new batch, from 0 to 1"),
        ({"momentum": "high"}, r"momentum='high' is not possible"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNorm1d(2, **options)


def test_one_value_per_channel_in_training_only():
    layer = BatchNorm1d(3)
    with pytest.raises(ValueError, match="at least 2"):
        layer(torch.ones(1, 3))
    assert layer.num_batches_tracked == 0
    layer.eval()(torch.ones(1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_output_as_in_torch(backend):
    layer, theirs = BatchNorm1d(3, backend=backend), nn.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.zeros(0, 3)).shape == theirs(torch.zeros(0, 3)).shape == (0, 3)
    torch.testing.assert_close(layer.state_dict(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_number_of_channels_is_refused(backend):
    with pytest.raises(ValueError, match=r"input of shape \(8, 1\) has 1 channels, and num_features=4: give"):
        BatchNorm1d(4, backend=backend)(torch.randn(8, 1))


@pytest.fixture(autouse=True)
def _compile_afresh():
    # torch.compile stops after eight variants of one function, which other tests may have used up.
    torch.compiler.reset()


OPTIONS = [
    {"convention": "pytorch"},
    {"convention": "keras"},
    {"convention": "caffe"},
    {"convention": "flax", "momentum": None},
    {"convention": "keras", "backend": "reference"},
    {"convention": "from_scratch", "affine": False},
    {"track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_keeps_one_graph(options, training):
    layer = BatchNorm1d(3, **options)
    layer(torch.randn(8, 3))
    layer.train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out, want = compiled(a), twin(b)
    torch.testing.assert_close(out, want)
    out.sin().sum().backward()
    want.sin().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_torch_compile_with_its_default_backend(options):
    layer = BatchNorm2d(3, **options)
    twin, x = copy.deepcopy(layer), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("options", [option for option in OPTIONS if "backend" not in option], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_torch_export(options, training):
    layer = BatchNorm1d(3, **options)
    layer(torch.randn(8, 3))
    layer.train(training)
    twin, x = copy.deepcopy(layer), torch.randn(6, 3)
    shapes = ({0: torch.export.Dim("n", min=2)},)
    module = torch.export.export(layer, (torch.randn(4, 3),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(module(x), twin(x))
    # An older torch leaves out the buffer that evaluation does not read.
    exported = dict(module.named_buffers())
    torch.testing.assert_close(exported, {key: value for key, value in twin.named_buffers() if key in exported})
    assert training <= ("num_batches_tracked" in exported or not layer.track_running_stats)


@pytest.mark.parametrize("options", [option for option in OPTIONS if "backend" not in option], ids=str)
def test_can_be_differentiated_twice(options):
    layer = BatchNorm1d(3, dtype=torch.float64, **options)
    layer.running_var is None or layer.running_var.fill_(0.7)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), inputs)


@pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS)
def test_fast_is_torchs_own_call_bit_for_bit(ours, torchs, shape):
    mine, theirs = ours(4), torchs(4)
    for x in batches(shape):
        assert torch.equal(mine(x), theirs(x))
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", ["pytorch", "keras", "caffe"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_any_memory_layout(backend, convention, layout):
    x = batches((4, 6, 5, 8))[1].double()
    data = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": lambda: torch.stack([x, -x], dim=-1)[..., 0],
        "expanded": lambda: x[:1].expand(4, 6, 5, 8),
    }[layout]()
    mine, plain = (BatchNorm2d(6, convention=convention, backend=backend, dtype=torch.float64) for _ in range(2))
    a, b = data.detach().requires_grad_(), data.clone(memory_format=torch.contiguous_format).requires_grad_()
    out, want = mine(a), plain(b)
    (out * out.sin()).sum().backward()
    (want * want.sin()).sum().backward()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(mine.state_dict(), plain.state_dict())
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", ["pytorch", "keras", "caffe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_float32_statistics(backend, convention, dtype):
    torch.manual_seed(0)
    linear, layer = nn.Linear(5, 4), BatchNorm1d(4, convention=convention, backend=backend)
    x = torch.randn(64, 5)
    with torch.autocast("cpu", dtype):
        hidden = linear(x)
        output = layer(hidden)
        output.float().square().sum().backward()
    assert hidden.dtype == dtype and layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32
    exact = BatchNorm1d(4, convention=convention, dtype=torch.float64)
    want = exact(hidden.detach().double())
    torch.testing.assert_close(output.double(), want, rtol=0, atol=0.05)
    # Far closer than half precision could hold them.
    torch.testing.assert_close(layer.state_dict(), exact.state_dict(), rtol=2e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("momentum", [0.51, 0.9, 1.0, 0.99])
def test_a_momentum_that_looks_like_tensorflows_warns(momentum):
    with pytest.warns(UserWarning, match=rf"momentum={momentum}.*Did you mean momentum={1 - momentum:.6g}\?") as record:
        BatchNorm1d(2, momentum=momentum)
    # It points at the user's own line.
    assert record[0].filename == __file__
    BatchNorm1d(2, momentum=0.5)


def test_repr_names_the_convention():
    assert "convention='keras', backend='fast'" in repr(BatchNorm1d(2, convention="keras"))


def block(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_fx_traces_has_the_layer_as_one_node(backend):
    module = block(BatchNorm2d(4, convention="keras", backend=backend))
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    for mode in (True, False):
        x = torch.randn(2, 3, 6, 6)
        assert torch.equal(traced.train(mode)(x), module.train(mode)(x))
    assert torch.equal(traced.get_submodule("1").running_var, module[1].running_var)


def test_fusion_with_a_convolution_in_evaluation():
    module, x = block(BatchNorm2d(4)), torch.randn(2, 3, 6, 6)
    module(x)
    module.eval()
    torch.testing.assert_close(torch.nn.utils.fuse_conv_bn_eval(*module[:2])(x), module[:2](x))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_says_what_to_do():
    module, x = block(BatchNorm2d(4, convention="keras")), torch.randn(2, 3, 6, 6)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Call swap_norm\(model, 'torch'\) first, or take torch\.jit\.trace"):
            torch.jit.script(module)
    traced = torch.jit.trace(module.eval(), x)
    torch.testing.assert_close(traced(x), module(x))
    swap_norm(module, "torch")
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match="input of BatchNorm1d is a list: give a tensor"):
        BatchNorm1d(3)([1.0])


def test_the_layer_can_be_parametrised():
    layer = BatchNorm1d(3)
    assert not hasattr(layer, "parametrizations")
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    assert nn.utils.parametrize.is_parametrized(layer) and "weight" in layer.parametrizations
    layer(torch.randn(5, 3)).sum().backward()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert not nn.utils.parametrize.is_parametrized(layer)
