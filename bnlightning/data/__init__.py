"""LightningDataModules, and the batches that they serve."""

from bnlightning.data.batches import TensorBatches as TensorBatches
from bnlightning.data.mnist import MNISTDataModule as MNISTDataModule
from bnlightning.data.points import PointsDataModule as PointsDataModule
from bnlightning.data.synthetic import SyntheticRegressionDataModule as SyntheticRegressionDataModule
