import copy
import dataclasses

import pytest
import torch
from torch import nn

from bnlightning.monitors.catching.finite_check import Place, _DeferredCheck, _ImmediateCheck, make_check

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


@pytest.fixture(params=[_ImmediateCheck, _DeferredCheck], ids=["immediate", "deferred"])
def check(request):
    return request.param(CPU)


def run(check, step, *calls, loss=1.0):
    """One forward pass of calls ``(name, input, output)``, of which an input may be the name of the one before."""
    outputs = {}
    check.begin(step)
    for name, input, output in calls:
        given = outputs[input] if isinstance(input, str) else torch.tensor([input, 1.0])
        outputs[name] = torch.tensor([1.0, output])
        check.update(name, (given,), outputs[name])
    if loss is not None:
        check.update_loss(torch.tensor(loss))
    check.end()


def place_of(check):
    found = check.found()
    return None if found is None else (found[0], str(found[2]))


def test_the_device_decides():
    assert make_check(CPU).is_immediate and not make_check(torch.device("meta")).is_immediate


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_place_in_the_order_of_execution(check, bad):
    run(check, 3, ("a", 1.0, 2.0), ("b", "a", 3.0))
    assert check.found() is None
    run(check, 4, ("a", 1.0, 2.0), ("b", "a", bad), ("c", "b", bad), loss=bad)
    run(check, 5, ("a", 1.0, bad), ("b", "a", bad), ("c", "b", bad), loss=bad)
    assert place_of(check) == (4, "b")


def test_input_before_and_after(check):
    run(check, 0, ("a", NAN, NAN), ("b", "a", NAN), loss=NAN)
    assert check.found()[::2] == (0, Place("first", "a"))


def test_before_a_module(check):
    run(check, 1, ("a", 1.0, 1.0), ("b", NAN, NAN), loss=NAN)
    assert place_of(check) == (1, "before b")


def test_after_the_last_module(check):
    run(check, 2, ("a", 1.0, 1.0), ("b", "a", 1.0), loss=NAN)
    assert place_of(check) == (2, "after b")


def test_without_any_module(check):
    run(check, 2, loss=NAN)
    assert place_of(check) == (2, "loss")


def test_an_output_changed_in_place_is_looked_at_again(check):
    check.begin(0)
    output = torch.ones(3)
    check.update("a", (torch.ones(3),), output)
    output.mul_(INF)
    check.update("b", (output,), output * 1.0)
    check.update_loss(torch.tensor(INF))
    check.end()
    assert place_of(check) == (0, "before b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_large_values_whose_sum_overflows_are_finite(check, dtype):
    check.begin(1)
    largest = torch.finfo(dtype).max
    check.update("a", (torch.full((100,), largest, dtype=dtype),), torch.full((100,), largest, dtype=dtype))
    check.update_loss(torch.tensor(NAN))
    check.end()
    assert place_of(check) == (1, "after a")


def test_a_module_that_runs_later_for_the_first_time(check):
    run(check, 0, ("a", 1.0, 1.0))
    run(check, 1, ("a", 1.0, 1.0), ("late", "a", NAN), loss=NAN)
    run(check, 2, ("a", 1.0, 1.0))
    assert place_of(check) == (1, "late")


def test_values_that_cannot_be_looked_at(check):
    check.begin(0)
    odd = (torch.ones(2, dtype=torch.long), None, torch.ones(2) > 0, torch.eye(2).to_sparse(), torch.zeros(0, 3), "a")
    check.update("a", odd, odd)
    check.update_loss(torch.tensor(1.0))
    check.end()
    assert check.found() is None


def test_a_module_that_changes_its_input_in_place_is_blamed_itself(check):
    check.begin(0)
    x = torch.ones(2)
    check.update("a", (torch.ones(2),), x)
    check.update("b", (x,), x.mul_(NAN))
    check.update_loss(torch.tensor(NAN))
    check.end()
    assert place_of(check) == (0, "b")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_does_no_harm_is_no_fault(check, bad):
    run(check, 0, ("a", 1.0, bad), ("b", bad, bad), ("c", 1.0, 1.0))
    # Nor is it to blame when a fault comes later.
    run(check, 1, ("a", 1.0, bad), ("b", bad, bad), ("c", 1.0, NAN), loss=NAN)
    assert place_of(check) == (1, "c")


def test_a_mask_is_not_to_blame_for_the_first_fault(check):
    run(check, 0, ("mask", 1.0, -INF), ("scores", 1.0, 1.0), ("c", 1.0, NAN), loss=NAN)
    assert place_of(check) == (0, "c")


@dataclasses.dataclass
class Both:
    x: torch.Tensor
    mask: torch.Tensor


@pytest.mark.parametrize(
    "give",
    [
        lambda *both: both,
        lambda x, mask: ((x,), {"mask": mask}),
        lambda *both: ([list(both)],),
        lambda *both: Both(*both),
    ],
    ids=["position", "keyword", "list", "dataclass"],
)
def test_masks_and_data_however_they_are_given(check, give):
    def attend(step, x, mask, out):
        check.begin(step)
        check.update("a", (torch.ones(2),), torch.ones(2))
        check.update("attention", give(torch.tensor([x, 1.0]), torch.tensor([0.0, mask])), torch.tensor([out]))
        check.update_loss(torch.tensor(out))
        check.end()

    attend(0, 1.0, -INF, 1.0)
    assert check.found() is None
    # The mask is no excuse of a module that fails for another reason.
    attend(1, 1.0, -INF, NAN)
    assert place_of(check) == (1, "attention")
    other = type(check)(CPU)
    check = other
    attend(0, NAN, -INF, NAN)
    assert place_of(check) == (0, "before attention")


def test_scores_of_minus_infinity_that_a_sum_turns_into_nan_are_to_blame(check):
    run(check, 0, ("log", 1.0, -INF), ("sum", "log", NAN), loss=NAN)
    assert place_of(check) == (0, "log")


def test_calls_of_one_module_are_told_apart(check):
    run(check, 0, ("cell", 1.0, 1.0), ("other", "cell", 1.0), ("cell", "other", 1.0))
    run(check, 1, ("cell", 1.0, 1.0), ("other", "cell", NAN), ("cell", "other", NAN), loss=NAN)
    assert place_of(check) == (1, "other")
    check = type(check)(CPU)
    run(check, 0, ("cell", 1.0, 1.0), ("other", "cell", 1.0), ("cell", "other", NAN), loss=NAN)
    assert place_of(check) == (0, "cell#1")


@pytest.mark.parametrize("entry", ["x", "y"])
def test_a_batch_is_blamed_for_what_it_holds(check, entry):
    def fit(step, batch, loss):
        check.begin(step, batch, 7)
        check.update("a", (batch["x"],), batch["x"] * 1.0)
        check.update_loss((batch["y"] * batch["x"]).sum() * loss)
        check.end()

    batch = {"x": torch.ones(2), "y": torch.ones(2)}
    fit(0, batch, 1.0)
    fit(1, batch | {entry: torch.tensor([NAN, 1.0])}, 1.0)
    assert check.found()[::2] == (1, Place("batch", f":{entry}", 7))


@pytest.mark.parametrize("step", [0, 1])
def test_a_batch_is_not_blamed_for_what_training_step_does_to_it_in_place(check, step):
    for number in range(step + 1):
        x = torch.ones(4) if number == step else torch.arange(4.0)
        check.begin(number, [x], number)
        x.sub_(x.mean()).div_(x.std())
        check.update("a", (x,), x * 1.0)
        check.update_loss(x.sum())
        check.end()
    assert check.found()[::2] == (step, Place("first", "a"))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_parameters_and_buffers_are_blamed_for_what_they_hold(check, name):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    check.hold(net)
    for step in range(2):
        check.begin(step)
        x = y = torch.ones(3, 2)
        for path, module in net.named_children():
            check.update(path, (x,), y := module(x))
            x = y
        check.update_loss(y.sum())
        # As an optimizer does behind the backward pass.
        check.expect_new_parameters()
        with torch.no_grad():
            net.state_dict()[name][0] = NAN
        check.end()
    assert check.found()[::2] == (1, Place("buffer" if "running" in name else "parameter", name))


def test_without_a_loss_that_is_seen_the_last_output_decides(check):
    run(check, 0, ("a", 1.0, NAN), ("b", 1.0, 1.0), loss=None)
    assert check.found() is None
    run(check, 1, ("a", 1.0, NAN), ("b", "a", NAN), loss=None)
    assert place_of(check) == (1, "a")


@pytest.mark.parametrize("harm", ["none", "gradient", "parameter"])
def test_without_a_loss_that_is_seen_a_step_is_a_fault_if_it_leaves_a_bad_parameter_or_gradient(check, harm):
    net = nn.Linear(2, 2)
    check.hold(net)
    check.begin(4)
    check.update("a", (torch.ones(2),), torch.tensor([NAN]))
    if harm == "gradient":
        net.weight.grad = torch.full((2, 2), NAN)
    if harm == "parameter":
        nn.init.constant_(net.bias, NAN)
    check.end()
    assert (check.found() is None) == (harm == "none")
    # What did no harm is no reason not to look on.
    run(check, 5, ("a", 1.0, 1.0), ("b", "a", NAN), loss=NAN)
    assert check.found()[0] == (5 if harm == "none" else 4)


def test_a_finite_loss_clears_what_came_before_it(check):
    check.begin(0)
    check.update("a", (torch.ones(2),), torch.tensor([NAN]))
    check.update_loss(torch.tensor(1.0))
    check.update("b", (torch.ones(2),), torch.tensor([2.0]))
    check.update_loss(torch.tensor(NAN))
    check.end()
    assert check.found()[::2] == (0, Place("after", "b"))


def test_a_step_that_fails_in_its_middle(check):
    check.begin(3)
    check.update("a", (torch.ones(2),), torch.tensor([NAN]))
    assert place_of(check) == (3, "a")


def test_sums_of_compiled_modules(check):
    def fit(step, inputs, outputs, loss):
        check.begin(step)
        check.update_sums(["a", "b"], [torch.tensor(x) for x in inputs], [torch.tensor(x) for x in outputs])
        check.update_loss(torch.tensor(loss))
        check.end()

    fit(0, (1.0, -INF), (-INF, 1.0), 1.0)
    fit(1, (1.0, NAN), (1.0, NAN), NAN)
    assert place_of(check) == (1, "before b")


def test_results_are_read_now_and_then_even_if_nobody_asks():
    check = _DeferredCheck(CPU)
    for step in range(2100):
        run(check, step, ("a", 1.0, NAN if step == 3 else 1.0), loss=NAN if step == 3 else 1.0)
    assert len(check._pending) < 1100 and place_of(check) == (3, "a")


def test_a_copy_does_not_bring_the_network_along(check):
    class NotToBeCopied(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError

    check.hold(NotToBeCopied(2, 2))
    run(copy.deepcopy(check), 0, ("a", 1.0, 1.0))
