import threading

import pytest
import torch
from torch import nn

from bnlightning import tap
from bnlightning.nn.tap import add_listener, remove_listener

# Torch's own, also of what derivatives are made of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


class Ear:
    """A listener of a network, at home in the thread that makes it."""

    def __init__(self, *modules):
        self.modules, self.home, self.is_sampling, self.heard = modules, threading.current_thread(), True, []
        add_listener(self)

    def watches(self, module):
        return module in self.modules

    def hear(self, name, x, limits):
        self.heard.append((name, x, limits))

    def trace(self, name, x, limits):
        raise AssertionError("nothing is compiled")

    @property
    def names(self):
        return [name for name, _, _ in self.heard]


@pytest.fixture
def ear():
    ears = []

    def make(*modules):
        ears.append(Ear(*modules))
        return ears[-1]

    yield make
    for each in ears:
        remove_listener(each)


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_listeners_are_called_until_they_are_removed(ear):
    one = ear()
    x = torch.randn(3, requires_grad=True)
    assert tap(x, "first") is x
    assert tap(x, "second", (0.0, 1.0)) is x
    one.is_sampling = False
    assert tap(x, "not sampled") is x
    one.is_sampling = True
    remove_listener(one)
    remove_listener(one)
    assert tap(x, "third") is x
    assert [(name, limits) for name, _, limits in one.heard] == [("first", None), ("second", (0.0, 1.0))]
    assert all(value is x for _, value, _ in one.heard)


class Tapping(nn.Module):
    def __init__(self, name, inner=None):
        super().__init__()
        self.name, self.inner = name, inner

    def forward(self, x):
        return tap(x if self.inner is None else self.inner(x), self.name)


def test_each_thread_hears_its_own_taps(ear):
    mine, others = ear(), []

    def train():
        others.append(ear())
        tap(torch.ones(1), "theirs")

    in_thread(train)
    tap(torch.ones(1), "mine")
    # A thread of which nobody knows anything.
    in_thread(lambda: tap(torch.ones(1), "nobody's"))
    assert mine.names == ["mine"] and others[0].names == ["theirs"]


def test_the_innermost_running_module_decides_between_monitors_of_one_thread(ear):
    teacher = Tapping("teacher")
    student = Tapping("student", teacher)
    of_student, of_teacher = ear(student), ear(teacher)
    student(torch.ones(1))
    assert of_student.names == ["student"] and of_teacher.names == ["teacher"]
    # No module of theirs is running: all hear it.
    tap(torch.ones(1), "outside")
    assert of_student.names[1:] == of_teacher.names[1:] == ["outside"]
    # Not even while its own monitor does not listen is a tap another network's.
    of_teacher.is_sampling = False
    student(torch.ones(1))
    assert of_student.names[2:] == ["student"]


def test_the_running_module_decides_in_a_worker(ear):
    one, two = Tapping("one"), Tapping("two")
    of_one, of_two = ear(one), ear(two)
    in_thread(lambda: (one(torch.ones(1)), two(torch.ones(1))))
    assert of_one.names == ["one"] and of_two.names == ["two"]


class Scripted(nn.Module):
    def forward(self, x):
        return tap(torch.relu(x), "relu", (0.0, 1.0))


def test_programs_have_no_trace_of_taps(ear):
    one = ear()
    x = torch.tensor([-1.0, 1.0])
    operators = [node.kind() for node in torch.jit.script(Scripted()).inlined_graph.nodes()]
    assert [kind for kind in operators if kind != "prim::Constant"] == ["aten::relu"]
    (node,) = (node for node in torch.fx.symbolic_trace(Scripted()).graph.nodes if node.op == "call_function")
    assert node.target is torch.relu
    assert torch.jit.script(Scripted())(x).tolist() == [0.0, 1.0] and one.names == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ([torch.zeros(2)], "states"),
            r"x of tap\(x, 'states'\) is a list: give a tensor, and each tensor its own name",
        ),
        ((torch.zeros(2), "gate", (0.5,)), r"limits=\(0.5,\) of tap\(x, 'gate'\) is not possible: give a pair"),
        ((torch.zeros(2), "gate", 0.99), r"limits=0.99 of tap\(x, 'gate'\) is not possible: give a pair"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tap(*arguments)


def test_a_graph_that_fx_traces_goes_past_it():
    traced = torch.fx.symbolic_trace(lambda x: tap(torch.relu(x), "relu") + 1)
    assert torch.equal(traced(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0]))
