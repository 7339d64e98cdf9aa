import io
import threading

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bnlightning.writing.canvas import draw_png, own_settings

SETTINGS = {
    "text.usetex": True,
    "savefig.dpi": 300,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "figure.dpi": 33,
    "axes.grid": True,
    "font.family": ["a font that nobody has"],
    "font.size": 40,
    "figure.constrained_layout.use": True,
    "image.cmap": "hot",
    "hatch.linewidth": 9.0,
    "axes.facecolor": "black",
    "text.color": "red",
    "path.sketch": (1.0, 100.0, 2.0),
}


def draw():
    figure = Figure(figsize=(2, 1), dpi=50)
    axes = figure.add_subplot()
    axes.plot([1, 2], label="a")
    axes.set_title("a_b $x$")
    axes.imshow([[0, 1]])
    return figure


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_the_user_changes_a_picture(setting):
    expected = draw_png(draw)
    with matplotlib.rc_context({setting: SETTINGS[setting]}):
        before = dict.copy(matplotlib.rcParams)
        assert draw_png(draw) == expected
        assert dict.copy(matplotlib.rcParams) == before


def test_the_size_is_that_of_the_png():
    png, width, height = draw_png(draw)
    assert Image.open(io.BytesIO(png)).size == (width, height) == (100, 50)


def test_settings_are_back_after_an_error():
    with matplotlib.rc_context({"font.size": 41}):
        with pytest.raises(RuntimeError, match="stop"), own_settings():
            assert matplotlib.rcParams["font.size"] == 10
            raise RuntimeError("stop")
        assert matplotlib.rcParams["font.size"] == 41


def test_threads_that_draw_do_not_restore_each_others_settings():
    inside, may_leave = threading.Event(), threading.Event()

    def hold():
        with own_settings():
            inside.set()
            may_leave.wait(10)

    with matplotlib.rc_context({"font.size": 41}):
        holding, waiting = threading.Thread(target=hold), threading.Thread(target=draw_png, args=(draw,))
        holding.start()
        inside.wait(10)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        may_leave.set()
        holding.join(10)
        waiting.join(10)
        assert matplotlib.rcParams["font.size"] == 41
