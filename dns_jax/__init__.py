"""Dynamic network surgery for JAX: prune a network while it trains, splice back what matters.

The names here are the method. Baselines are in `pruners`, other importances in `importance`. Files
of networks are in `dns_jax.files`, and what becomes of a pruned network in `dns_jax.inference`.
"""

from dns_jax.densities import global_density, layer_density
from dns_jax.layers import group_by_layer, has_axes, is_kernel, layer_names, match_patterns, role
from dns_jax.masks import (
    Events,
    apply_masks,
    count_events,
    count_kept,
    find_empty_layers,
    init_masks,
    soft_threshold,
    update_masks,
)
from dns_jax.metrics import Size, Sizes, measure_sizes
from dns_jax.optimizers import average_weights, caffe_sgd
from dns_jax.prune import prune_to
from dns_jax.schedules import (
    caffe_exp,
    caffe_inv,
    caffe_multistep,
    caffe_poly,
    caffe_sigmoid,
    caffe_step,
    log_linear_density,
    polynomial_density,
    update_at,
    update_probability,
)
from dns_jax.sparse_training import slow_pruned
from dns_jax.stacking import unstack
from dns_jax.structures import Blocks, NofM, Structure, Units
from dns_jax.thresholds import Statistics, magnitude_statistics, mean_std
from dns_jax.transformation import SurgeryState, freeze, get_masks, masked_value_and_grad, surgery
from dns_jax.typing import (
    Importance,
    LayerOf,
    Masks,
    Params,
    Rule,
    Schedule,
    TakesPart,
    ThresholdRule,
    Thresholds,
)

__version__ = '0.1.0'

__all__ = [
    'Blocks',
    'Events',
    'Importance',
    'LayerOf',
    'Masks',
    'NofM',
    'Params',
    'Rule',
    'Schedule',
    'Size',
    'Sizes',
    'Statistics',
    'Structure',
    'SurgeryState',
    'TakesPart',
    'ThresholdRule',
    'Thresholds',
    'Units',
    'apply_masks',
    'average_weights',
    'caffe_exp',
    'caffe_inv',
    'caffe_multistep',
    'caffe_poly',
    'caffe_sgd',
    'caffe_sigmoid',
    'caffe_step',
    'count_events',
    'count_kept',
    'find_empty_layers',
    'freeze',
    'get_masks',
    'global_density',
    'group_by_layer',
    'has_axes',
    'init_masks',
    'is_kernel',
    'layer_density',
    'layer_names',
    'log_linear_density',
    'magnitude_statistics',
    'masked_value_and_grad',
    'match_patterns',
    'mean_std',
    'measure_sizes',
    'polynomial_density',
    'prune_to',
    'role',
    'slow_pruned',
    'soft_threshold',
    'surgery',
    'unstack',
    'update_at',
    'update_masks',
    'update_probability',
]
