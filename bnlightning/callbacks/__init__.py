"""Lightning callbacks for any LightningModule."""

from bnlightning.callbacks.activation_monitor import ActivationMonitor as ActivationMonitor
from bnlightning.callbacks.batch_norm_monitor import BatchNormMonitor as BatchNormMonitor
from bnlightning.callbacks.gradient_monitor import GradientMonitor as GradientMonitor
from bnlightning.callbacks.initial_weights import InitialWeights as InitialWeights
from bnlightning.callbacks.prediction_monitor import PredictionMonitor as PredictionMonitor
from bnlightning.callbacks.preemption_checkpoint import PreemptionCheckpoint as PreemptionCheckpoint
from bnlightning.callbacks.progress_bar import TrainingProgressBar as TrainingProgressBar
from bnlightning.callbacks.published_values import PublishedCurve as PublishedCurve
from bnlightning.callbacks.published_values import PublishedValues as PublishedValues
from bnlightning.callbacks.swap_norm import BatchNormSync as BatchNormSync
from bnlightning.callbacks.swap_norm import SwapNorm as SwapNorm
from bnlightning.monitors.catching.selection import saturation_limits as saturation_limits
