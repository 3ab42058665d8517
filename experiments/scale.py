"""What surgery costs at the size of ImageNet's networks, and how that grows with size.

python -m experiments.scale

Measures a training step of AlexNet, dense and under surgery, whose masks are updated at every step
(σ = 1), the most it can cost; the memory that each plans; the same for fully connected networks of
growing size; and how fast images are decoded. All programs take turns in one process: medians are
reported, and ratios within a round. `measurements.scale_report` writes the page from the JSON.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dns_jax.files.writing import write_whole
from experiments.config import command_line
from experiments.config.command_line import check_finite, flag
from experiments.devices import progress
from experiments.measurements import scale_programs, scale_report, timing
from experiments.measurements.scale_programs import RunningStep, plan
from experiments.reports import plots

_TIMED = 0.1  # seconds that a timed call of a small program takes at least
_MOST_STEPS = 50  # in such a call


_FEWEST_IMAGES = 64  # two batches of those that decoding is timed with


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """What `experiments.scale` measures."""

    network: str = flag('alexnet', 'Network of the step.', choices=('alexnet', 'vgg16'))
    width: float = flag(
        1.0, "Channels and hidden units, in shares of the paper's.", lower_bound=0.0
    )
    batch_size: int = flag(
        0, 'Images per step; by default 8 on CPU and 256 on an accelerator.', lower_bound=0
    )
    compute_dtype: str = flag(
        'float32', 'What the networks compute in.', choices=('float32', 'bfloat16')
    )
    rounds: int = flag(15, 'Timed calls of each program, which take turns.', lower_bound=1)
    sizes: str = flag(
        '0.3,3,30,138',
        'Weights, in millions, of fully connected networks whose steps are timed, with commas '
        'between.',
    )
    planned_sizes: str = flag(
        '1000',
        'Weights, in millions, of networks that are compiled but not run, with commas between.',
    )
    sized_batch: int = flag(
        64, 'Images per step of the networks of --sizes and --planned_sizes.', lower_bound=1
    )
    images: int = flag(
        2_000, 'Images made to time decoding; 0 leaves the measurement out.', lower_bound=0
    )
    xla_options: str = flag(
        '',
        'Options of the compiler, as NAME=VALUE with commas between, such as '
        'xla_cpu_copy_insertion_use_region_analysis=true; by default none are given.',
    )
    output: str = flag(
        'results/scale', 'Files that are written: OUTPUT.json, OUTPUT.png and OUTPUT.md.'
    )

    def __post_init__(self):
        check_finite(self)
        if self.width <= 0:
            raise ValueError(f'--width={self.width} must be above 0')
        if 0 < self.images < _FEWEST_IMAGES:
            raise ValueError(f'--images={self.images} must be 0 or at least {_FEWEST_IMAGES}')
        self.timed_weights()
        self.planned_weights()
        self.options()

    def timed_weights(self) -> list[float]:
        """Returns how many weights the networks have whose steps are timed."""
        return self._weights('sizes')

    def planned_weights(self) -> list[float]:
        """Returns how many weights the networks have that are compiled alone."""
        return self._weights('planned_sizes')

    def options(self) -> dict[str, str]:
        """Returns the options of the compiler."""
        entries = [entry.partition('=') for entry in self.xla_options.split(',') if entry]
        if not all(name and value for name, _, value in entries):
            raise ValueError(f'--xla_options={self.xla_options} must be NAME=VALUE,…')
        return {name: value for name, _, value in entries}

    def _weights(self, name: str) -> list[float]:
        text = getattr(self, name)
        try:
            weights = [1e6 * float(size) for size in text.split(',') if size]
        except ValueError as error:
            raise ValueError(f'--{name}={text} must be numbers with commas between') from error
        if not all(1e-3 <= size / 1e6 < math.inf for size in weights):
            raise ValueError(f'--{name}={text} must be numbers of 0.001 or more')
        return weights


@dataclasses.dataclass(frozen=True)
class Machine:
    """What depends on the backend."""

    batch_size: int
    bar: float  # the largest ratio of the step under surgery to the dense one that is wanted
    side: int  # of the matrices of the large product
    floats: int  # that a pass over memory reads and writes; more than caches hold


_MACHINES = {
    True: Machine(batch_size=8, bar=1.10, side=2_048, floats=2**26),
    False: Machine(batch_size=256, bar=1.05, side=16_384, floats=2**28),
}


def measure(config: ScaleConfig) -> dict[str, Any]:
    """Measures everything, writes it down and prints the page.

    Returns:
      What was measured, as `experiments.measurements.scale_report` wants it.

    Raises:
      OSError: if a result cannot be written.
      FloatingPointError: if a network diverges.
    """
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)  # asked for at once, not after minutes
    machine = _MACHINES[jax.default_backend() == 'cpu']
    words = [*_environment(), 'python -m experiments.scale', *timing.given_flags(config)]
    result = {
        'command': ' '.join(words),
        'device': timing.describe_device(),
        'cores': os.cpu_count(),
        'dtype': config.compute_dtype,
        'machine': scale_programs.measure_machine(
            config.compute_dtype, machine.side, machine.floats
        ),
    }
    sizes = [(weights, True) for weights in config.timed_weights()]
    sizes += [(weights, False) for weights in config.planned_weights()]
    parts = 1 + len(sizes) + bool(config.images)
    with progress.bar(total=parts, desc='measuring', unit=' parts') as bar:
        bar.set_postfix_str('the step')
        result |= {'step': _measure_step(config, machine), 'sizes': []}
        for weights, is_run in sizes:
            bar.update()
            bar.set_postfix_str(f'{weights:,.0f} weights{"" if is_run else ", planned"}')
            result['sizes'].append(_measure_size(config, weights, is_run))
        if config.images:
            bar.update()
            bar.set_postfix_str('the input')
            result['input'] = _measure_input(config)
        bar.update()
    _write(result, output)
    print(scale_report.page(result, output.name))
    return result


def _environment() -> list[str]:
    return [
        f'{name}={os.environ[name]}'
        for name in ('GLIBC_TUNABLES', 'XLA_FLAGS')
        if os.environ.get(name)
    ]


def _measure_step(config: ScaleConfig, machine: Machine) -> dict[str, Any]:
    """Measures the step of the network for ImageNet, all kinds."""
    task = scale_programs.image_task(
        config.network, config.width, config.compute_dtype, config.batch_size or machine.batch_size
    )
    plans = {kind: plan(task, kind, config.options()) for kind in timing.RULES}
    row = {
        'network': config.network,
        'width': config.width,
        'batch_size': task.batch_size,
        'bar': machine.bar,
        'weights': scale_programs.count_weights(task),
        **scale_programs.count_flop(task),
        'memory': {kind: scale_programs.describe_memory(plans[kind]) for kind in plans},
        'xla': {kind: scale_programs.count_by_xla(plans[kind]) for kind in plans},
    }
    times = _time_in_turns({kind: RunningStep(planned) for kind, planned in plans.items()}, config)
    refresh = 1e3 * float(np.median(np.subtract(times['density'], times['surgery'])))
    return {**row, **_describe_times(times), 'refresh_ms': refresh}


def _measure_size(config: ScaleConfig, weights: float, is_run: bool) -> dict[str, Any]:
    """Measures a fully connected network, dense and under surgery."""
    task = scale_programs.sized_task(weights, config.compute_dtype, config.sized_batch)
    plans = {kind: plan(task, kind, config.options()) for kind in ('dense', 'surgery')}
    row = {
        'batch_size': task.batch_size,
        'weights': scale_programs.count_weights(task),
        **scale_programs.count_flop(task),
        'memory': {kind: scale_programs.describe_memory(plans[kind]) for kind in plans},
        'xla': {kind: scale_programs.count_by_xla(plans[kind]) for kind in plans},
    }
    if is_run:
        programs = {kind: RunningStep(planned) for kind, planned in plans.items()}
        row |= _describe_times(_time_in_turns(programs, config))
    return row


def _time_in_turns(programs: dict[str, RunningStep], config: ScaleConfig) -> dict[str, list[float]]:
    """Times all programs in every round, in one order and then in the other.

    Returns:
      `{kind: seconds per step in each round}`.
    """
    steps, times = {}, {kind: [] for kind in programs}
    for kind, program in programs.items():
        program.seconds()  # the first call also fetches the program's memory
        steps[kind] = min(_MOST_STEPS, 1 + int(_TIMED / program.seconds()))
    for number in range(config.rounds):
        for kind in list(programs)[:: -1 if number % 2 else 1]:
            times[kind].append(programs[kind].seconds(steps[kind]))
    return times


def _describe_times(times: dict[str, list[float]]) -> dict[str, Any]:
    ratios = np.divide(times['surgery'], times['dense'])
    return {
        'ms': {kind: 1e3 * float(np.median(each)) for kind, each in times.items()},
        'ratio': float(np.median(ratios)),
        # Half of all rounds lie within.
        'ratio_quartiles': [float(value) for value in np.quantile(ratios, (0.25, 0.75))],
    }


def _measure_input(config: ScaleConfig) -> dict[str, Any]:
    # Takes seconds to import, which other measurements need not wait for.
    from experiments.measurements.scale_input import measure_input
    from experiments.networks.models import INPUTS

    return measure_input(config.images, INPUTS[config.network].size, workers=(0, 2))


def _write(result: dict[str, Any], output: Path) -> None:
    write_whole(output.with_suffix('.json'), json.dumps(result, indent=2) + '\n')
    plots.save(scale_report.figure(result), output.with_suffix('.png'))
    write_whole(output.with_suffix('.md'), scale_report.page(result, output.name))


if __name__ == '__main__':
    command_line.launch({}, measure, ScaleConfig)
