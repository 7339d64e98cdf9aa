"""Figures of several runs, for ``compare_runs(draw=...)``."""

from bnlightning.compare.figures.gradients import draw_gradients as draw_gradients
from bnlightning.compare.figures.hyperparameters import draw_panels as draw_panels
from bnlightning.compare.figures.hyperparameters import draw_parameter as draw_parameter
