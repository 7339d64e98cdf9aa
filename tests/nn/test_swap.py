import copy
import functools
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from bnlightning import BatchNorm1d, BatchNorm2d, BatchNorm3d, swap_norm
from bnlightning.nn import CONVENTIONS, Convention, frozen_statistics

IN_PLACE = ["none", "custom", "torch", "sync"]
DIMENSIONS = [
    (nn.BatchNorm1d, BatchNorm1d, (5, 4)),
    (nn.BatchNorm2d, BatchNorm2d, (5, 4, 2, 2)),
    (nn.BatchNorm3d, BatchNorm3d, (5, 4, 2, 2, 2)),
]
TORCH_KNOWS_BIAS = "bias" in inspect.signature(nn.BatchNorm1d.__init__).parameters


def network(norm=nn.BatchNorm1d, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm(4, **options), nn.Tanh(), nn.Linear(4, 4), norm(4, **options))


def some_batch(n=6):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def snapshot(module):
    """What of a module's state must not change, by identity and by value."""
    objects = {name: (id(layer), type(layer)) for name, layer in module.named_modules(remove_duplicate=False)}
    tensors = {name: id(value) for name, value in module.state_dict(keep_vars=True).items()}
    values = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {
        name: {key: value for key, value in vars(layer).items() if not key.startswith("_")}
        for name, layer in module.named_modules()
    }
    return objects, tensors, attributes, values


def assert_same(before, after):
    assert before[:3] == after[:3]
    torch.testing.assert_close(before[3], after[3], rtol=0, atol=0, equal_nan=True)


class Float(nn.Module):
    """What a callable may build."""

    def __init__(self, num_features, start=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_features,), start))
        self.other = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))

    def forward(self, x):
        return x * self.weight + self.other


@pytest.mark.parametrize(("torchs", "ours", "shape"), DIMENSIONS)
@pytest.mark.parametrize("to", ["custom", "sync"])
def test_to_ours_of_the_same_dimension(torchs, ours, shape, to):
    layer = nn.Sequential(torchs(4, eps=0.1, momentum=0.3))
    before = snapshot(layer)
    report = swap_norm(layer, to)
    assert type(layer[0]) is ours
    assert layer[0].sync is (to == "sync")
    # As a layer that was built so.
    assert vars(layer[0]).keys() == vars(ours(4)).keys()
    assert (layer[0].eps, layer[0].momentum, layer[0].convention) == (0.1, 0.3, CONVENTIONS["pytorch"])
    assert before[1] == snapshot(layer)[1]
    assert layer(torch.randn(shape)).shape == shape
    assert [(each.paths, each.before, each.after) for each in report.swapped] == [
        (("0",), f"torch.nn.{torchs.__name__}", f"bnlightning.{ours.__name__}")
    ]


@pytest.mark.parametrize(("torchs", "ours", "shape"), DIMENSIONS)
def test_to_torch_leaves_nothing_of_ours(torchs, ours, shape):
    layer = nn.Sequential(ours(4, convention="keras"))
    report = swap_norm(layer, "torch", momentum=0.2)
    assert type(layer[0]) is torchs
    assert vars(layer[0]).keys() == vars(torchs(4)).keys()
    assert (layer[0].eps, layer[0].momentum) == (1e-3, 0.2)
    assert report.swapped[0].note == "momentum=0.2; convention 'keras' becomes torch's: unbiased False -> True"
    assert swap_norm(nn.Sequential(ours(4)), "torch").swapped[0].note == ""


def test_to_torch_notes_what_is_lost():
    layer = BatchNorm1d(4, sync=True)
    frozen_statistics(layer)
    assert swap_norm(layer, "torch").swapped[0].note == "sync=True is lost; frozen=True is lost"


def test_none_is_the_identity_without_parameters():
    model = network()
    before, x = snapshot(model), some_batch()
    report = swap_norm(model, "none")
    assert type(model[1]) is nn.Identity
    assert set(model.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert len(list(model.parameters())) == 4
    torch.testing.assert_close(model(x), model[3](model[0](x).tanh()), rtol=0, atol=0)
    report.revert()
    assert_same(before, snapshot(model))


def test_options_of_ours():
    model = network()
    swap_norm(model, "custom", convention="keras", backend="reference", eps=0.5)
    assert (model[1].convention, model[1].backend, model[1].eps, model[1].momentum) == (
        CONVENTIONS["keras"],
        "reference",
        0.5,
        0.1,
    )
    report = swap_norm(model, "custom", momentum=0.25)
    assert (model[1].convention, model[1].backend, model[1].eps, model[1].momentum) == (
        CONVENTIONS["keras"],
        "reference",
        0.5,
        0.25,
    )
    assert report.swapped[0].note == "momentum=0.25"
    swap_norm(model, "custom", convention="flax", eps=None, momentum="convention")
    assert (model[1].eps, model[1].momentum) == (1e-5, 0.01)


def test_ours_keeps_its_convention_and_settings_when_synchronised_and_back():
    model = network(BatchNorm1d, convention="keras", backend="reference")
    frozen_statistics(model)
    attributes = snapshot(model)[2]
    swap_norm(model, "sync")
    assert (model[1].sync, model[1].frozen, model[1].convention) == (True, True, CONVENTIONS["keras"])
    assert len(swap_norm(model, "sync").unchanged) == 2
    swap_norm(model, "custom")
    assert snapshot(model)[2] == attributes


def test_notes_name_the_constants_that_the_convention_would_have():
    assert swap_norm(network(), "custom", convention="keras", momentum=0.5).swapped[0].note == (
        "convention='keras'; momentum=0.5; eps=1e-05 kept, 'keras' has eps=0.001"
    )
    assert swap_norm(network(), "custom").swapped[0].note == ""


@pytest.mark.parametrize("to", IN_PLACE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        # More of it than ours would let pass without a warning.
        {"momentum": 0.9},
        {"device": "meta"},
        {"dtype": torch.float64},
        pytest.param(
            {"bias": False}, marks=pytest.mark.skipif(not TORCH_KNOWS_BIAS, reason="torch does not know bias=")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("origin", [nn.BatchNorm1d, BatchNorm1d])
def test_every_kind_of_layer_and_back(origin, options, to):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network(origin, **options).to(options.get("dtype"))
    model[1].requires_grad_(False)
    model[4].eval()
    before = snapshot(model)
    flags = [layer.requires_grad for layer in model.parameters()]
    report = swap_norm(model, to)
    if to != "none":
        # The very tensors, or none where there were none.
        assert before[1] == snapshot(model)[1]
        assert [layer.requires_grad for layer in model.parameters()] == flags
    assert [layer.training for layer in model] == [True, True, True, True, False]
    if options.get("device") != "meta":
        assert model(some_batch().to(options.get("dtype"))).shape == (6, 4)
    again = swap_norm(model, to)
    assert not again.swapped
    if to != "none":
        assert again.unchanged == ["1", "4"]
    report.revert()
    for layer, name in ((model[1], "1"), (model[4], "4")):
        assert (id(layer), type(layer)) == before[0][name]
    assert snapshot(model)[1] == before[1]
    assert snapshot(model)[2] == before[2]


def test_revert_keeps_what_training_did():
    model = network()
    report = swap_norm(model, "custom", convention="tf_ema")
    model(some_batch()).sum().backward()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    report.revert()
    torch.testing.assert_close(model.state_dict(), trained, rtol=0, atol=0)
    assert type(model[1]) is nn.BatchNorm1d
    report.revert()


def test_untouched_statistics_start_where_the_convention_starts():
    model = network()
    report = swap_norm(model, "custom", convention="tf_ema")
    assert model[1].running_var.tolist() == [0.0] * 4
    kept = model[1].running_var
    report.revert()
    assert model[1].running_var is kept
    assert model[1].running_var.tolist() == [1.0] * 4
    report = swap_norm(model, "custom", convention="tf_ema")
    swap_norm(model, "torch")
    assert model[1].running_var.tolist() == [1.0] * 4


@pytest.mark.parametrize("touch", ["running_mean", "running_var", "num_batches_tracked"])
def test_touched_statistics_are_not_reset(touch):
    model = network()
    with torch.no_grad():
        getattr(model[1], touch).view(-1)[0] = 3
    kept = {name: value.clone() for name, value in model[1].state_dict().items()}
    swap_norm(model, "custom", convention="tf_ema")
    torch.testing.assert_close(dict(model[1].state_dict()), kept, rtol=0, atol=0)
    assert model[4].running_var.tolist() == [0.0] * 4


def test_revert_out_of_order_changes_nothing():
    model = network()
    first = swap_norm(model, "custom")
    second = swap_norm(model, "none")
    with pytest.raises(RuntimeError, match=r"1 has been changed after this swap to custom: revert later swaps first\."):
        first.revert()
    assert type(model[1]) is nn.Identity
    second.revert()
    first.revert()
    assert type(model[1]) is nn.BatchNorm1d


class Aliases(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.pair = nn.Sequential(self.norm, nn.ReLU(), self.norm)
        self.inner = nn.ModuleDict({"norm": self.norm, "other": nn.BatchNorm1d(3)})
        self.listed = [self.norm]

    def forward(self, x):
        return self.inner["other"](self.pair(self.norm(x)))


NAMES = ("norm", "pair.0", "pair.2", "inner.norm")


@pytest.mark.parametrize("to", [*IN_PLACE[:2], "sync", Float])
def test_every_name_of_a_layer_holds_the_same_object(to):
    model = Aliases()
    before, order = snapshot(model), [name for name, _ in model.named_modules(remove_duplicate=False)]
    report = swap_norm(model, to)
    assert [each.paths for each in report.swapped] == [NAMES, ("inner.other",)]
    assert len({id(model.get_submodule(name)) for name in NAMES}) == 1
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == order
    if to is Float:
        assert isinstance(model.norm, Float)
    else:
        assert model.listed[0] is model.norm
    model(torch.randn(4, 3))
    report.revert()
    assert before[0] == snapshot(model)[0]
    assert before[1] == snapshot(model)[1]


@pytest.mark.parametrize("to", [*IN_PLACE[:2], "sync", Float])
def test_hooks_work_and_their_handles_too(to):
    model, calls = network(), []

    def note(name):
        return lambda *args, **kwargs: calls.append(name)

    layer = model[1]
    handles = [
        layer.register_forward_pre_hook(note("pre"), with_kwargs=True),
        layer.register_forward_hook(note("forward"), always_call=True),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state pre")),
        layer.register_load_state_dict_pre_hook(lambda module, *args: calls.append(module)),
        layer.register_load_state_dict_post_hook(note("loaded")),
    ]
    report = swap_norm(model, to)
    assert (model[1] is layer) == (to is not Float)

    def everything():
        calls.clear()
        model(some_batch()).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(calls)

    expected = lambda: ["pre", "forward", "backward pre", "backward", "state pre", model[1], "loaded"]  # noqa: E731
    assert everything() == expected()
    report.revert()
    assert model[1] is layer
    assert everything() == expected()
    report = swap_norm(model, to)
    handles.pop(1).remove()
    assert "forward" not in everything()
    for handle in handles:
        handle.remove()
    assert everything() == []
    # A hook that came later stays after the swap is undone.
    model[1].register_forward_hook(note("later"))
    report.revert()
    assert everything() == ["later"]


def test_a_replacement_keeps_hooks_of_its_own():
    calls = []

    def build(num_features):
        module = Float(num_features)
        module.register_forward_hook(lambda *_: calls.append("own"))
        return module

    model = network()
    report = swap_norm(model, build)
    model(some_batch())
    assert calls == ["own", "own"]
    report.revert()
    model(some_batch())
    assert calls == ["own", "own"]


def test_custom_attributes_and_qconfig_stay():
    model = network()
    model[1].mine, model[1].qconfig = {"a": 1}, "quantised"
    report = swap_norm(model, "custom")
    assert (model[1].mine, model[1].qconfig) == ({"a": 1}, "quantised")
    model[1].qconfig = "otherwise"
    report.revert()
    assert model[1].qconfig == "otherwise"


@pytest.mark.parametrize("to", ["custom", "sync", Float])
def test_an_optimizer_built_before_trains_the_swapped_layer(to):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    swap_norm(model, to)
    before = model[1].weight.detach().clone()
    model(some_batch()).square().sum().backward()
    optimizer.step()
    assert (model[1].weight != before).all()


def test_a_callable_builds_the_replacement():
    model = network().double().eval()
    model[1].running_mean.fill_(7.0)
    before = snapshot(model)
    report = swap_norm(model, Float, start=3.0)
    new = model[1]
    assert isinstance(new, Float)
    # Same name and shape: the old one, whatever the callable made.
    assert id(new.weight) == before[1]["1.weight"]
    assert new.running_mean.tolist() == [7.0] * 4
    assert new.other.dtype == torch.float64
    assert not new.training
    assert report.to == "Float"
    assert report.swapped[0].note == (
        "carried over: weight, running_mean; new: other; left behind: bias, running_var, num_batches_tracked"
    )
    model.train()
    new.running_mean = new.running_mean + 1
    report.revert()
    # What became of it meanwhile: the flag, and a buffer's new tensor, as .to(device) makes one.
    assert model[1].training
    assert model[1].running_mean.tolist() == [8.0] * 4
    assert snapshot(model)[0] == before[0]


def test_a_callable_with_options():
    model = network()
    report = swap_norm(model, functools.partial(nn.GroupNorm, 2), eps=0.5)
    assert (model[1].num_groups, model[1].num_channels, model[1].eps) == (2, 4, 0.5)
    assert "carried over: weight, bias" in str(report)


def test_a_callable_that_fails_leaves_the_module_as_it_was():
    model, built = network(), []
    before = snapshot(model)

    def build(num_features):
        if built:
            raise KeyError("no")
        built.append(nn.Identity())
        return built[0]

    with pytest.raises(KeyError):
        swap_norm(model, build)
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"to returned the same module for two layers: it must build one for each\."):
        swap_norm(model, {4: Float(4)}.get)
    with pytest.raises(ValueError, match=r"returned 4 for 4 features: it must return a torch\.nn\.Module\."):
        swap_norm(model, lambda num_features: num_features)
    assert_same(before, snapshot(model))


def test_a_failure_midway_leaves_the_module_as_it_was():
    class Slotted(nn.BatchNorm1d):
        """Its objects cannot change their class."""

        __slots__ = ("mine",)

    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), Slotted(4))
    before = snapshot(model)
    with pytest.raises(TypeError, match="layout differs"):
        swap_norm(model, "custom", convention="tf_ema")
    assert_same(before, snapshot(model))


def test_statistics_that_cannot_be_reset_leave_the_module_as_it_was():
    model = network()
    with torch.inference_mode():
        model[4].running_var = torch.ones(4)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inference tensor"):
        swap_norm(model, "custom", convention="tf_ema")
    assert_same(before, snapshot(model))


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


class Frozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


class Plain(nn.BatchNorm1d):
    """A subclass that only has a name, and a constructor."""

    kept: int

    def __init__(self, num_features):
        super().__init__(num_features)


class Dimensionless(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        pass


def scripted():
    with warnings.catch_warnings():
        # torch 2.15 calls it deprecated.
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.BatchNorm1d(4))


def parametrised():
    layer = nn.BatchNorm1d(4)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def pruned():
    return prune.l1_unstructured(nn.BatchNorm1d(4), "weight", amount=1)


def with_forward():
    layer = nn.BatchNorm1d(4)
    layer.forward = lambda x: x
    return layer


def with_more(**more):
    """A layer of a subclass with methods and attributes of its own."""
    return lambda num_features: type("More", (nn.BatchNorm1d,), more)(num_features)


MORE = {
    "_check_input_dim": lambda self, input: None,
    "get_extra_state": lambda self: {"version": 2},
    "set_extra_state": lambda self, state: None,
    "_load_from_state_dict": lambda self, *_: None,
    "reset_parameters": lambda self: None,
    "extra_repr": lambda self: "mine",
    "freeze": lambda self: self.eval(),
    "scale": property(lambda self: self.weight),
    "limit": 7,
}
EVERYTHING = [*IN_PLACE, Float]
OTHER_CLASS = ["none", "custom", "sync", Float]
REFUSED = [
    (Activated, EVERYTHING, "Activated has its own forward, which would be lost"),
    (lambda _: with_forward(), EVERYTHING, "BatchNorm1d has its own forward"),
    (Frozen, EVERYTHING, "Frozen has its own train"),
    (lambda _: parametrised(), EVERYTHING, "parametrised: call torch.nn.utils.parametrize.remove_parametrizations"),
    (lambda _: nn.LazyBatchNorm1d(), EVERYTHING, "lazy, with no parameters yet: call the module on a batch first"),
    (lambda _: scripted(), EVERYTHING, "compiled by TorchScript: swap before compiling"),
    *((with_more(**{name: value}), OTHER_CLASS, f"More has its own {name}, which") for name, value in MORE.items()),
    (nn.SyncBatchNorm, IN_PLACE[1:], "SyncBatchNorm does not say its dimension: swap before it is made"),
    (Dimensionless, IN_PLACE[1:], "Dimensionless does not say its dimension"),
    (lambda _: pruned(), ["none", Float], r"holds tensors of its own, which would be lost (weight_mask, weight_orig)"),
]


@pytest.mark.parametrize(
    ("build", "to", "reason"), [(build, to, reason) for build, targets, reason in REFUSED for to in targets]
)
def test_what_cannot_be_swapped_is_refused(build, to, reason):
    # A name of ours for the layer's own target "torch", so that there is something to swap in any case.
    model = nn.Sequential(BatchNorm1d(4), build(4), nn.ModuleDict({"again": build(4)}))
    classes = [type(layer) for layer in model.modules()]
    with pytest.raises(ValueError, match="nothing has been changed") as error:
        swap_norm(model, to)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("2 batch norm layer(s) cannot be swapped to ")
    assert [line.split(":")[0] for line in lines[1:]] == ["  1, 2.again"]
    assert all(reason in line for line in lines[1:])
    assert [type(layer) for layer in model.modules()] == classes

    with pytest.warns(UserWarning, match="could not be swapped") as caught:
        report = swap_norm(model, to, strict=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert set(report.skipped) == {"1", "2.again"}
    assert reason in report.skipped["1"]
    assert [type(layer) for layer in model.modules()][2:] == classes[2:]
    assert len(report.swapped) == (to != "custom")


@pytest.mark.parametrize("to", ["none", Float])
def test_torchs_synchronised_layer_can_be_left_out_or_replaced(to):
    model = nn.Sequential(nn.SyncBatchNorm(4))
    swap_norm(model, to).revert()
    assert type(model[0]) is nn.SyncBatchNorm


@pytest.mark.parametrize("to", ["custom", "sync", "none"])
def test_a_subclass_without_a_forward_comes_back(to):
    model = network(Plain)
    report = swap_norm(model, to)
    assert type(model[1]) is (nn.Identity if to == "none" else BatchNorm1d)
    report.revert()
    assert type(model[1]) is Plain
    assert swap_norm(model, "torch").unchanged == ["1", "4"]


def test_a_subclass_of_ours_stays_what_it_is():
    class Mine(BatchNorm1d):
        pass

    model = network(Mine)
    assert swap_norm(model, "custom").unchanged == ["1", "4"]
    swap_norm(model, "custom", convention="keras")
    assert (type(model[1]), model[1].convention) == (Mine, CONVENTIONS["keras"])


def test_a_subclass_of_ours_with_a_method_of_its_own_cannot_become_torchs():
    class Mine(BatchNorm1d):
        def extra_repr(self):
            return "mine"

    model = network(Mine)
    with pytest.raises(ValueError, match="Mine has its own extra_repr, which would be lost"):
        swap_norm(model, "torch")
    swap_norm(model, "sync")
    assert type(model[1]) is Mine and model[1].sync


def test_a_layer_that_holds_a_module_is_not_replaced():
    layer = nn.BatchNorm1d(4)
    layer.act = nn.ReLU()
    with pytest.raises(ValueError, match=r"holds modules of its own, which would be lost \(act\)"):
        swap_norm(nn.Sequential(layer), "none")
    swap_norm(nn.Sequential(layer), "custom")
    assert isinstance(layer.act, nn.ReLU)


def test_an_initialised_lazy_layer_is_an_ordinary_one():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(4, 3))
    swap_norm(model, "custom")
    assert type(model[0]) is BatchNorm1d


def test_pruned_layers_keep_their_mask():
    model = nn.Sequential(pruned())
    x = torch.randn(5, 4)
    want = model(x)
    swap_norm(model, "custom")
    torch.testing.assert_close(model(x), want)


def test_conventions_per_activation_need_another_number_of_features():
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"0: its parameters are per channel, and the convention's per activation"):
        swap_norm(model, "custom", convention="from_scratch")
    swap_norm(nn.Sequential(nn.BatchNorm1d(4)), "custom", convention="from_scratch")
    model = nn.Sequential(BatchNorm2d(16, convention="from_scratch"))
    swap_norm(model, "sync")
    with pytest.raises(ValueError, match="0: its parameters are per activation, and the convention's per channel"):
        swap_norm(model, "custom", convention="keras")
    with pytest.raises(ValueError, match="0: its statistics are per activation, and torch's are per channel"):
        swap_norm(model, "torch")
    assert model(torch.randn(3, 4, 2, 2)).shape == (3, 4, 2, 2)


@pytest.mark.parametrize("to", ["none", Float])
def test_parameters_in_use_are_not_taken_away(to, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(network()))
        with pytest.raises(
            ValueError, match=r"0\.module\.1, 0\.module\.4: inside DDP or FSDP, which hold its parameters"
        ):
            swap_norm(model, to)
        swap_norm(model, "custom", convention="keras")
        assert model[0].module[1].convention == CONVENTIONS["keras"]
        model(some_batch()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_layers_are_refused(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = network()
        fsdp.fully_shard(model[1], mesh=mesh)
        with pytest.raises(ValueError, match="1: sharded by fully_shard: swap before sharding"):
            swap_norm(model, "custom")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("batch", {}, "to='batch' is not known: choose one of none, custom, torch, sync, or pass a callable"),
        (None, {}, "to=None is not known"),
        (nn.GroupNorm(2, 4), {}, r"to=GroupNorm\(2, 4.* is not known"),
        ("none", {"eps": 1.0}, "eps=1.0 is not possible for to='none', which takes no options"),
        ("torch", {"convention": "keras"}, "convention='keras' is not possible for to='torch', which takes eps and"),
        ("torch", {"eps": -1.0}, "eps=-1.0 is not possible: give a number of at least 0"),
        ("custom", {"spin": 1}, "spin=1 is not known: choose among convention"),
        ("custom", {"convention": "latin"}, "convention='latin' is not known"),
        ("custom", {"affine": False}, "affine=False is not possible: a swapped layer keeps its parameters"),
        ("sync", {"sync": False}, 'sync=False is not possible: choose by to="sync" or to="custom"'),
    ],
)
def test_arguments_are_checked_before_anything_changes(to, options, message):
    model = network()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        swap_norm(model, to, **options)
    assert_same(before, snapshot(model))


def test_a_momentum_of_the_other_direction_warns():
    with pytest.warns(UserWarning, match=r"Did you mean momentum=0\.1\?"):
        swap_norm(network(), "custom", momentum=0.9)


def test_the_module_is_checked():
    with pytest.raises(ValueError, match=r"module=\[\] is not possible: pass a torch\.nn\.Module"):
        swap_norm([], "custom")
    with pytest.raises(ValueError, match="is itself a batch norm layer, and a callable cannot replace it"):
        swap_norm(nn.BatchNorm1d(3), Float)
    with pytest.raises(
        ValueError, match=r"module=Linear\(\.\.\.\) has no batch norm layer that could be swapped to cu"
    ):
        swap_norm(nn.Linear(1, 1), "custom")
    assert not swap_norm(nn.Linear(1, 1), "custom", strict=False).swapped
    assert not swap_norm(nn.Linear(1, 1), "none").swapped


def test_a_layer_can_be_the_module():
    layer = nn.BatchNorm1d(3)
    report = swap_norm(layer, "custom")
    assert type(layer) is BatchNorm1d
    assert "(the module itself)" in str(report)


def test_instance_norm_is_left_alone():
    model = nn.Sequential(nn.InstanceNorm1d(3), nn.BatchNorm1d(3))
    swap_norm(model, "none")
    assert type(model[0]) is nn.InstanceNorm1d


def test_the_report_is_a_table():
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(5)], Activated(3))
    with pytest.warns(UserWarning, match="could not be swapped"):
        report = swap_norm(model, "custom", strict=False)
    lines = str(report).splitlines()
    assert lines[0] == "to custom: 5 swapped, 0 unchanged, 1 skipped"
    assert lines[1] == "    5 x torch.nn.BatchNorm1d -> bnlightning.BatchNorm1d: 0, 1, 2 and 2 more"
    assert lines[2].startswith("  skipped 5: Activated has its own forward")


@pytest.mark.parametrize("to", [*IN_PLACE, Float])
def test_swapped_models_can_be_copied_and_saved(to):
    model = network(BatchNorm1d if to == "torch" else nn.BatchNorm1d)
    report = swap_norm(model, to)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = some_batch()
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False).eval()):
        assert type(twin[1]) is type(model[1])
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    # Together they keep their relation.
    twin, its_report = pickle.loads(pickle.dumps((model, report)))
    its_report.revert()
    assert type(twin[1]) is (BatchNorm1d if to == "torch" else nn.BatchNorm1d)
    assert type(model[1]) is not type(twin[1])


def test_a_compiled_model_notices_the_swap():
    model = nn.Sequential(nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = some_batch(2)
    compiled(x)
    with pytest.warns(UserWarning, match="momentum"):
        swap_norm(model, "custom", convention="keras", momentum=1.0)
    compiled(x)
    torch.testing.assert_close(model[0].running_var, x.var(dim=0, correction=0))


def test_a_given_convention_is_shown_as_it_is():
    convention = Convention(momentum=0.2, eps=1e-5, unbiased=False)
    model = network()
    swap_norm(model, "custom", convention=convention)
    assert "convention Convention(momentum=0.2" in swap_norm(model, "torch").swapped[0].note


class TestConvertSyncBatchnorm:
    """Torch's conversion must not take the convention away."""

    @pytest.mark.parametrize("quantised", [False, True])
    def test_is_refused(self, quantised):
        model = nn.Sequential(nn.Sequential(BatchNorm1d(3, convention="keras")))
        if quantised:
            model[0][0].qconfig = "any"
        with pytest.raises(RuntimeError, match=r'call swap_norm\(model, "sync"\)'):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert type(model[0][0]) is BatchNorm1d

    def test_of_layers_that_were_swapped(self):
        model = network()
        report = swap_norm(model, "sync")
        with pytest.raises(RuntimeError, match="would replace BatchNorm1d"):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        report.revert()
        assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is nn.SyncBatchNorm

    def test_the_attribute_is_otherwise_like_none_at_all(self):
        ours, torchs = BatchNorm1d(3), nn.BatchNorm1d(3)
        for layer in (ours, torchs):
            assert not hasattr(layer, "qconfig")
            with pytest.raises(AttributeError, match="'BatchNorm1d' object has no attribute 'qconfig'"):
                layer.qconfig  # noqa: B018
            # torch 2.6 says no more than the name here.
            with pytest.raises(AttributeError, match="qconfig"):
                del layer.qconfig
            layer.qconfig = "any"
            assert copy.deepcopy(layer).qconfig == pickle.loads(pickle.dumps(layer)).qconfig == "any"
            del layer.qconfig
            assert not hasattr(layer, "qconfig")


def test_the_report_says_what_a_swap_changes():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    report = swap_norm(model, "custom", convention="keras", eps=None, momentum="convention")
    assert "0, 1 (convention='keras'; eps=0.001; momentum=0.01)" in str(report)
    assert swap_norm(model, "sync").swapped[0].note == "sync=True"
    assert swap_norm(nn.Sequential(nn.BatchNorm1d(2)), "torch", eps=1e-3).swapped[0].note == "eps=0.001"
    assert swap_norm(nn.Sequential(nn.BatchNorm1d(2)), "custom").swapped[0].note == ""


@pytest.mark.parametrize("to", ["custom", "sync", "torch"])
def test_a_momentum_that_looks_like_tensorflows_warns_once_and_of_the_users_line(to):
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(3)])
    with pytest.warns(UserWarning, match=r"Did you mean momentum=0.01\?") as record:
        swap_norm(model, to, momentum=0.99)
    assert len(record) == 1 and record[0].filename == __file__


def test_unknown_options_are_named_beside_the_known_ones():
    model = nn.Sequential(nn.BatchNorm1d(2))
    message = "conventions='keras' is not known: choose among convention, backend, process_group, eps, momentum"
    with pytest.raises(ValueError, match=message):
        swap_norm(model, "custom", conventions="keras")
