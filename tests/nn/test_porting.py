import numpy as np
import pytest
import torch

from bnlightning import BatchNorm1d, BatchNorm2d
from bnlightning.nn import from_caffe, from_keras, to_caffe, to_keras

C = 3
GENERATOR = np.random.default_rng(0)


def keras_variables():
    return {
        "gamma": GENERATOR.normal(size=C).astype(np.float32),
        "beta": GENERATOR.normal(size=C).astype(np.float32),
        "moving_mean": GENERATOR.normal(size=C).astype(np.float32),
        "moving_variance": GENERATOR.uniform(0.1, 2, size=C).astype(np.float32),
    }


class CaffeBatchNorm:
    """Caffe's own bookkeeping (batch_norm_layer.cpp), in float64, with a Scale layer behind."""

    def __init__(self, fraction):
        self.fraction, self.mean, self.var, self.total = fraction, np.zeros(C), np.zeros(C), np.zeros(1)
        self.gamma, self.beta = np.array([1.0, 2.0, -1.0]), np.array([0.5, 0.0, 3.0])

    def train(self, x):
        n = len(x)
        self.total = self.fraction * self.total + 1
        self.mean = self.fraction * self.mean + x.mean(axis=0)
        self.var = self.fraction * self.var + n / (n - 1) * x.var(axis=0)

    def evaluate(self, x):
        factor = 0 if self.total == 0 else 1 / self.total
        return (x - factor * self.mean) / np.sqrt(factor * self.var + 1e-5) * self.gamma + self.beta


@pytest.mark.parametrize("scope", ["{}", "{}:0", "model/bn_1/{}:0"])
def test_keras_variables_give_kerass_output(scope):
    variables = keras_variables()
    layer = BatchNorm1d(C, convention="keras").eval()
    layer.load_state_dict(from_keras({scope.format(name): value for name, value in variables.items()}), strict=True)
    x = GENERATOR.normal(size=(5, C))
    want = variables["gamma"] * (x - variables["moving_mean"]) / np.sqrt(variables["moving_variance"] + 1e-3)
    got = layer(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(got, want + variables["beta"], rtol=1e-5, atol=1e-6)
    back = to_keras(layer.state_dict())
    assert back.keys() == variables.keys()
    assert all(np.array_equal(back[name], variables[name]) for name in variables)


def test_what_keras_leaves_out():
    variables = keras_variables()
    del variables["gamma"]
    state = from_keras(variables)
    assert state["weight"].tolist() == [1.0] * C and state["bias"].tolist() == variables["beta"].tolist()
    shift = variables.pop("beta")
    assert from_keras(variables | {"gamma": shift})["bias"].tolist() == [0.0] * C
    BatchNorm2d(C, affine=False).load_state_dict(from_keras(variables), strict=True)


def test_the_arrays_are_copied():
    variables = keras_variables()
    state = from_keras(variables)
    state["weight"].zero_()
    assert np.all(variables["gamma"] != 0)
    layer = BatchNorm1d(C)
    to_keras(layer.state_dict())["gamma"][:] = 7
    assert layer.weight.tolist() == [1.0] * C


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"gama": np.ones(C)}, "variables has 'gama': give gamma, beta, moving_mean, moving_variance of one layer"),
        ({"a/gamma": np.ones(C), "b/gamma": np.ones(C)}, "variables has 'b/gamma'.*each once"),
        ({"moving_mean": np.ones(C)}, "lacks moving_variance"),
    ],
)
def test_other_keras_variables_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        from_keras(variables)


@pytest.mark.parametrize("batches", [0, 1, 7, 3000])
@pytest.mark.parametrize("fraction", [0.999, 0.9])
def test_caffe_blobs_give_caffes_output_and_training_goes_on(batches, fraction):
    caffe = CaffeBatchNorm(fraction)
    for _ in range(batches):
        caffe.train(GENERATOR.normal(size=(4, C)) + 2)
    state = from_caffe([caffe.mean, caffe.var, caffe.total], [caffe.gamma, caffe.beta], momentum=1 - fraction)
    layer = BatchNorm1d(C, convention="caffe", momentum=1 - fraction, dtype=torch.float64)
    layer.load_state_dict(state, strict=True)
    for _ in range(3):
        x = GENERATOR.normal(size=(4, C)) * 3
        caffe.train(x)
        layer.train()(torch.tensor(x))
        # In float64 (1 - fraction) itself is rounded; a count found again can be off where its share is below 1e-7.
        np.testing.assert_allclose(layer.eval()(torch.tensor(x)).detach().numpy(), caffe.evaluate(x), rtol=1e-6)
    blobs, scale = to_caffe(layer.state_dict(), momentum=1 - fraction)
    for got, want in zip([*blobs, *scale], [caffe.mean, caffe.var, caffe.total, caffe.gamma, caffe.beta], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_statistics_without_a_count_get_the_weight_of_one_batch():
    layer = BatchNorm1d(C)
    layer.running_var.fill_(4.0)
    blobs, scale = to_caffe(layer.state_dict())
    assert [blob.tolist() for blob in blobs] == [[0.0] * C, [4.0] * C, [1.0]] and len(scale) == 2
    assert blobs[0].dtype == np.float32


def test_caffes_statistics_without_a_weight_are_zero():
    state = from_caffe([np.full(C, 3.0), np.full(C, 6.0), np.zeros(1)])
    assert state["running_mean"].tolist() == state["running_var"].tolist() == [0.0] * C
    assert state["num_batches_tracked"] == 0 and "weight" not in state


def test_what_is_not_a_layer_is_refused():
    with pytest.raises(ValueError, match="variables=list is not possible: give arrays by name"):
        from_keras([np.ones(C)] * 4)
    whole = torch.nn.Sequential(BatchNorm1d(C)).state_dict()
    for function in (to_keras, to_caffe):
        with pytest.raises(ValueError, match=r"state_dict has 0.weight, 0.bias.*: give that of one batch norm layer"):
            function(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.ones(C)] * 2,), r"batch_norm has 2 and scale 0 blob\(s\)"),
        (([np.ones(C)] * 3, [np.ones(C)] * 3), r"batch_norm has 3 and scale 3 blob\(s\)"),
    ],
)
def test_other_blobs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_caffe(*arguments)


@pytest.mark.parametrize("total", [999.0, -5.0])
def test_a_sum_of_weights_that_cannot_be_is_refused(total):
    with pytest.raises(ValueError, match=rf"batch_norm\[2\]={total:g} is not possible with momentum=0.1"):
        from_caffe([np.ones(C), np.ones(C), np.array([total])], momentum=0.1)


def test_caffes_shapes_and_a_full_sum_of_weights():
    state = from_caffe([np.ones((1, C, 1, 1)), np.ones((1, C, 1, 1)), np.array([[1000.0]], np.float32)])
    assert state["running_mean"].shape == (C,) and state["num_batches_tracked"] > 10_000
    blobs, _ = to_caffe(state)
    assert blobs[2] == pytest.approx(1000.0)


@pytest.mark.parametrize("momentum", [0, 1, 1.5])
def test_caffes_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match=rf"momentum={momentum} is not possible"):
        to_caffe(BatchNorm1d(C).state_dict(), momentum=momentum)
