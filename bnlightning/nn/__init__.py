"""Plain torch: layers, networks, functions. No Lightning, no logging, no ranks."""

from bnlightning.nn.batch_norm import CONVENTIONS as CONVENTIONS
from bnlightning.nn.batch_norm import BatchNorm1d as BatchNorm1d
from bnlightning.nn.batch_norm import BatchNorm2d as BatchNorm2d
from bnlightning.nn.batch_norm import BatchNorm3d as BatchNorm3d
from bnlightning.nn.batch_norm import Convention as Convention
from bnlightning.nn.batch_norm import batch_statistics as batch_statistics
from bnlightning.nn.networks import ACTIVATIONS as ACTIVATIONS
from bnlightning.nn.networks import MLP as MLP
from bnlightning.nn.networks import get_act_layer as get_act_layer
from bnlightning.nn.networks import init_normal_ as init_normal_
from bnlightning.nn.norm import NORM_LAYERS as NORM_LAYERS
from bnlightning.nn.norm import get_norm_layer as get_norm_layer
