import numpy as np
import pytest
import torch
from helpers import run_on_ranks
from torch import nn

from bnlightning.monitors.counting.parameters import ParameterAccumulators

SHAPES = {"plain": (3, 5), "sharded": (5, 2), "short": (1, 4), "replicated": (4, 3), "pending": (2, 3), "idle": (2, 2)}


def values(name, seed):
    torch.manual_seed(100 * seed + len(name))
    return torch.randn(SHAPES[name])


def rows_on_rank(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    placements = {"sharded": Shard(0), "short": Shard(0), "replicated": Replicate(), "pending": Replicate()}

    def place(name, tensor):
        return distribute_tensor(tensor, mesh, [placements[name]]) if name in placements else tensor

    parameters = {name: nn.Parameter(place(name, values(name, 0))) for name in SHAPES}
    for name, parameter in parameters.items():
        if name == "pending":
            # The gradient is the sum of what the ranks have.
            parameter.grad = DTensor.from_local(values(name, 1) * (0.25 + 0.5 * rank), mesh, [Partial()])
        elif name != "idle":
            parameter.grad = place(name, values(name, 1))
    rows = ParameterAccumulators(parameters, {"sharded", "pending"}, torch.device("cpu"))
    with torch.no_grad():
        rows.record(parameters.values())
        for name, parameter in parameters.items():
            parameter.add_(place(name, values(name, 2)))
        rows.finish()
    return rows.statistics()


@pytest.mark.slow
def test_every_value_of_a_dtensor_counts_once(tmp_path):
    first, second = run_on_ranks(rows_on_rank, 2, tmp_path)
    assert first.keys() == second.keys() == SHAPES.keys() - {"idle"}
    for name, found in first.items():
        weight, gradient, update = (values(name, seed).double().numpy() for seed in range(3))
        assert (found.values, found.nonfinite, found.dims) == (gradient.size, 0, 2)
        norms = [np.linalg.norm(each) for each in (gradient, weight, update)]
        assert [found.norm, found.weight_norm, found.update_norm] == pytest.approx(norms, rel=1e-5)
        assert second[name].norm == found.norm
        if name in ("sharded", "pending"):
            assert found.histogram.counts.sum() == gradient.size
            assert found.histogram.edges[[0, -1]] == pytest.approx([gradient.min(), gradient.max()])
            assert found.histogram.sum == pytest.approx(gradient.sum(), rel=1e-5)
        else:
            assert found.histogram is None


def test_a_parameter_that_is_stepped_again_is_recorded_anew():
    parameter = nn.Parameter(torch.ones(3))
    rows = ParameterAccumulators({"weight": parameter}, {"weight"}, torch.device("cpu"))
    for gradient in ([float("nan"), 1.0, 2.0], [3.0, 4.0, 0.0]):
        parameter.grad = torch.tensor(gradient)
        rows.record([parameter])
    rows.finish()
    found = rows.statistics()["weight"]
    assert (found.values, found.nonfinite, found.norm) == (3, 0, 5.0)
    assert found.histogram.counts.sum() == 3


def test_an_empty_gradient_is_passed_over():
    empty, sparse, weight = (nn.Parameter(torch.ones(shape)) for shape in [(0, 3), (5, 3), (2,)])
    empty.grad, weight.grad = torch.zeros(0, 3), torch.tensor([3.0, 4.0])
    sparse.grad = torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0, 3), (5, 3), check_invariants=True)
    parameters = {"empty": empty, "sparse": sparse, "weight": weight}
    rows = ParameterAccumulators(parameters, parameters, torch.device("cpu"))
    rows.record(parameters.values())
    rows.finish()
    found = rows.statistics()
    assert list(found) == ["weight"] and found["weight"].norm == 5.0


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
def test_float64_is_taken_as_it_is(scale):
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.float64) * scale)
    parameter.grad = torch.randn(5, 3, dtype=torch.float64) * scale
    rows = ParameterAccumulators({"weight": parameter}, {"weight"}, torch.device("cpu"))
    before = parameter.detach().clone()
    with torch.no_grad():
        rows.record([parameter])
        parameter.sub_(0.1 * parameter.grad)
        rows.finish()
    found = rows.statistics()["weight"]
    grad = parameter.grad.numpy()
    assert found.norm == pytest.approx(np.linalg.norm(grad), rel=1e-9)
    assert found.weight_norm == pytest.approx(before.norm().item(), rel=1e-9)
    assert found.update_norm == pytest.approx(0.1 * np.linalg.norm(grad), rel=1e-6)
    assert found.nonfinite == 0 and found.histogram.counts.sum() == grad.size
    np.testing.assert_array_equal(found.histogram.counts, np.histogram(grad, found.histogram.edges)[0])
