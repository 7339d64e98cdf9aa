import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnlightning import BatchNorm1d, BatchNorm2d, swap_norm
from bnlightning.nn import (
    accumulate_statistics,
    batch_of_one,
    batch_statistics,
    frozen_statistics,
    running_statistics,
    skip_nonfinite_batches,
    skip_recomputed_batches,
)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def trained(**options):
    """A layer whose running statistics are not those of any batch below."""
    layer = BatchNorm1d(3, **options)
    for seed in range(5, 9):
        layer(values(10, 3, seed=seed))
    return layer


def state(module):
    return copy.deepcopy(module.state_dict())


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [BatchNorm1d(3), nn.BatchNorm1d(3), BatchNorm1d(3, track_running_stats=False)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_reads_and_changes_no_running_statistics(layer, training):
    layer = copy.deepcopy(layer).train(training)
    x = values(16, 3)
    before = state(layer)
    with batch_statistics(nn.Sequential(layer)):
        output = layer(x)
    torch.testing.assert_close(output.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)
    same(state(layer), before)
    assert layer.training is training


def test_batch_statistics_is_undone_by_an_exception():
    layer = BatchNorm1d(3)
    running_mean = layer.running_mean
    with pytest.raises(RuntimeError, match="stop"), batch_statistics(layer):
        raise RuntimeError("stop")
    assert layer.running_mean is running_mean and layer.track_running_stats


def test_running_statistics_in_training_are_updated_before_they_are_used():
    layer, twin, x = trained(), trained(), values(6, 3).requires_grad_()
    running_statistics(layer)
    output = layer(x)
    twin(x)
    torch.testing.assert_close(state(layer), state(twin))
    torch.testing.assert_close(output, twin.eval()(x))
    # The next batch changes the buffers before this one's backward pass.
    layer(values(6, 3, seed=1))
    output.sum().backward()
    twin.load_state_dict(trained().state_dict())
    twin.train()(x)
    expected = (twin.weight / (twin.running_var + twin.eps).sqrt()).expand(6, 3)
    torch.testing.assert_close(x.grad, expected)


def test_frozen_batch_norm_survives_train_and_eval():
    layer, x = trained(), values(6, 3)
    before = state(layer)
    handles = [running_statistics(layer), frozen_statistics(layer)]
    for mode in (True, False, True):
        torch.testing.assert_close(layer.train(mode)(x), trained().eval()(x))
    same(state(layer), before)
    for handle in handles:
        handle.remove()
        handle.remove()
    twin = trained()
    same(layer(x), twin(x))
    same(state(layer), state(twin))


def test_frozen_statistics_alone_still_normalise_by_the_batch():
    layer, twin, x = trained(), trained(), values(6, 3)
    before = state(layer)
    with frozen_statistics(layer):
        same(layer(x), twin(x))
        same(state(layer), before)
    layer(x)
    assert not torch.equal(layer.running_mean, before["running_mean"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"convention": "caffe"}, {"backend": "reference"}])
def test_a_batch_that_is_not_finite_leaves_no_trace(bad, options):
    layer, twin = trained(**options), trained(**options)
    skip_nonfinite_batches(layer)
    before = state(layer)
    x = values(6, 3)
    x[2, 1] = bad
    assert not layer(x).isfinite().all()
    same(state(layer), before)
    # Without, one such batch is in the averages for ever.
    assert not trained(**options)(x).isfinite().all() and not (twin(x), twin.running_mean.isfinite().all())[1]
    clean, twin = values(6, 3), trained(**options)
    same(layer(clean), twin(clean))
    torch.testing.assert_close(state(layer), state(twin))


def batch_norm_net():
    return nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_a_batch_once(reentrant):
    torch.manual_seed(0)
    net = batch_norm_net()
    plain, double = copy.deepcopy(net), copy.deepcopy(net)
    skip_recomputed_batches(net)
    for step in range(3):
        x = values(6, 3, seed=step).requires_grad_()
        plain(x).sum().backward()
        for each in (net, double):
            checkpoint(each, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(state(net), state(plain))
    assert double[1].num_batches_tracked == 6 and net[1].num_batches_tracked == 3
    for got, want in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("convention", ["pytorch", "keras", "caffe"])
def test_the_micro_batches_of_a_step_count_as_one_batch(convention):
    layer, whole = BatchNorm1d(3, convention=convention), BatchNorm1d(3, convention=convention)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = accumulate_statistics(layer, optimizer)
    for step in range(3):
        x = values(12, 3, seed=step)
        before = state(layer)
        for part in x[:9].split([5, 4]):
            layer(part)
            same(state(layer), before)
        # As Lightning runs it: the last micro-batch inside the step.
        optimizer.step(lambda part=x[9:]: layer(part).sum())
        whole(x)
        torch.testing.assert_close(state(layer), state(whole))
    handle.remove()
    layer(x), whole(x), optimizer.step()
    torch.testing.assert_close(state(layer), state(whole))


def test_accumulating_for_another_optimizer_takes_the_place_of_the_first():
    layer, twin = BatchNorm1d(3), BatchNorm1d(3)
    # As configure_optimizers is called for every fit.
    handles = [accumulate_statistics(layer, torch.optim.SGD(layer.parameters(), lr=0.0)) for _ in range(2)]
    skip_nonfinite_batches(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    accumulate_statistics(layer, optimizer)
    for seed in range(3):
        layer(values(6, 3, seed=seed)), twin(values(6, 3, seed=seed))
        optimizer.step()
    handles[0].remove()
    layer(values(6, 3)), twin(values(6, 3)), optimizer.step()
    torch.testing.assert_close(state(layer), state(twin))


@pytest.mark.parametrize("change", [skip_nonfinite_batches, skip_recomputed_batches, frozen_statistics])
def test_a_second_call_adds_nothing_and_takes_nothing_away(change):
    layer = BatchNorm1d(3)
    with change(layer):
        first = (layer.update_rule, layer.frozen)
        with change(layer):
            assert (layer.update_rule, layer.frozen) == first
        assert (layer.update_rule, layer.frozen) == first
    assert layer.update_rule is None and not layer.frozen


def test_rules_can_be_combined_and_removed_in_any_order():
    layer = BatchNorm1d(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    accumulated = accumulate_statistics(layer, optimizer)
    finite = skip_nonfinite_batches(layer)
    once = skip_recomputed_batches(layer)
    x, bad = values(6, 3), torch.full((6, 3), float("nan"))
    layer(bad), layer(x), optimizer.step()
    twin = BatchNorm1d(3)
    twin(x)
    torch.testing.assert_close(state(layer), state(twin))
    accumulated.remove()
    layer(bad), layer(x), twin(x)
    torch.testing.assert_close(state(layer), state(twin))
    finite.remove(), once.remove()
    assert layer.update_rule is None
    layer(bad)
    assert layer.running_mean.isnan().all()


@pytest.mark.parametrize("layer_class", [BatchNorm1d, BatchNorm2d])
@pytest.mark.parametrize("policy", ["running", "skip"])
def test_a_batch_of_one(layer_class, policy):
    layer = layer_class(3)
    x = values(1, 3) if layer_class is BatchNorm1d else values(1, 3, 1, 1)
    layer(torch.cat([x, x + 1, x - 3]))
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(0.5)
    before = state(layer)
    want = copy.deepcopy(layer).eval()(x) if policy == "running" else 2 * x + 0.5
    with batch_of_one(layer, policy):
        torch.testing.assert_close(layer(x), want)
    same(state(layer), before)
    with pytest.raises(ValueError, match=r"1 value\(s\) per channel.*batch_of_one"):
        layer(x)


def test_bad_arguments():
    with pytest.raises(ValueError, match="policy='drop' is not known: choose one of raise, running, skip"):
        batch_of_one(BatchNorm1d(2), "drop")
    mixed = nn.Sequential(BatchNorm1d(2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"module=Sequential has batch norm layers that are not ours \(1\).*swap_norm"):
        frozen_statistics(mixed)
    assert not mixed[0].frozen
    with pytest.raises(ValueError, match=r"not ours \(0, 1, 2 and 17 more\)"):
        frozen_statistics(nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(20)]))
    with pytest.raises(ValueError, match=r"(?s)optimizer=\[.*\] is not possible: give the torch.optim.Optimizer"):
        accumulate_statistics(BatchNorm1d(2), [torch.optim.SGD(BatchNorm1d(2).parameters())])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_what_the_layer_has_but_does_not_wait_for_its_optimizer(copied):
    layer, bad = BatchNorm1d(3), torch.full((6, 3), float("nan"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    skip_nonfinite_batches(layer)
    accumulate_statistics(layer, optimizer)
    twin, x = copied(layer), values(6, 3)
    twin(x), twin(bad)
    assert twin.num_batches_tracked == 1 and layer.num_batches_tracked == 0
    frozen_statistics(twin)
    assert not layer.frozen
    twin(x), optimizer.step()
    assert twin.num_batches_tracked == 1


def test_update_bn_and_averaged_models_need_no_optimizer_step():
    net = nn.Sequential(BatchNorm1d(3))
    accumulate_statistics(net, torch.optim.SGD(net.parameters(), lr=0.0))
    data = [values(8, 3, seed=seed) for seed in range(3)]
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for model, layer in ((net, net[0]), (averaged, averaged.module[0])):
        torch.optim.swa_utils.update_bn(data, model)
        torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))
        assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("change", [batch_statistics, frozen_statistics, running_statistics, skip_nonfinite_batches])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_handles_are_removed_in_any_order(change, order):
    layer, theirs = trained(), nn.BatchNorm1d(3)
    usual = (layer.normalize_by, layer.frozen, layer.update_rule)
    before = state(layer), state(theirs)
    handles = [change(layer), change(layer)]
    changed = (layer.normalize_by, layer.frozen, layer.update_rule)
    both = [batch_statistics(theirs), batch_statistics(theirs)]
    handles[order[0]].remove(), both[order[0]].remove()
    assert (layer.normalize_by, layer.frozen, layer.update_rule) == changed != usual
    handles[order[1]].remove(), both[order[1]].remove()
    assert (layer.normalize_by, layer.frozen, layer.update_rule) == usual
    same((state(layer), state(theirs)), before)


def test_the_later_of_two_holds_and_the_earlier_one_again_after_it():
    layer = trained()
    running_statistics(layer), batch_of_one(layer, "skip")
    with batch_statistics(layer), batch_of_one(layer, "running"):
        assert (layer.normalize_by, layer.batch_of_one, layer.frozen) == ("batch", "running", True)
    assert (layer.normalize_by, layer.batch_of_one, layer.frozen) == ("running", "skip", False)


def test_a_checkpoint_a_copy_and_another_dtype_while_the_batch_normalises():
    layer = trained()
    with batch_statistics(layer):
        assert state(layer).keys() == BatchNorm1d(3).state_dict().keys()
        assert copy.deepcopy(layer).running_mean is not None
        layer.double()
    assert layer.eval()(values(4, 3).double()).dtype == torch.float64


@pytest.mark.parametrize("first", [skip_nonfinite_batches, skip_recomputed_batches])
@pytest.mark.parametrize("accumulates_first", [True, False])
def test_accumulated_is_what_counts_whatever_was_called_first(first, accumulates_first):
    net, bad = batch_norm_net(), torch.full((6, 3), float("nan"))
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    calls = [lambda: accumulate_statistics(net, optimizer), lambda: first(net)]
    for call in calls if accumulates_first else calls[::-1]:
        call()
    x = values(6, 3).requires_grad_()
    if first is skip_nonfinite_batches:
        net(bad), net(x)
    else:
        checkpoint(net, x, use_reentrant=False).sum().backward()
    optimizer.step()
    plain(x)
    torch.testing.assert_close(state(net), state(plain))


@pytest.mark.parametrize("to", ["torch", "none"])
def test_a_layer_that_is_swapped_meanwhile_is_left_alone(to):
    net = nn.Sequential(BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    handles = [frozen_statistics(net), skip_nonfinite_batches(net), accumulate_statistics(net, optimizer)]
    net(values(6, 3))
    swap_norm(net, to)
    attributes = set(vars(net[0]))
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert set(vars(net[0])) == attributes


def test_what_is_pending_when_a_layer_is_frozen_is_dropped():
    layer, x = BatchNorm1d(3), values(6, 3)
    before = state(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    accumulate_statistics(layer, optimizer)
    layer(x), frozen_statistics(layer), optimizer.step()
    same(state(layer), before)


def test_a_rule_of_ones_own_stays_innermost():
    seen = []
    layer = BatchNorm1d(3)
    layer.update_rule = lambda layer, mean, var, n: seen.append(bool(n > 1))
    handle = skip_nonfinite_batches(layer)
    layer(values(6, 3)), layer(torch.full((6, 3), float("inf")))
    handle.remove()
    layer(values(6, 3))
    assert seen == [True, False, True] and layer.num_batches_tracked == 0


def test_a_skipped_batch_of_one_under_autocast():
    layer = BatchNorm1d(3)
    with batch_of_one(layer, "skip"), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_variance_that_overflows_is_not_finite_either():
    layer = BatchNorm1d(1)
    skip_nonfinite_batches(layer)
    layer(torch.tensor([[1e30], [-1e30]]))
    assert layer.num_batches_tracked == 0


def test_many_values_in_half_precision():
    layer = BatchNorm2d(2, dtype=torch.float16)
    skip_nonfinite_batches(layer)
    layer(torch.randn(32, 2, 56, 56).half())
    torch.testing.assert_close(layer.running_var.float(), torch.ones(2), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "change", [running_statistics, frozen_statistics, skip_nonfinite_batches, skip_recomputed_batches]
)
def test_torch_compile_keeps_one_graph(change):
    layer = trained()
    change(layer)
    twin, x = copy.deepcopy(layer), values(8, 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), twin(x))
    torch.testing.assert_close(state(layer), state(twin))
