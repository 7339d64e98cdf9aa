"""LightningDataModules."""

from bnlightning.data.batches import TensorBatches as TensorBatches
from bnlightning.data.synthetic import SyntheticRegressionDataModule as SyntheticRegressionDataModule
