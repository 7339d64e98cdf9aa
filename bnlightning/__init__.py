"""See what happens inside a network while it trains, swap its normalisation, show what batch normalisation does."""

from importlib import metadata

from bnlightning._conf import CONF_DIR
from bnlightning.callbacks import (
    ActivationMonitor,
    BatchNormMonitor,
    BatchNormSync,
    GradientMonitor,
    InitialWeights,
    PredictionMonitor,
    PreemptionCheckpoint,
    PublishedCurve,
    PublishedValues,
    SwapNorm,
    TrainingProgressBar,
)
from bnlightning.compare.comparison import Comparison, compare_runs
from bnlightning.data import MNISTDataModule, PointsDataModule, SyntheticRegressionDataModule
from bnlightning.models import LitClassifier, LitConvClassifier, LitMovingAverage, LitRegressor
from bnlightning.nn import MLP, BatchNorm1d, BatchNorm2d, BatchNorm3d, Convention, ConvNet, SwapReport, swap_norm, tap

__version__ = metadata.version("bnlightning")

__all__ = [
    "CONF_DIR",
    "MLP",
    "ActivationMonitor",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormMonitor",
    "BatchNormSync",
    "Comparison",
    "ConvNet",
    "Convention",
    "GradientMonitor",
    "InitialWeights",
    "LitClassifier",
    "LitConvClassifier",
    "LitMovingAverage",
    "LitRegressor",
    "MNISTDataModule",
    "PointsDataModule",
    "PredictionMonitor",
    "PreemptionCheckpoint",
    "PublishedCurve",
    "PublishedValues",
    "SwapNorm",
    "SwapReport",
    "SyntheticRegressionDataModule",
    "TrainingProgressBar",
    "compare_runs",
    "swap_norm",
    "tap",
]
