from lightning.pytorch.loggers import MLFlowLogger
from matplotlib.figure import Figure

from bnlightning.writing.summaries import Summaries
from bnlightning.writing.writers import write


class Client:
    """What the writer asks of MLflow's client."""

    def __init__(self):
        self.files = {}

    def log_figure(self, run_id, figure, artifact_file):
        assert isinstance(figure, Figure)
        self.files[artifact_file] = run_id

    def log_text(self, run_id, text, artifact_file):
        self.files[artifact_file] = (run_id, text)


class Logger(MLFlowLogger):
    """Lightning's own, which needs the package for everything but its names."""

    run_id = "7"

    def __init__(self):
        self.client, self.logged = Client(), []

    @property
    def experiment(self):
        return self.client

    def log_metrics(self, metrics, step=None):
        self.logged.append((metrics, step))


def test_the_logger_gets_scalars_pictures_and_texts():
    logger = Logger()
    pictures, texts = {"health/layers_by_step#1": Figure}, {"health/watched": "net.1"}
    write([logger], Summaries(3, {"layer_mean/net#1": 2.0}, {}, texts, pictures))
    assert logger.logged == [({"layer_mean/net call 1": 2.0}, 3)]
    assert logger.client.files == {"health/layers_by_step call 1.png": "7", "health/watched.txt": ("7", "net.1")}
    write([logger], Summaries(4, texts={"health/watched": "net.2"}))
    assert len(logger.logged) == 1
