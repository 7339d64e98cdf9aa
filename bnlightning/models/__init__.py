"""LightningModules to run and to subclass."""

from bnlightning.models.moving_average import LitMovingAverage as LitMovingAverage
from bnlightning.models.regression import LitRegressor as LitRegressor
