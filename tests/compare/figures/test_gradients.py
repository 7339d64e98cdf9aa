import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from bnlightning.compare.figures import draw_gradients


def test_gradients_stand_in_maps(depths):
    drawn = draw_gradients(depths, "val/loss", "depths", [], columns=["activation", "depth"])
    *maps, bar = drawn.axes
    assert len(maps) == 4 and bar.get_ylabel().startswith("norm of the gradient")
    headings = [text.get_text() for axes in maps for text in axes.texts]
    assert sorted(headings) == ["sigmoid, depth = 11", "sigmoid, depth = 2"]
    labels = {text.get_text() for text in drawn.texts}
    assert {"no norm", "batch norm (ours)"} <= labels
    deep = next(axes for axes in maps if len(axes.get_yticks()) > 5 and axes.get_xlabel())
    run = depths["custom_11"][0]
    layers = [f"net.linear{index}" for index in range(1, 12)] + ["net.output"]
    norms = [run.scalars[f"param_grad_norm/{layer}.weight"] for layer in layers]
    colours, red = (child for child in deep.get_children() if isinstance(child, QuadMesh))
    np.testing.assert_allclose(colours.get_array(), np.log10([values for _, values in norms]), rtol=1e-6)
    assert red.get_array().mask.all() and deep.yaxis_inverted()
    assert deep.get_yticklabels()[0].get_text() == "linear1" and deep.get_yticklabels()[-1].get_text() == "output"
    first, last = (norms[-1][1][step] / norms[0][1][step] for step in (0, -1))
    assert deep.get_title() == f"last/first layer: {first:.2g} → {last:.2g}"


def test_gradients_that_are_not_finite_are_red(depths):
    drawn = draw_gradients(depths, "val/loss", "depths", [])
    (diverged,) = (axes for axes in drawn.axes if axes.get_title().endswith("NaN"))
    run = depths["none_2"][0]
    _, red = (child for child in diverged.get_children() if isinstance(child, QuadMesh))
    shares = run.scalars["param_grad_nonfinite/net.linear1.weight"]
    steps = run.scalars["health/grad_nonfinite"][0]
    assert len(shares[0]) and (~red.get_array().mask[0]).tolist() == [step in shares[0] for step in steps]


def test_a_gradient_of_zero_is_no_gap(tmp_path, write_run, read_variants):
    gradients = {"param_grad_norm/net.linear1.weight": [0.0, 1e-3], "param_grad_norm/net.output.weight": [1.0, 1.0]}
    write_run(tmp_path / "a", {"norm": "none", "depth": 1}, **gradients)
    drawn = draw_gradients(read_variants(tmp_path), "val/loss", "", [], columns=("depth",))
    colours, _ = (child for child in drawn.axes[0].get_children() if isinstance(child, QuadMesh))
    zero, small = colours.get_array()[0].tolist()
    assert zero < colours.norm.vmin and small == pytest.approx(-3)
    assert colours.to_rgba(colours.get_array())[0, 0].tolist() == [*colours.cmap.get_under()]
    assert drawn.axes[0].get_title() == "last/first layer: inf → 1e+03"


def test_a_run_that_explodes_leaves_colours_to_the_others(tmp_path, write_run, read_variants):
    for norm, norms in (("none", [1.0, 1e30]), ("custom", [1.0, 0.01])):
        gradients = {"param_grad_norm/net.linear1.weight": norms, "param_grad_norm/net.output.weight": [1.0, 0.1]}
        write_run(tmp_path / norm, {"norm": norm, "depth": 1}, **gradients)
    drawn = draw_gradients(read_variants(tmp_path), "val/loss", "", [], columns=("depth",))
    meshes = [next(c for c in axes.get_children() if isinstance(c, QuadMesh)) for axes in drawn.axes[:2]]
    assert len({(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes}) == 1
    assert meshes[0].norm.vmin < -1 and meshes[0].norm.vmax == pytest.approx(6, abs=0.1)


def test_runs_without_gradients_are_named(tmp_path, write_run, read_variants):
    write_run(tmp_path / "a", {"norm": "none", "depth": 1}, val__loss=[1.0])
    with pytest.raises(ValueError, match=r"no run has param_grad_norm/<path>.weight .*GradientMonitor"):
        draw_gradients(read_variants(tmp_path), "val/loss", "", [], columns=("depth",))


def test_variants_that_differ_in_something_else_are_named(sweep):
    with pytest.raises(ValueError, match="have the same norm, activation, depth"):
        draw_gradients(sweep, "val/loss", "", [])


def test_one_run_is_a_sweep_of_one(depths, tmp_path):
    drawn = draw_gradients({"custom": depths["custom_2"]}, "val/loss", "one", [])
    assert isinstance(drawn, Figure)
    drawn.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
