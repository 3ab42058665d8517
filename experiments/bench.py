"""What surgery costs: time and memory of a training step, and time of new thresholds.

python -m experiments.bench [--peer=PYTHON]

Every program runs many steps per call, as training does but for the counts of its records, and all
take turns in one process; medians are reported, and ratios within a round. Surgery updates its
masks at every step (σ = 1), the most it can cost. A refresh is what a density rule adds once every
`refresh_every` steps. Memory is what the compiler plans. A peer is a script that prints one JSON
object, `{network: {"dense": {"median_ms": …}, "surgery": {"median_ms": …}}}`,
for the same steps.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dns_jax
from experiments.config import command_line
from experiments.config.command_line import flag
from experiments.devices import progress
from experiments.measurements import loops, timing
from experiments.networks import models
from experiments.training import steps as train

_BATCH_SIZE = 64
_EXAMPLES = 10_000
# A call takes long enough to be timed, and short enough for the machine to stay the same.
_STEPS_PER_CALL = {'lenet300': 250, 'lenet5': 25}
_LARGE_LAYER = (9_216, 4_096)  # the largest of AlexNet, 38 million weights


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `experiments.bench` measures."""

    rounds: int = flag(30, 'Timed calls of each program, which take turns.', lower_bound=1)
    peer: str | None = flag(
        None, 'A Python that can run --peer_script; by default there is no peer.'
    )
    peer_script: str = flag(
        '', 'Script of the peer, which prints its times as JSON; must be given with --peer.'
    )
    peer_rounds: int = flag(3, 'Runs of the peer, spread over --rounds.', lower_bound=1)

    def __post_init__(self):
        if self.peer and not os.path.isfile(self.peer_script):  # a Path raises for long names
            raise ValueError(f'--peer_script must be a file, but is {self.peer_script!r}')
        if self.peer_rounds > self.rounds:
            raise ValueError(
                f'--peer_rounds={self.peer_rounds} must be at most --rounds={self.rounds}'
            )


class TimedCall(NamedTuple):
    """A compiled call of many steps, and what it is called with."""

    compiled: jax.stages.Compiled
    arguments: tuple[Any, ...]
    steps: int

    def milliseconds(self) -> float:
        """Runs one call and returns its time per step."""
        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return 1e3 * (time.perf_counter() - started) / self.steps

    def peak_mebibytes(self) -> float:
        """Returns the memory the program holds at its peak, arguments included."""
        analysis: Any = self.compiled.memory_analysis()
        return analysis.peak_memory_in_bytes / 2**20


def compile_call(name: str, kind: str) -> TimedCall:
    """Compiles the training of a network on random images.

    Args:
      name: of the network.
      kind: of `timing.RULES`; thresholds by density are refreshed once in the call.
    """
    network, steps = models.NETWORKS[name](), _STEPS_PER_CALL[name]
    optimizer = timing.make_timed_optimizer(kind, refresh_every=steps)
    random = np.random.default_rng(0)
    images = jnp.asarray(random.integers(0, 256, (_EXAMPLES, 28, 28, 1), np.uint8))
    labels = jnp.asarray(random.integers(0, 10, _EXAMPLES, np.int32))
    batches = jnp.asarray(random.integers(0, _EXAMPLES, (steps, _BATCH_SIZE), np.int32))
    params = network.init(jax.random.key(0), images[:1] / 256)['params']
    state = train.TrainState(params, optimizer.init(params))
    step = train.make_step(network, optimizer, models.INPUTS[name])

    @jax.jit
    def run_steps(state, images, labels, batches):
        return jax.lax.scan(
            lambda state, batch: step(state, images[batch], labels[batch]),
            state,
            batches,
            unroll=2,  # as in training
        )

    arguments = (state, images, labels, batches)
    return TimedCall(run_steps.lower(*arguments).compile(), arguments, steps)


def measure(config: BenchConfig) -> dict[str, Any]:
    """Times all programs, and the peer between them.

    Returns:
      `{network: {dense_ms, surgery_ms, ratio, refresh_ms, steps_per_s, dense_mib, surgery_mib},
      large: {weights, refresh_ms, sort_ms}, loops: as of `loops.measure`, peer: …}`.

    Raises:
      ValueError: if the peer's answer is not JSON.
      OSError: if the peer cannot be started.
      RuntimeError: if the peer fails.
    """
    keys = list(itertools.product(_STEPS_PER_CALL, timing.RULES))
    programs = {
        key: compile_call(*key) for key in progress.bar(keys, 'compiling', unit=' programs')
    }
    for program in programs.values():
        program.milliseconds()
    times = {key: [] for key in programs}
    peer_rows = []
    for number in progress.bar(range(config.rounds), 'timing', unit=' rounds'):
        if config.peer and number * config.peer_rounds // config.rounds == len(peer_rows):
            peer_rows.append(_run_peer(config.peer, config.peer_script))
        for key, program in programs.items():
            times[key].append(program.milliseconds())

    table: dict[str, Any] = {}
    for name in _STEPS_PER_CALL:
        dense, surgery, density = (np.array(times[name, kind]) for kind in timing.RULES)
        table[name] = {
            'dense_ms': float(np.median(dense)),
            'surgery_ms': float(np.median(surgery)),
            'ratio': float(np.median(surgery / dense)),
            'refresh_ms': float(np.median(density - surgery)) * _STEPS_PER_CALL[name],
            'steps_per_s': float(1e3 / np.median(surgery)),
            'dense_mib': programs[name, 'dense'].peak_mebibytes(),
            'surgery_mib': programs[name, 'surgery'].peak_mebibytes(),
        }
    table['large'] = measure_large_layer()
    table['loops'] = loops.measure(config.rounds)
    if peer_rows:
        table['peer'] = {
            name: {
                f'{kind}_ms': float(np.median([row[name][kind]['median_ms'] for row in peer_rows]))
                for kind in ('dense', 'surgery')
            }
            for name in _STEPS_PER_CALL
        }
    return table


def measure_large_layer() -> dict[str, float]:
    """Times the threshold of one large layer, beside a sort of its weights: one call of each."""
    weights = jax.random.normal(jax.random.key(0), _LARGE_LAYER)
    masks = jnp.ones(_LARGE_LAYER, bool)
    rule, step = dns_jax.layer_density(0.05), jnp.int32(0)
    programs = {
        'refresh_ms': lambda weights: rule({'fc6': [weights]}, {'fc6': [masks]}, step),
        'sort_ms': lambda weights: jnp.sort(jnp.abs(weights), axis=None),
    }
    row: dict[str, float] = {'weights': weights.size}
    for name, program in programs.items():
        compiled = jax.jit(program).lower(weights).compile()
        started = time.perf_counter()
        jax.block_until_ready(compiled(weights))
        row[name] = 1e3 * (time.perf_counter() - started)
    return row


def _run_peer(python: str, script: str) -> dict[str, Any]:
    answer = subprocess.run([python, script], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f'--peer={python} {script} failed: {answer.stderr.strip()[-500:]}')
    return json.loads(answer.stdout)


def bench(config: BenchConfig) -> None:
    """Prints the table, and for programs the same as JSON."""
    table = measure(config)
    peer = table.get('peer', {})
    print(f'{timing.describe_device()}, batch {_BATCH_SIZE}')
    for name in _STEPS_PER_CALL:
        row = table[name]
        print(
            f'{name:9} dense {row["dense_ms"]:.3f} ms, surgery {row["surgery_ms"]:.3f} ms '
            f'(×{row["ratio"]:.3f}), {row["steps_per_s"]:.0f} steps/s, peak memory '
            f'{row["dense_mib"]:.1f} → {row["surgery_mib"]:.1f} MiB, a refresh '
            f'{row["refresh_ms"]:.2f} ms'
        )
        if peer:
            surgery_ms = peer[name]['surgery_ms']
            print(
                f'{"":9} peer: dense {peer[name]["dense_ms"]:.3f} ms, surgery {surgery_ms:.3f} ms; '
                f'we are {surgery_ms / row["surgery_ms"]:.2f}× as fast'
            )
    large = table['large']
    print(
        f'thresholds of {large["weights"]:,} weights: {large["refresh_ms"]:.0f} ms, their sort '
        f'{large["sort_ms"]:.0f} ms'
    )
    print('\n'.join(loops.format_rows(table['loops'])))
    command_line.print_result(table)


if __name__ == '__main__':
    command_line.launch({}, bench, BenchConfig)
