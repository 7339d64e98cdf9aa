from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from bnlightning.writing.layout import charts_of, layout


def test_charts_of_tags():
    assert charts_of(["layer_dead/a", "layer_dead/b", "layer_val_dead/a", "health/dead", "train/loss"]) == {
        ("layer", "train", "dead"),
        ("layer", "val", "dead"),
    }


def test_a_chart_holds_all_layers_of_a_statistic():
    tags = ["param_grad_norm/a.weight", "norm_mean_drift/a", "layer_test_std/a"]
    (value,) = layout(charts_of(tags)).value
    assert value.tag == "custom_scalars__config__"
    read = Layout.FromString(value.tensor.string_val[0])
    assert [(category.title, [chart.title for chart in category.chart]) for category in read.category] == [
        ("Layers", ["layer_std (test)"]),
        ("Batch norm layers", ["norm_mean_drift"]),
        ("Parameters", ["param_grad_norm"]),
    ]
    assert read.category[0].chart[0].multiline.tag == ["layer_test_std/.*"]
