"""The flags of a run, as fields of one frozen `Config`.

A configuration refuses flags that contradict each other. What is written within a flag is read
once, by `plan`. Beside each flag stands what part of a run it is about: its `place`; the `task`,
which runs that are compared have in common; the `solver` of every phase; or the `target`, of which
there must be one. The others are about what happens to the dense network.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiments.config.command_line import check_finite, flag, names_of
from experiments.data import resident
from experiments.training.pruning import IMPORTANCES, PRUNERS, QUANTISERS
from experiments.training.solvers import SOLVERS

_ADDED_TO_THE_GRADIENT = 'added to the gradient as decay · weight'
_BY_LAYER = (
    'as LAYER:NUMBER,…, where conv* is a LAYER too, or NUMBER for all; layers left out stay dense.'
)
_ONE_OF = (
    'One of --compression, --density, --kernel_density, --layer_density, --c_rate must be given.'
)
_IN_ROUNDS = ' or '.join(name for name, pruner in PRUNERS.items() if pruner.in_rounds)


def _that_read(flag: str) -> str:
    return ' or '.join(name for name, pruner in PRUNERS.items() if flag in pruner.reads)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. Error rates are in percent, lengths of time in steps."""

    network: str  # chosen by the entry script, not a flag

    dataset: str = flag('mnist', 'Data set.', choices=resident.GREY_DATASETS, part='task')
    data_dir: str | None = flag(None, resident.DATA_DIR_HELP, decides=False, part='place')
    manual_dir: str | None = flag(None, resident.MANUAL_DIR_HELP, decides=False, part='place')
    train_on_all: bool = flag(
        False, 'Train on the validation images too (a final run).', part='task'
    )
    workdir: str = flag(
        'runs/latest', 'Folder that the run writes to.', decides=False, part='place'
    )
    reference: str | None = flag(
        None,
        'Folder of a run, or .caffemodel file (with --train_on_all), to start from; by default a '
        'dense network is trained.',
        part='place',
    )
    resume: bool = flag(False, 'Continue the run in --workdir.', decides=False, part='place')
    overwrite: bool = flag(False, 'Delete the run in --workdir first.', decides=False, part='place')
    tensorboard: bool = flag(
        False, 'Also write TensorBoard events (needs tensorboardX).', decides=False, part='place'
    )
    seed: int = flag(
        0,
        'Seed of the weights, the order of the images and the other random numbers.',
        lower_bound=0,
        part='task',
    )

    shift: int = flag(
        0,
        'Pixels that training images are moved by at most, at random, to black beyond the border.',
        lower_bound=0,
        part='task',
    )
    mirror: bool = flag(
        False, 'Whether training images are mirrored left to right, half of them.', part='task'
    )
    batch_size: int = flag(64, 'Examples per step.', lower_bound=1, part='task')
    reference_steps: int = flag(
        10_000,
        'Steps of dense training; with 0 surgery begins with the first weights.',
        lower_bound=0,
        part='task',
    )
    surgery_steps: int = flag(16_000, 'Steps of surgery.', lower_bound=1)
    finetuning_steps: int = flag(
        10_000,
        'Steps of training with frozen masks after surgery; 0 leaves the phase out.',
        lower_bound=0,
    )
    record_every: int = flag(
        500,
        'Steps from one record of loss, validation error and kept connections to the next.',
        lower_bound=1,
        part='solver',
    )
    checkpoint_every: int = flag(
        2_000,
        'Steps from one checkpoint to the next; a multiple of --record_every.',
        lower_bound=1,
        part='solver',
    )
    on_divergence: str = flag(
        'stop',
        'What to do when training breaks down. stop ends the run. rollback goes back to the last '
        'checkpoint, and continues with half the learning rate and other batches; once surgery '
        'has emptied a layer, masks stay as they are in that checkpoint.',
        choices=('stop', 'rollback'),
    )

    reference_learning_rate: str = flag(
        'inv:0.01,1e-4,0.75',
        'Learning rate of dense training: fixed:BASE, exp:BASE,GAMMA, inv:BASE,GAMMA,POWER, '
        'poly:BASE,POWER or step:BASE,GAMMA,STEPS, as in Caffe; or cosine:BASE,STEPS,SHARE, which '
        'rises from 0 for some steps and then falls to a share of the base.',
        part='task',
    )
    learning_rate: str = flag(
        'inv:0.01,1e-4,0.75', 'Learning rate of surgery, in the form of --reference_learning_rate.'
    )
    finetuning_learning_rate: str = flag(
        'poly:0.05,1', 'Learning rate of fine-tuning, in the form of --reference_learning_rate.'
    )
    reference_weight_decay: float = flag(
        5e-4, f'Weight decay of dense training, {_ADDED_TO_THE_GRADIENT}.', part='task'
    )
    weight_decay: float = flag(
        5e-4, f'Weight decay of surgery, on all dense weights, {_ADDED_TO_THE_GRADIENT}.'
    )
    finetuning_weight_decay: float = flag(
        0.0, f'Weight decay of fine-tuning, {_ADDED_TO_THE_GRADIENT}.'
    )
    average: float = flag(
        0.0,
        'Share d, in [0, 1), of the moving average A ← d·A + (1 − d)·W of the weights W in '
        'fine-tuning. The network is made of A; with 0 that is the last W.',
    )
    optimizer: str = flag(
        'caffe',
        'What trains the weights: caffe, SGD as Caffe does it; sgd, as optax does, where momentum '
        'knows of no rate; adamw.',
        choices=tuple(SOLVERS),
        part='solver',
    )
    clip: float = flag(
        0.0,
        'Largest norm of the gradients of all parameters together, which are cut down to it; 0 '
        'leaves them as they are.',
        lower_bound=0.0,
        part='solver',
    )
    momentum: float = flag(
        0.9, 'Momentum: share of the last update that goes into the next, in [0, 1).', part='solver'
    )
    bias_scale: float = flag(2.0, 'Learning rate of biases / that of kernels.', part='solver')
    decay_biases: bool = flag(
        True,
        'Whether biases get weight decay too and, but for --optimizer=caffe, the scales of norms.',
        part='solver',
    )

    compression: float | None = flag(
        None,
        f'Compression to reach, all parameters / kept parameters; each layer gets its share by '
        f'itself. {_ONE_OF}',
        part='target',
    )
    density: float | None = flag(
        None, f'Density to reach, kept parameters / all parameters. {_ONE_OF}', part='target'
    )
    kernel_density: float | None = flag(
        None,
        'Density to reach over all that takes part, which is all kernels where --prune_biases is '
        f'off: kept / all of its parameters. {_ONE_OF}',
        part='target',
    )
    layer_density: str = flag(
        '',
        f'Density to reach in each layer, kept / all of the parameters that take part, {_BY_LAYER} '
        f'{_ONE_OF}',
        part='target',
    )
    c_rate: str = flag(
        '',
        f'c of each layer, in standard deviations, {_BY_LAYER} Surgery prunes below mean + c · std '
        f'of the magnitudes, --pruner=han below c · std of the weights. {_ONE_OF}',
        part='target',
    )
    refresh_statistics: int = flag(
        0,
        'Steps from one reading of mean and std, for --c_rate, to the next; 0 reads them once.',
        lower_bound=0,
    )
    score: str = flag(
        'norm',
        'How layers share --compression or --density. norm and rms compare weights in units of '
        "their layer's norm or root mean square. erk looks only at the axes of kernels.",
        choices=('norm', 'rms', 'erk'),
    )
    ramp: str = flag(
        'log', 'How the density falls under surgery: log (by equal factors) or poly:POWER.'
    )
    ramp_start: str = flag(
        '0%',
        'When the density begins to fall, or the first round is: a step, or a share of the surgery '
        'steps; with --layer_density also LAYER:STEP,…',
    )
    ramp_end: str = flag(
        '80%',
        'When the density is reached, or the last round is: a step, or a share of the surgery '
        'steps, but not after the last update; with --layer_density also LAYER:STEP,…',
    )
    refresh_every: int = flag(
        500,
        'Steps from one choice of thresholds by density to the next; 0 follows the density at '
        f'every step. With --pruner={_IN_ROUNDS}, steps from one round to the next.',
        lower_bound=0,
    )
    start: str = flag(
        '0',
        'When mask updates begin: a step, or a share of the surgery steps; one for all layers, or '
        'LAYER:STEP,…',
    )
    stop: str = flag(
        '100%',
        'First step without mask updates: a step, or a share of the surgery steps; one for all '
        'layers, or LAYER:STEP,… The last update before --stop reaches a density exactly. With '
        '--update_power=0 this is the last choice of thresholds, if the ramp has ended by then.',
    )
    hysteresis: float = flag(
        0.1,
        'Half the relative width of the band between thresholds: 0.1 puts them at 0.9·t and 1.1·t.',
    )
    soft_threshold: bool = flag(
        False,
        'Whether kept weights are smaller by their lower threshold, in surgery and after it, so '
        'that none jumps when it leaves or returns.',
    )
    pruned_rate: float = flag(
        1.0,
        'Share of the learning rate that pruned weights have in surgery, by dns_jax.slow_pruned.',
        lower_bound=0.0,
        upper_bound=1.0,
    )
    update_gamma: float = flag(
        1e-4,
        'γ of the update probability (1 + γ·step)^−power, per step; not used if --update_power=0.',
    )
    update_power: float = flag(
        0.0,
        'Power of the update probability (1 + γ·step)^−power; with 0, masks are updated at every '
        'step.',
    )
    structure: str = flag(
        '',
        'What is pruned and spliced together: units (outputs of a layer), inputs, blocks as 4x4, '
        'or 2of4 along the inputs; one for all layers, or LAYER:STRUCTURE,…, where conv* is a '
        'LAYER too. By default, in layers left out, and for biases, weights are pruned one by one.',
    )
    prune_biases: bool = flag(True, 'Whether biases take part in surgery, and the scales of norms.')
    prune_embeddings: bool = flag(False, 'Whether embeddings take part in surgery.')
    stay_dense: str = flag(
        '',
        'Layers that take no part in surgery, as LAYER,…, where conv* is a LAYER too; none by '
        'default.',
    )
    quantiser: str = flag(
        'none',
        'What kernels are rounded to in surgery and fine-tuning, while real weights learn: binary, '
        'one bit as in BinaryConnect; stochastic_binary, by coins; ternary, as Hwang and Sung '
        'round; signs, one magnitude for what is kept of a layer. --compression=1 prunes nothing.',
        choices=tuple(QUANTISERS),
    )

    pruner: str = flag(
        'surgery',
        f'What prunes: {"; ".join(f"{name}, {row.text}" for name, row in PRUNERS.items())}.',
        choices=tuple(PRUNERS),
    )
    importance: str = flag(
        'magnitude',
        'What says how much a connection matters: |w|, |w · gradient|, or a random number.',
        choices=tuple(IMPORTANCES),
    )
    splicing: bool = flag(True, 'Whether surgery lets pruned connections return.')
    rounds: int = flag(
        5, f'Rounds of --pruner={_that_read("rounds")}.', lower_bound=1, upper_bound=1_000
    )
    drop: float = flag(
        0.3,
        "Share of each layer's kept connections that are exchanged in a round of "
        f'--pruner={_that_read("drop")}.',
    )
    dropout: float = flag(
        0.0,
        'Share of the units that dropout drops, after each fully connected layer but the last.',
        part='task',
    )
    pruned_dropout: str = flag(
        'scaled',
        'What happens to --dropout once pruning begins: kept, dropped, or scaled by the square '
        'root of the density.',
        choices=('kept', 'dropped', 'scaled'),
    )
    cut: float = flag(0.0, 'Share of the kept connections that is cut at random, once.')
    cut_at: str = flag('50%', 'Step, or share of the surgery steps, at which --cut happens.')
    count_returns: bool = flag(
        False, 'Whether the summary counts connections that return, and tests what they are worth.'
    )

    def __post_init__(self):
        if self.resume and self.overwrite:
            raise ValueError('--resume and --overwrite exclude each other')
        if self.overwrite and self.reference and _same(self.reference, self.workdir):
            raise ValueError(f'--overwrite would delete --reference={self.reference}')
        targets = names_of(Config, 'target')
        wanted = {
            name: value for name in targets if (value := getattr(self, name)) not in (None, '')
        }
        if len(wanted) != 1:
            raise ValueError(
                'one of --compression, --density, --kernel_density, --layer_density and --c_rate '
                f'must say what to keep, as --compression=100 does, but {wanted or "none"} is given'
            )
        if self.compression is not None and not 1 <= self.compression < math.inf:
            raise ValueError(f'--compression={self.compression} must be finite and at least 1')
        for name in ('density', 'kernel_density'):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f'--{name}={value} must be in (0, 1]')
        for name in ('cut', 'dropout', 'drop', 'average'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'--{name}={getattr(self, name)} must be in [0, 1)')
        self._check_pruner(wanted)
        self._check_unread()
        if not self.finetuning_steps:
            self.refuse(('average',), '--finetuning_steps=0')
        if self.soft_threshold:  # Only single weights have thresholds of their own size.
            self.refuse(('importance', 'structure', 'quantiser'), '--soft_threshold')
        if self.count_returns and self.on_divergence == 'rollback':
            raise ValueError(
                '--count_returns and --on_divergence=rollback exclude each other: after a rollback '
                'the returns of the undone steps would be counted too'
            )
        if self.checkpoint_every % self.record_every:
            raise ValueError(
                f'--checkpoint_every={self.checkpoint_every} must be a multiple of '
                f'--record_every={self.record_every}'
            )
        check_finite(self)

    def _check_pruner(self, wanted: Mapping[str, Any]):
        """Refuses what the pruner cannot prune by."""
        pruner = PRUNERS[self.pruner]
        if pruner.in_rounds and not self.refresh_every:
            raise ValueError(f'--refresh_every=0 must be at least 1 for --pruner={self.pruner}')
        if not {*wanted} & {*pruner.targets}:
            others = '--c_rate' if 'c_rate' in pruner.targets else 'a density or a compression'
            raise ValueError(f'--pruner={self.pruner} must go with {others}')
        is_known = self.importance == 'magnitude' or self.refresh_statistics or not self.c_rate
        if 'refresh_statistics' in pruner.reads and not is_known:
            raise ValueError(
                f'--importance={self.importance} is not known at the start: with --c_rate it must '
                'go with --refresh_statistics'
            )

    def _check_unread(self):
        """Refuses flags that nothing would read beside the others, as another pruner would."""
        unread = {name for pruner in PRUNERS.values() for name in pruner.reads}
        unread -= {*PRUNERS[self.pruner].reads}
        beside = {
            'refresh_statistics': self.c_rate,
            'pruned_dropout': self.dropout > 0,
            'cut_at': self.cut > 0,
        }
        unread |= {name for name, other in beside.items() if not other}
        self.refuse(unread, f'--pruner={self.pruner}')
        of_solvers = {name for solver in SOLVERS.values() for name in solver.reads}
        unread = of_solvers - {*SOLVERS[self.optimizer].reads}
        self.refuse(unread, f'--optimizer={self.optimizer}')

    def refuse(self, names: Collection[str], beside: str) -> None:
        """Refuses flags that were given, though nothing reads them beside another one.

        Raises:
          ValueError: if there is one.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name in names:
                raise ValueError(
                    f'--{field.name}={value} has no meaning with the other flags, such as {beside}'
                )

    @property
    def network_options(self) -> dict[str, Any]:
        """What the network is made with beside its name."""
        return {}


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
