"""Batch norm layers, networks and the functions that change them, in plain torch.

Nothing here knows Lightning or a logger. Only the functions that merge statistics over ranks use ``torch.distributed``.
"""

from bnlightning.nn.batch_norm import BatchNorm1d as BatchNorm1d
from bnlightning.nn.batch_norm import BatchNorm2d as BatchNorm2d
from bnlightning.nn.batch_norm import BatchNorm3d as BatchNorm3d
from bnlightning.nn.batch_norm_act import BatchNormAct1d as BatchNormAct1d
from bnlightning.nn.batch_norm_act import BatchNormAct2d as BatchNormAct2d
from bnlightning.nn.batch_norm_act import BatchNormAct3d as BatchNormAct3d
from bnlightning.nn.convention import CONVENTIONS as CONVENTIONS
from bnlightning.nn.convention import Convention as Convention
from bnlightning.nn.networks import ACTIVATIONS as ACTIVATIONS
from bnlightning.nn.networks import MLP as MLP
from bnlightning.nn.networks import ConvNet as ConvNet
from bnlightning.nn.networks import get_act_layer as get_act_layer
from bnlightning.nn.networks import init_normal_ as init_normal_
from bnlightning.nn.networks import init_variance_scaling_ as init_variance_scaling_
from bnlightning.nn.norm import NORM_LAYERS as NORM_LAYERS
from bnlightning.nn.norm import get_norm_layer as get_norm_layer
from bnlightning.nn.porting import from_caffe as from_caffe
from bnlightning.nn.porting import from_keras as from_keras
from bnlightning.nn.porting import to_caffe as to_caffe
from bnlightning.nn.porting import to_keras as to_keras
from bnlightning.nn.recompute import recompute_statistics as recompute_statistics
from bnlightning.nn.statistics import StatisticsHandle as StatisticsHandle
from bnlightning.nn.statistics import accumulate_statistics as accumulate_statistics
from bnlightning.nn.statistics import batch_of_one as batch_of_one
from bnlightning.nn.statistics import batch_statistics as batch_statistics
from bnlightning.nn.statistics import frozen_statistics as frozen_statistics
from bnlightning.nn.statistics import running_statistics as running_statistics
from bnlightning.nn.statistics import skip_nonfinite_batches as skip_nonfinite_batches
from bnlightning.nn.statistics import skip_recomputed_batches as skip_recomputed_batches
from bnlightning.nn.swap import SwappedLayer as SwappedLayer
from bnlightning.nn.swap import SwapReport as SwapReport
from bnlightning.nn.swap import swap_norm as swap_norm
from bnlightning.nn.tap import tap as tap
