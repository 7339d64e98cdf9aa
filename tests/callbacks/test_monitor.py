from types import SimpleNamespace

import pytest
from helpers import MemoryLogger

from bnlightning.callbacks._monitor import MonitorCallback
from bnlightning.monitors.counting.layer_statistics import layer_catalogue
from bnlightning.monitors.record import Entry, Record


class Watching(MonitorCallback):
    """The least that a monitor's callback is."""

    max_layers = 2

    def on_train_start(self, trainer, pl_module):
        self._write(trainer, Record(3, layers={"net": Entry({"dead": 0.5})}, health={"dead": 0.5}))

    def on_train_end(self, trainer, pl_module):
        self._write(trainer, None)

    def on_fit_start(self, trainer, pl_module):
        self._warn_of_nothing("modules", "net.*", pl_module, "choose others.")
        self._warn_of_left_out("max_layers", 2, ["c", "d", "e"], "layers", "others by `modules`.")


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_rank_tells_the_loggers_and_no_other(is_first):
    logger = MemoryLogger()
    trainer = SimpleNamespace(is_global_zero=is_first, loggers=[logger])
    callback = Watching(10, [layer_catalogue()])
    callback.on_train_start(trainer, None)
    callback.on_train_end(trainer, None)
    assert logger.scalars == ({("layer_dead/net", 3): 0.5, ("health/dead", 3): 0.5} if is_first else {})


def test_what_is_not_watched_is_told_by_argument_number_and_cure():
    with pytest.warns(UserWarning) as caught:
        Watching(10, []).on_fit_start(None, SimpleNamespace())
    nothing, left_out = (str(warning.message) for warning in caught)
    assert nothing == "Watching(modules='net.*') finds nothing to watch in SimpleNamespace: choose others."
    assert left_out == (
        "Watching(max_layers=2) leaves out 3 of 5 layers from c on: raise max_layers, or choose others by `modules`."
    )


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.5, True])
def test_a_distance_that_is_none_is_refused(every_n_steps):
    with pytest.raises(ValueError, match=f"every_n_steps={every_n_steps} is not possible"):
        Watching(every_n_steps, [])
