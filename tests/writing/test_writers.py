import io
import sys
import types

import numpy as np
import pytest
from helpers import quiet_trainer, read_events, scalar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.image import imread

from bnlightning.monitors.counting.histogram import Histogram
from bnlightning.writing.writers import Publication


def draw():
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([1, 2])
    return figure


def publication(step=7):
    histogram = Histogram(np.array([-1.0, 0.0, 2.0]), np.array([3, 4]), 1.5, 9.0)
    return Publication(step, {"a/x": 1.5, "b/y": -2.0}, {"hist/x": histogram}, {"text": "layer1"}, {"pictures/x": draw})


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
    publication().write(trainer)
    trainer.logger.finalize("success")
    # Behind the end of a fit the file is opened again.
    publication(8).write(trainer)
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


def test_other_loggers_get_the_scalars(tmp_path):
    loggers = [OtherLogger(), CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)]
    publication().write(quiet_trainer(logger=loggers))
    assert loggers[0].logged == [({"a/x": 1.5, "b/y": -2.0}, 7)]
    loggers[1].save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["a/x,b/y,step", "1.5,-2.0,7"]
    Publication(3, texts={"only": "a text"}).write(quiet_trainer(logger=loggers))
    assert len(loggers[0].logged) == 1


def test_weights_and_biases_gets_histograms_and_pictures(monkeypatch):
    class WandbLogger(OtherLogger):
        """Lightning's own needs the package; it hands on whatever it is given."""

    class Kept:
        def __init__(self, *args, **options):
            self.args, self.options = args, options

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Histogram=Kept, Image=Kept))
    logger = WandbLogger()
    publication().write(quiet_trainer(logger=logger))
    ((logged, step),) = logger.logged
    assert step == 7 and logged["a/x"] == 1.5 and logged["text"] == "layer1"
    assert logged["hist/x"].options == {"np_histogram": ([3, 4], [-1.0, 0.0, 2.0])}
    assert isinstance(logged["pictures/x"].args[0], Figure)


@pytest.mark.parametrize("loggers", [False, "rank 1"])
def test_nothing_happens_without_a_logger_or_on_another_rank(loggers, tmp_path, monkeypatch):
    trainer = quiet_trainer(logger=TensorBoardLogger(tmp_path) if loggers else False)
    if loggers:
        monkeypatch.setattr(type(trainer), "is_global_zero", False)
    publication().write(trainer)
    assert not list(tmp_path.iterdir())
