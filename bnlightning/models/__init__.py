"""LightningModules to run and to subclass."""

from bnlightning.models.regression import LitRegressor as LitRegressor
