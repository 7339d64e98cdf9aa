"""LightningModules to train as they are and to subclass."""

from bnlightning.models.classification import PLACEMENTS as PLACEMENTS
from bnlightning.models.classification import LitClassifier as LitClassifier
from bnlightning.models.classification import LitConvClassifier as LitConvClassifier
from bnlightning.models.moving_average import LitMovingAverage as LitMovingAverage
from bnlightning.models.regression import LitRegressor as LitRegressor
