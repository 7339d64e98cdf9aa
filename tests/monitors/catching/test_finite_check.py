import pytest
import torch

from bnlightning.monitors.catching.finite_check import _DeferredCheck, _ImmediateCheck, make_check

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["immediate", "deferred"])
def check(request):
    return _ImmediateCheck() if request.param == "immediate" else _DeferredCheck(torch.device("cpu"))


def run(check, step, *calls, loss=1.0):
    """One forward pass of calls ``(name, input, output)``, of which an input may be the name of the one before."""
    outputs = {}
    check.begin(step)
    for name, input, output in calls:
        given = outputs[input] if isinstance(input, str) else torch.tensor([input, 1.0])
        outputs[name] = torch.tensor([1.0, output])
        check.update(name, (given,), outputs[name])
    check.update_loss(torch.tensor(loss))
    check.end()


def test_the_device_decides():
    assert make_check(torch.device("cpu")).is_immediate and not make_check(torch.device("meta")).is_immediate


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_place_in_the_order_of_execution(check, bad):
    run(check, 3, ("a", 1.0, 2.0), ("b", "a", 3.0))
    assert check.found() is None
    run(check, 4, ("a", 1.0, 2.0), ("b", "a", bad), ("c", "b", bad), loss=bad)
    run(check, 5, ("a", 1.0, bad), ("b", "a", bad), ("c", "b", bad), loss=bad)
    step, _, place = check.found()
    assert (step, place) == (4, "b")


def test_input_before_and_after(check):
    run(check, 0, ("a", NAN, NAN), ("b", "a", NAN))
    assert check.found()[::2] == (0, "input")


def test_before_a_module(check):
    run(check, 1, ("a", 1.0, 1.0), ("b", NAN, NAN))
    assert check.found()[::2] == (1, "before b")


def test_after_the_last_module(check):
    run(check, 2, ("a", 1.0, 1.0), ("b", "a", 1.0), loss=NAN)
    assert check.found()[::2] == (2, "after b")


def test_without_any_module(check):
    run(check, 2, loss=NAN)
    assert check.found()[::2] == (2, "loss")


def test_an_output_changed_in_place_is_looked_at_again(check):
    check.begin(0)
    output = torch.ones(3)
    check.update("a", (torch.ones(3),), output)
    output.mul_(INF)
    check.update("b", (output,), output * 1.0)
    check.end()
    assert check.found()[::2] == (0, "before b")


def test_large_values_whose_sum_overflows_are_finite(check):
    run(check, 0, ("a", 1.0, 3e38), ("b", 3e38, 3e38))
    check.begin(1)
    check.update("half", (), torch.full((100,), 6e4, dtype=torch.float16))
    check.end()
    assert check.found() is None


def test_a_module_that_runs_later_for_the_first_time(check):
    run(check, 0, ("a", 1.0, 1.0))
    run(check, 1, ("a", 1.0, 1.0), ("late", "a", NAN))
    run(check, 2, ("a", 1.0, 1.0))
    assert check.found()[::2] == (1, "late")


def test_empty_and_integer_values(check):
    check.begin(0)
    check.update("a", (torch.ones(2, dtype=torch.long), None), torch.zeros(0, 3))
    check.end()
    assert check.found() is None


def test_a_module_that_changes_its_input_in_place_is_blamed_itself(check):
    check.begin(0)
    x = torch.ones(2)
    check.update("a", (torch.ones(2),), x)
    check.update("b", (x,), x.mul_(NAN))
    check.end()
    assert check.found()[::2] == (0, "b")
