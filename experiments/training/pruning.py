"""What prunes: a row of `PRUNERS` for each pruner, made of the numbers that a plan has."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax import importance, pruners, sparse_training
from experiments.training import probes

IMPORTANCES = {
    'magnitude': importance.magnitude,
    'taylor': importance.taylor,
    'chance': importance.chance,
}
Window = tuple[int, int]  # the first step, and the first after the last


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be pruned, how far and when. Tables are by layer, `*` stands for all layers.

    A layer that a table of rates or densities leaves out stays dense.
    """

    pruner: str  # of `PRUNERS`
    steps: int  # of surgery
    rates: Mapping[str, float]  # c of each layer; empty where densities say what to keep
    densities: Mapping[str, float]  # of each layer; empty where the network has one
    compression: float | None  # of the network: parameters / kept
    density: float | None  # of the network: kept / parameters
    score: str  # how layers share what the network keeps
    windows: Mapping[str, Window]  # the steps with updates of masks
    ramps: Mapping[str, Window]  # the first and the last step of a falling density
    ramp: Callable[..., dns_jax.Schedule]  # of a density, and the first and last step
    every: int  # steps from one choice of thresholds, or round, to the next; 0 follows
    refresh_statistics: int  # steps from one reading of mean and std to the next; 0 reads once
    hysteresis: float
    update_gamma: float
    update_power: float
    splicing: bool
    rounds: int
    drop: float  # share of the kept connections that are exchanged in a round
    importance: str  # of `IMPORTANCES`
    prune_biases: bool
    cut: float  # share of the kept connections that is cut at random, once
    cut_at: int  # the step
    count_returns: bool

    @property
    def takes_part(self) -> Callable[[str, jax.Array], bool]:
        """Which leaves surgery is done on, as a predicate of path and leaf."""
        return dns_jax.has_axes if self.prune_biases else dns_jax.is_kernel

    @property
    def options(self) -> dict[str, Any]:
        """What every pruner that orders connections by importance takes."""
        return {'takes_part': self.takes_part, 'importance': IMPORTANCES[self.importance]}

    def kept_share(self, params: dns_jax.Params) -> float:
        """Says what of the leaves that take part is to be kept, so that the network is as small.

        Args:
          params: the weights, or their shapes.

        Returns:
          The density of what takes part.

        Raises:
          ValueError: if what takes no part is more than is to be kept.
        """
        groups = dns_jax.group_by_layer(params, takes_part=self.takes_part).values()
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
                f'{total - part} take no part in surgery and one more must be kept'
            )
        return (wanted - (total - part)) / part


def make_pruner(
    wanted: Wanted, params: dns_jax.Params, key: jax.Array
) -> optax.GradientTransformation:
    """Makes what prunes: surgery or what is compared with it, and probes around it.

    Args:
      wanted: what to keep and when.
      params: the network's weights, or their shapes.
      key: of its coins.

    Returns:
      A transformation as of `dns_jax.surgery`.

    Raises:
      ValueError: if a number is out of range.
    """
    pruner = PRUNERS[wanted.pruner].make(wanted, params, key)
    if wanted.cut:
        pruner = probes.cut(pruner, wanted.cut, wanted.cut_at)
    # Around the cut, which prunes too.
    return probes.count_returns(pruner) if wanted.count_returns else pruner


def make_rules(wanted: Wanted, params: dns_jax.Params) -> dict[str, dns_jax.Rule]:
    """Makes the table of rules of surgery.

    Args:
      wanted: what to keep and when.
      params: the network's weights, or their shapes.

    Returns:
      `{layer name: rule}`, or one rule for all layers where these share one density.

    Raises:
      ValueError: if a number is out of range.
    """
    if wanted.rates:
        every = wanted.refresh_statistics
        thresholds = {
            layer: dns_jax.mean_std(rate, wanted.hysteresis) for layer, rate in wanted.rates.items()
        }
    else:
        every = wanted.every or None
        densities, make = _densities(wanted, params)
        thresholds = {
            layer: make(wanted.ramp(density, *wanted.ramps[layer]), hysteresis=wanted.hysteresis)
            for layer, density in densities.items()
        }
    rules = {}
    for layer, (start, stop) in wanted.windows.items():
        if layer in wanted.ramps and every and not wanted.update_power:
            last = (stop - 1) // every * every
            if last >= max(start, wanted.ramps[layer][1]):
                stop = last + 1  # training settles under the last thresholds that fit
        probability = dns_jax.update_probability(
            wanted.update_gamma, wanted.update_power, stop, start
        )
        rules[layer] = dns_jax.Rule(thresholds[layer], probability, every)
    return rules


def _densities(wanted: Wanted, params: Any) -> tuple[Mapping[str, float], Callable[..., Any]]:
    """The densities by layer, or that of all, and what makes thresholds of one."""
    if wanted.densities:
        return wanted.densities, dns_jax.layer_density
    share = functools.partial(dns_jax.global_density, score=wanted.score)
    return {'*': wanted.kept_share(params)}, share


def _baseline(wanted: Wanted, params: Any) -> tuple[Any, Callable[..., Any]]:
    """The same for pruners without a band, which take a number where there is one for all."""
    densities, make = _densities(wanted, params)
    one = densities if wanted.densities else densities['*']
    return one, functools.partial(make, hysteresis=0.0)


def _rounds(wanted: Wanted) -> list[int]:
    start, end = wanted.ramps['*']
    last = max(wanted.rounds - 1, 1)
    return [start + round((end - start) * number / last) for number in range(wanted.rounds)]


def _make_surgery(wanted, params, key):
    rules = make_rules(wanted, params)
    return dns_jax.surgery(rules, key, splicing=wanted.splicing, **wanted.options)


def _make_han(wanted, params, key):
    return pruners.han(wanted.rates, _rounds(wanted), key, **wanted.options)


def _make_iterative(wanted, params, key):
    densities, rule = _baseline(wanted, params)
    return pruners.iterative(densities, _rounds(wanted), key, rule, **wanted.options)


def _make_one_shot(wanted, params, key):
    densities, rule = _baseline(wanted, params)
    start, _ = wanted.ramps['*']
    return pruners.one_shot(densities, start, key, density_rule=rule, **wanted.options)


def _make_gradual(wanted, params, key):
    densities, rule = _baseline(wanted, params)
    start, end = wanted.ramps['*']
    return pruners.gradual(densities, start, end, wanted.every, key, rule, **wanted.options)


def _make_regrowing(drop, growth, wanted, params, key):
    densities, rule = _baseline(wanted, params)
    _, end = wanted.ramps['*']
    return pruners.regrow(
        densities,
        wanted.every,
        end,
        key,
        drop(wanted.drop, end),
        growth,
        # Papers begin at random; here the network is a trained one.
        initial=importance.magnitude,
        density_rule=rule,
        takes_part=wanted.takes_part,
    )


def _cosine(drop: float, steps: int) -> dns_jax.Schedule:
    """The share that RigL exchanges, α/2 · (1 + cos(π·step/steps))."""
    schedule = optax.cosine_decay_schedule(drop, steps)
    return lambda step: jnp.asarray(schedule(jnp.float32(step)))


_DENSITIES = ('compression', 'density', 'layer_density')


class Pruner(NamedTuple):
    """A way to prune that a run can be asked for."""

    text: str  # for --help, behind the name
    make: Callable[[Wanted, dns_jax.Params, jax.Array], optax.GradientTransformation]
    reads: tuple[str, ...]  # the flags that not every pruner reads
    targets: tuple[str, ...] = _DENSITIES  # the flags that may say what to keep
    in_rounds: bool = False  # whether there is one every so many steps, which must not be 0 then
    chain: Callable[..., optax.GradientTransformation] = optax.chain  # it and the optimizer


PRUNERS = {
    'surgery': Pruner(
        'the paper',
        _make_surgery,
        (
            *('splicing', 'hysteresis', 'start', 'stop', 'ramp', 'update_gamma', 'update_power'),
            *('count_returns', 'importance', 'refresh_statistics'),
        ),
        (*_DENSITIES, 'c_rate'),
    ),
    'han': Pruner('the rounds of Han et al.', _make_han, ('importance', 'rounds'), ('c_rate',)),
    'iterative': Pruner('as many rounds by density', _make_iterative, ('importance', 'rounds')),
    'one_shot': Pruner('in one step', _make_one_shot, ('importance',)),
    'gradual': Pruner(
        'the cubic ramp of Zhu and Gupta', _make_gradual, ('importance',), in_rounds=True
    ),
    # What is pruned is zero and does not learn.
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
