"""What prunes: a row of `PRUNERS` for each pruner, made of the numbers that a plan has."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax import importance, pruners, sparse_training
from dns_jax.layers import has_axes, parent_path, role
from dns_jax.typing import Importance, TakesPart
from experiments.baselines.binary_connect import binary_connect
from experiments.baselines.ternary import scaled_signs, ternary
from experiments.training import probes

IMPORTANCES = {
    'magnitude': importance.magnitude,
    'taylor': importance.taylor,
    'chance': importance.chance,
}
QUANTISERS = {
    'none': None,
    'binary': binary_connect(),
    'stochastic_binary': binary_connect(stochastic=True),
    'ternary': ternary(),
    'signs': scaled_signs(),
}
Window = tuple[int, int]  # the first step, and the first after the last


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What is to be pruned, how far and when. Tables are by layer, `*` stands for all layers.

    A layer that a table of rates or densities leaves out stays dense.
    """

    pruner: 'Pruner'
    steps: int  # of surgery
    rates: Mapping[str, float]  # c of each layer; empty where densities say what to keep
    densities: Mapping[str, float]  # of each layer; empty where the network has one
    compression: float | None  # of the network: parameters / kept
    density: float | None  # of the network: kept / parameters
    kernel_density: float | None  # of what takes part: kept / all
    score: str  # how layers share what the network keeps
    windows: Mapping[str, Window]  # the steps with updates of masks
    ramps: Mapping[str, Window]  # the first and the last step of a falling density
    ramp: Callable[..., dns_jax.Schedule]  # of a density, and the first and last step
    every: int  # steps from one choice of thresholds, or round, to the next; 0 follows
    refresh_statistics: int  # steps from one reading of mean and std to the next; 0 reads once
    hysteresis: float
    soft_threshold: bool  # whether kept weights are smaller by it
    update_gamma: float
    update_power: float
    splicing: bool
    rounds: int
    drop: float  # share of the kept connections that are exchanged in a round
    importance: Importance
    structures: Mapping[str, dns_jax.Structure]  # of each layer; others are pruned by weights
    takes_part: TakesPart  # which leaves surgery is done on
    stacked: Mapping[str, int]  # nodes of the network that hold many layers, and the axis
    cut: float  # share of the kept connections that is cut at random, once
    cut_at: int  # the step
    count_returns: bool

    @property
    def options(self) -> dict[str, Any]:
        """What every pruner that orders connections by importance takes."""
        return {
            'takes_part': self.takes_part,
            'importance': self.importance,
            'structure': self.structures,
            'stacked': self.stacked,
        }

    def kept_share(self, params: dns_jax.Params) -> float:
        """Says what of the leaves that take part is to be kept, so that the network is as small.

        Raises:
          ValueError: if what takes no part is more than is to be kept.
        """
        if self.kernel_density:
            return self.kernel_density
        (apart,) = jax.eval_shape(lambda params: dns_jax.unstack(self.stacked, params), params)
        groups = dns_jax.group_by_layer(apart, takes_part=self.takes_part).values()
        part = sum(leaf.size for leaves in groups for leaf in leaves)
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        # Rounded down: a network as small as asked for, or smaller.
        if self.compression:
            wanted = math.floor(total / self.compression)
        else:
            wanted = math.floor(total * (self.density or 1.0))
        if wanted <= total - part:
            raise ValueError(
                f'--compression or --density asks to keep {wanted} of {total} parameters, of which '
                f'{total - part} take no part in surgery and at least one other must be kept'
            )
        return (wanted - (total - part)) / part


def make_takes_part(
    prune_biases: bool, prune_embeddings: bool, dense: Collection[str] = ()
) -> TakesPart:
    """Says which leaves surgery is done on: kernels, and what else is asked for.

    Args:
      prune_biases: whether biases take part, and the scales of norms.
      prune_embeddings: whether embeddings do.
      dense: layers that take no part.
    """
    roles = {'kernel'}
    if prune_biases:
        roles |= {'bias', 'scale'}
    if prune_embeddings:
        roles.add('embedding')

    def takes_part(path, leaf):
        is_wanted = has_axes(path, leaf) and role(path, leaf) in roles
        return is_wanted and parent_path(path) not in dense

    return takes_part


def make_pruner(pruning: Pruning, params: dns_jax.Params) -> optax.GradientTransformation:
    """Makes what prunes: surgery or what is compared with it, and probes around it.

    Args:
      pruning: what to keep and when.
      params: the network's weights, or their shapes.

    Returns:
      A transformation as of `dns_jax.surgery`. The key of the coins is for its state to say.

    Raises:
      ValueError: if a number is out of range.
    """
    pruner = pruning.pruner.make(pruning, params, jax.random.key(0))
    if pruning.cut:
        pruner = probes.cut(pruner, pruning.cut, pruning.cut_at)
    # Around the cut, which prunes too.
    return probes.count_returns(pruner) if pruning.count_returns else pruner


def make_no_pruner(params: dns_jax.Params) -> optax.GradientTransformation:
    """Makes what stands in a pruner's place where nothing is pruned."""
    del params
    return dns_jax.surgery({}, jax.random.key(0))


def make_rules(pruning: Pruning, params: dns_jax.Params) -> dict[str, dns_jax.Rule]:
    """Makes the table of rules of surgery.

    Args:
      pruning: what to keep and when.
      params: the network's weights, or their shapes.

    Returns:
      `{layer name: rule}`, or one rule for all layers where these share one density.

    Raises:
      ValueError: if a number is out of range.
    """
    if pruning.rates:
        every = pruning.refresh_statistics
        thresholds = {
            layer: dns_jax.mean_std(rate, pruning.hysteresis)
            for layer, rate in pruning.rates.items()
        }
    else:
        every = pruning.every or None
        densities, make = _densities(pruning, params)
        thresholds = {
            layer: make(pruning.ramp(density, *pruning.ramps[layer]), hysteresis=pruning.hysteresis)
            for layer, density in densities.items()
        }
    rules = {}
    for layer, (start, stop) in pruning.windows.items():
        if layer in pruning.ramps and every and not pruning.update_power:
            last = (stop - 1) // every * every
            if last >= max(start, pruning.ramps[layer][1]):
                stop = last + 1  # training settles under the last thresholds that fit
        probability = dns_jax.update_probability(
            pruning.update_gamma, pruning.update_power, stop, start
        )
        rules[layer] = dns_jax.Rule(thresholds[layer], probability, every, pruning.structures)
    return rules


def _densities(pruning: Pruning, params: Any) -> tuple[Mapping[str, float], Callable[..., Any]]:
    """The densities by layer, or that of all, and what makes thresholds of one."""
    if pruning.densities:
        return pruning.densities, dns_jax.layer_density
    share = functools.partial(dns_jax.global_density, score=pruning.score)
    return {'*': pruning.kept_share(params)}, share


def _baseline(pruning: Pruning, params: Any) -> tuple[Any, Callable[..., Any]]:
    """The same for pruners without a band, which take a number where there is one for all."""
    densities, make = _densities(pruning, params)
    one = densities if pruning.densities else densities['*']
    return one, functools.partial(make, hysteresis=0.0)


def _rounds(pruning: Pruning) -> list[int]:
    start, end = pruning.ramps['*']
    last = max(pruning.rounds - 1, 1)
    return [start + round((end - start) * number / last) for number in range(pruning.rounds)]


def _make_surgery(pruning, params, key):
    return dns_jax.surgery(
        make_rules(pruning, params),
        key,
        takes_part=pruning.takes_part,
        importance=pruning.importance,
        splicing=pruning.splicing,
        stacked=pruning.stacked,
    )


def _make_han(pruning, params, key):
    return pruners.han(pruning.rates, _rounds(pruning), key, **pruning.options)


def _make_iterative(pruning, params, key):
    densities, rule = _baseline(pruning, params)
    return pruners.iterative(densities, _rounds(pruning), key, rule, **pruning.options)


def _make_one_shot(pruning, params, key):
    densities, rule = _baseline(pruning, params)
    start, _ = pruning.ramps['*']
    return pruners.one_shot(densities, start, key, density_rule=rule, **pruning.options)


def _make_gradual(pruning, params, key):
    densities, rule = _baseline(pruning, params)
    start, end = pruning.ramps['*']
    return pruners.gradual(densities, start, end, pruning.every, key, rule, **pruning.options)


def _make_straight_through(pruning, params, key):
    densities, rule = _densities(pruning, params)
    ramp = pruning.ramps['*']
    ramped = {layer: pruning.ramp(density, *ramp) for layer, density in densities.items()}
    return pruners.straight_through(ramped, key, rule, **pruning.options)


def _make_ac_dc(pruning, params, key):
    densities, rule = _baseline(pruning, params)
    start, end = pruning.ramps['*']
    return pruners.ac_dc(densities, start, end, pruning.every, key, rule, **pruning.options)


def _make_regrowing(drop, growth, pruning, params, key):
    densities, rule = _baseline(pruning, params)
    _, end = pruning.ramps['*']
    return pruners.regrow(
        densities,
        pruning.every,
        end,
        key,
        drop(pruning.drop, end),
        growth,
        # Papers begin at random; here the network is a trained one.
        initial=importance.magnitude,
        density_rule=rule,
        takes_part=pruning.takes_part,
        stacked=pruning.stacked,
    )


def _cosine(drop: float, steps: int) -> dns_jax.Schedule:
    """The share that RigL exchanges, α/2 · (1 + cos(π·step/steps))."""
    schedule = optax.cosine_decay_schedule(drop, steps)
    return lambda step: jnp.asarray(schedule(jnp.float32(step)))


_DENSITIES = ('compression', 'density', 'kernel_density', 'layer_density')


class Pruner(NamedTuple):
    """A way to prune that a run can be asked for."""

    text: str  # for --help, behind the name
    make: Callable[[Pruning, dns_jax.Params, jax.Array], optax.GradientTransformation]
    reads: tuple[str, ...]  # the flags that not every pruner reads
    targets: tuple[str, ...] = _DENSITIES  # the flags that may say what to keep
    has_rules: bool = False  # whether `make_rules` says what its first thresholds are
    in_rounds: bool = False  # whether there is one every so many steps, which must not be 0 then
    chain: Callable[..., optax.GradientTransformation] = optax.chain  # it and the optimizer


PRUNERS = {
    'surgery': Pruner(
        'as in the paper',
        _make_surgery,
        (
            *('splicing', 'hysteresis', 'start', 'stop', 'ramp', 'update_gamma', 'update_power'),
            *('count_returns', 'importance', 'refresh_statistics', 'soft_threshold', 'pruned_rate'),
        ),
        (*_DENSITIES, 'c_rate'),
        has_rules=True,
    ),
    'han': Pruner('in the rounds of Han et al.', _make_han, ('importance', 'rounds'), ('c_rate',)),
    'iterative': Pruner('in rounds to a density', _make_iterative, ('importance', 'rounds')),
    'one_shot': Pruner('in one step', _make_one_shot, ('importance',)),
    'gradual': Pruner(
        'along the cubic ramp of Zhu and Gupta', _make_gradual, ('importance',), in_rounds=True
    ),
    'straight_through': Pruner(
        'anew at every step, to a density that falls as with surgery',
        _make_straight_through,
        ('importance', 'ramp'),
    ),
    'sr_ste': Pruner(
        'as straight_through, with a weight decay of what is pruned',
        _make_straight_through,
        ('importance', 'ramp'),
        chain=sparse_training.decay_pruned,
    ),
    # What is pruned is zero and does not learn.
    'ac_dc': Pruner(
        'to the density in every other phase, and in the others not at all',
        _make_ac_dc,
        ('importance',),
        in_rounds=True,
        chain=sparse_training.train_kept,
    ),
    'set': Pruner(
        'in one step, then the smallest are exchanged at random',
        functools.partial(_make_regrowing, lambda drop, steps: drop, importance.chance),
        ('drop',),
        in_rounds=True,
        chain=sparse_training.train_kept,
    ),
    'rigl': Pruner(
        'in one step, then the smallest are exchanged for the largest gradients',
        functools.partial(_make_regrowing, _cosine, importance.gradient),
        ('drop',),
        in_rounds=True,
        chain=sparse_training.train_kept,
    ),
}
