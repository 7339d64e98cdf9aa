import io
import sys
import types

import numpy as np
import pytest
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.loggers import CSVLogger, Logger
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from bnlightning.monitors.counting.histogram import Histogram
from bnlightning.writing import writers
from bnlightning.writing.summaries import Summaries
from bnlightning.writing.writers import register_writer, summary_writers, write, writer_of


def draw():
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([1, 2])
    return figure


def summaries(step=7, **more):
    histogram = Histogram(np.array([-1.0, 0.0, 2.0]), np.array([3, 4]), 1.5, 9.0)
    scalars = {"a/x": 1.5, "b/y": -2.0}
    return Summaries(step, scalars, {"hist/x": histogram}, {"text": "layer1"}, {"pictures/x": draw}, **more)


class OtherLogger(Logger):
    """Somebody else's, with nothing but what Lightning asks of a logger."""

    name, version = "other", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((metrics, step))

    def log_hyperparams(self, params):
        pass


def test_tensorboard_gets_everything(tmp_path):
    trainer = quiet_trainer(tmp_path)
    write(trainer.loggers, summaries())
    trainer.logger.finalize("success")
    # Behind the end of a fit the file is opened again.
    write(trainer.loggers, summaries(8))
    trainer.logger.finalize("success")
    events = read_events(tmp_path)
    assert scalar(events, "a/x") == {7: 1.5, 8: 1.5} and scalar(events, "b/y") == {7: -2.0, 8: -2.0}
    first = events.Histograms("hist/x")[0]
    assert (first.step, first.histogram_value.min, first.histogram_value.max) == (7, -1.0, 2.0)
    assert (first.histogram_value.bucket_limit, first.histogram_value.bucket) == ([0.0, 2.0], [3.0, 4.0])
    assert (first.histogram_value.sum, first.histogram_value.sum_squares) == (1.5, 9.0)
    assert events.Tensors("text/text_summary")[0].tensor_proto.string_val[0].decode() == "layer1"
    image = events.Images("pictures/x")[0]
    assert (image.step, image.width, image.height) == (7, 100, 50)
    decoded = imread(io.BytesIO(image.encoded_image_string), format="png")
    assert decoded.shape[:2] == (50, 100)


def test_numbers_that_tensorboard_cannot_hold_become_neither_zero_nor_infinite(tmp_path):
    numbers = {"huge": -1e60, "tiny": 1e-60, "zero": 0.0, "inf": float("inf"), "one": 1.0}
    with SummaryWriter(tmp_path) as writer:
        write([writer], Summaries(0, numbers))
    found = {name: scalar(read_events(tmp_path), name)[0] for name in numbers}
    largest, smallest = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)
    assert found == {"huge": -largest, "tiny": smallest, "zero": 0.0, "inf": float("inf"), "one": 1.0}


def test_other_loggers_get_the_scalars(tmp_path):
    loggers = [OtherLogger(), CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)]
    write(loggers, summaries())
    assert loggers[0].logged == [({"a/x": 1.5, "b/y": -2.0}, 7)]
    loggers[1].save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["a/x,b/y,step", "1.5,-2.0,7"]
    write(loggers, Summaries(3, texts={"only": "a text"}))
    assert len(loggers[0].logged) == 1


def test_weights_and_biases_gets_histograms_and_pictures(monkeypatch):
    class WandbLogger(OtherLogger):
        """Lightning's own needs the package; it hands on whatever it is given."""

    class Kept:
        def __init__(self, *args, **options):
            self.args, self.options = args, options

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Histogram=Kept, Image=Kept))
    logger = WandbLogger()
    write([logger], summaries())
    ((logged, step),) = logger.logged
    assert step == 7 and logged["a/x"] == 1.5 and logged["text"] == "layer1"
    assert logged["hist/x"].options == {"np_histogram": ([3, 4], [-1.0, 0.0, 2.0])}
    assert logged["pictures/x"].args[0].size == (100, 50)


DESCRIPTIONS = {"a/x": "what x is", "hist/x": "what it shows", "text": "what it says", "pictures/x": "what is drawn"}


def descriptions(directory):
    """By tag, what an event file says of its values, one text each time that there is one."""
    found = {}
    for file in sorted(directory.glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                texts = found.setdefault(value.tag.removesuffix("/text_summary"), [])
                if value.metadata.summary_description:
                    texts.append(value.metadata.summary_description)
    return found


def test_a_tag_is_described_once_in_an_event_file(tmp_path):
    trainer = quiet_trainer(tmp_path)
    for step in range(3):
        write(trainer.loggers, summaries(step, describe=DESCRIPTIONS.get))
    trainer.logger.finalize("success")
    found = descriptions(tmp_path)
    assert {tag: [text] for tag, text in DESCRIPTIONS.items()} == {tag: found[tag] for tag in DESCRIPTIONS}
    assert found["b/y"] == []


def test_a_summary_writer_is_a_logger(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        write([writer], summaries(describe=DESCRIPTIONS.get))
    assert scalar(read_events(tmp_path), "a/x") == {7: 1.5}
    assert descriptions(tmp_path)["a/x"] == ["what x is"]


def test_all_layers_of_a_statistic_are_one_chart(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        write([writer], Summaries(0, {"layer_dead/a": 0.5, "layer_dead/b": 0.0, "health/dead": 0.25}))
        write([writer], Summaries(1, {"layer_dead/a": 0.5, "layer_val_dead/a": 0.0, "param_grad_norm/a.weight": 1.0}))
        write([writer], Summaries(2, {"layer_dead/a": 0.5}))
    events = read_events(tmp_path)
    layouts = [
        Layout.FromString(item.tensor_proto.string_val[0]) for item in events.Tensors("custom_scalars__config__")
    ]
    # One when the first chart comes, one when others do.
    assert len(layouts) == 2
    charts = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layouts[-1].category
    }
    assert charts == {
        "Layers": {
            "layer_dead": ["layer_dead/.*"],
            "layer_dead (validation)": ["layer_val_dead/.*"],
        },
        "Parameters": {"param_grad_norm": ["param_grad_norm/.*"]},
    }


class Printer:
    """A logger that is none of Lightning's."""

    def __init__(self):
        self.told = []


class LoudPrinter(Printer):
    pass


@pytest.fixture
def registered(monkeypatch):
    """Registers for the test only."""
    monkeypatch.setattr(writers, "_WRITERS", dict(writers._WRITERS))
    return register_writer


def test_a_user_registers_a_logger_from_outside(registered):
    printer = LoudPrinter()
    with pytest.raises(ValueError, match=r"logger=LoudPrinter is not known: .*register_writer"):
        write([printer], summaries())
    registered(Printer, lambda printer, told: printer.told.append((told.step, dict(told.scalars))))
    write([printer], summaries())
    assert printer.told == [(7, {"a/x": 1.5, "b/y": -2.0})]


def test_the_nearest_class_decides(registered):
    def loud(printer, told):
        printer.told.append("loud")

    registered("Printer", lambda printer, told: printer.told.append("quiet"))
    registered(LoudPrinter, loud)
    assert writer_of(LoudPrinter()) is loud
    # The class of any package that has this name, such as lightning's and pytorch_lightning's.
    assert writer_of(type("TensorBoardLogger", (), {})()) is writers.write_to_tensorboard_logger


def fail(*_, **__):
    raise RuntimeError("no latex")


class Failing(OtherLogger):
    log_metrics = fail


def test_what_is_only_for_show_takes_nothing_with_it(tmp_path, monkeypatch):
    told = summaries()
    told.pictures["pictures/broken"] = fail
    told.texts["broken"] = object()
    told.histograms["hist/broken"] = None
    told.describe = lambda tag: fail() if tag == "b/y" else DESCRIPTIONS.get(tag)
    monkeypatch.setattr(writers, "layout", fail)
    told.scalars["layer_dead/a"] = 0.5
    with SummaryWriter(tmp_path) as writer, pytest.warns(UserWarning) as caught:
        write([writer], told)
        write([writer], told)
    messages = sorted(str(warning.message) for warning in caught)
    # Each is told once.
    assert [message.split(":")[0].removeprefix("A monitor could not ") for message in messages] == [
        "describe b/y",
        "draw pictures/broken",
        "lay out the Custom Scalars tab",
        "write the histogram hist/broken",
        "write the text broken",
    ]
    assert all(message.endswith("The training goes on without it.") for message in messages)
    assert "draw pictures/broken: RuntimeError: no latex." in messages[1]
    events = read_events(tmp_path)
    assert scalar(events, "a/x") == {7: 1.5} and scalar(events, "b/y") == {7: -2.0}
    assert events.Images("pictures/x") and events.Histograms("hist/x")
    assert descriptions(tmp_path)["a/x"] == ["what x is"]


def test_a_logger_that_fails_is_told_of_once_and_the_others_are_told_everything():
    other = OtherLogger()
    told = summaries()
    with pytest.warns(UserWarning, match="^A monitor could not write to Failing: RuntimeError: no latex") as caught:
        write([Failing(), other], told)
        write([Failing(), other], told)
    assert len(caught) == 1 and len(other.logged) == 2


def test_ctrl_c_is_no_mishap():
    def interrupt(logger, told):
        raise KeyboardInterrupt

    logger = type("Interrupted", (OtherLogger,), {"log_metrics": lambda *_, **__: interrupt(None, None)})()
    with pytest.raises(KeyboardInterrupt):
        write([logger], summaries())


def test_the_summary_writers_are_those_of_tensorboard_loggers(tmp_path):
    trainer = quiet_trainer(tmp_path)
    with SummaryWriter(tmp_path / "other") as writer:
        assert summary_writers([OtherLogger(), trainer.logger, writer]) == [trainer.logger.experiment, writer]


def test_an_unknown_logger_gets_names_that_any_takes_and_a_file_gets_the_tags(tmp_path):
    loggers = [OtherLogger(), CSVLogger(tmp_path, name="", version="")]
    write(loggers, Summaries(3, {"layer_mean/net.act#1": 1.0, "layer_mean/net.act1": 2.0}))
    assert loggers[0].logged == [({"layer_mean/net.act call 1": 1.0, "layer_mean/net.act1": 2.0}, 3)]
    loggers[1].save()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "layer_mean/net.act#1,layer_mean/net.act1,step"
