"""The flags of the commands that stand on runs: sweeps, comparisons, searches, the bench, the zoo.

Each is a frozen dataclass as `flags.Config` is.
"""

import collections
import dataclasses
import math
import os
import re
import shlex
from typing import Any

from absl import flags as absl_flags

from experiments import data
from experiments.flags import Config, check_finite, define, flag, is_flag
from experiments.parsers import parse_table

_FEWEST_IMAGES = 64  # two batches of those that decoding is timed with

# What all variants of a comparison have in common.
_SHARED = {
    *('dataset', 'data_dir', 'manual_dir', 'train_on_all', 'workdir', 'reference', 'resume'),
    *('overwrite', 'tensorboard', 'seed', 'batch_size', 'compression', 'dropout'),
    *('reference_steps', 'reference_learning_rate', 'reference_weight_decay'),
}


@dataclasses.dataclass(frozen=True)
class FrontierConfig(Config):
    """What `experiments.frontier` sweeps: the flags of its runs, and these."""

    network: str = flag('lenet300', 'Network.', choices=('lenet300', 'lenet5'))
    workdir: str = flag('runs/frontier', 'Folder of the sweep, with one folder for each run.')
    compressions: str = flag('30,60,120', 'The compressions to reach, with commas between.')
    seeds: int = flag(
        5, 'Runs of each, with the seeds from --seed on.', lower_bound=1, upper_bound=1_000
    )
    side_by_side: int = flag(5, 'Seeds trained in one program, at most.', lower_bound=1)

    def __post_init__(self):
        self.runs()  # each checks itself

    def runs(self) -> list[Config]:
        """Returns the configuration of every run, by compression, then seed.

        The first compression trains the references, those after it start from them.
        """
        compressions = self.targets()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        runs = []
        for number, compression in enumerate(compressions):
            for seed in range(self.seed, self.seed + self.seeds):
                first = f'{self.workdir}/{compressions[0]:g}-{seed}'
                own = {
                    'seed': seed,
                    'compression': compression,
                    'workdir': f'{self.workdir}/{compression:g}-{seed}',
                    'reference': first if number and not self.reference else self.reference,
                }
                runs.append(Config(**{**fields, **own}))
        return runs

    def targets(self) -> list[float]:
        """Returns the compressions to reach."""
        try:
            compressions = [float(text) for text in self.compressions.split(',')]
        except ValueError as error:
            raise ValueError(
                f'--compressions={self.compressions} must be numbers with commas between'
            ) from error
        if len(set(compressions)) < len(compressions):
            raise ValueError(f'--compressions={self.compressions} names one twice')
        if self.compression is not None:
            raise ValueError(f'--compression={self.compression} has no place beside --compressions')
        return compressions


@dataclasses.dataclass(frozen=True)
class CompareConfig(FrontierConfig):
    """What `experiments.compare` compares: the flags that its runs share, and these."""

    workdir: str = flag('runs/compare', 'Folder of the comparison, one folder in it for each run.')
    variant: tuple[str, ...] = flag(
        (),
        'NAME: FLAGS of one of the things to compare, as "no splicing: --nosplicing"; to be given '
        'again for each. One that says by itself what to keep is run once for all compressions.',
    )

    def __post_init__(self):
        lengths = {run.surgery_steps + run.finetuning_steps for _, run in self.named_runs()}
        if len(lengths) > 1:
            raise ValueError(f'--variant: all must take as many steps, but take {sorted(lengths)}')
        folders = collections.Counter(run.workdir for run in self.runs())
        twice = sorted(folder for folder, count in folders.items() if count > 1)
        if twice:
            raise ValueError(
                f'--variant: names must differ in letters and digits, but two make {twice}'
            )

    def runs(self) -> list[Config]:
        """Returns the configuration of every run, by variant, compression, then seed.

        The first of each seed trains its reference, those after it start from that.
        """
        return [run for _, run in self.named_runs()]

    def named_runs(self) -> list[tuple[str, Config]]:
        """Returns the same with the name of the variant."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        runs, first = [], {}
        for name, changed in self._variants().items():
            slug = re.sub(r'\W+', '-', name.lower()).strip('-')
            says_itself = changed.keys() & {'density', 'layer_density', 'c_rate'}
            for target in [None] if says_itself else self.targets():
                for seed in range(self.seed, self.seed + self.seeds):
                    label = f'{slug}-{seed}' if target is None else f'{slug}-{target:g}-{seed}'
                    folder = f'{self.workdir}/{label}'
                    own = {
                        'seed': seed,
                        'compression': target,
                        'workdir': folder,
                        'reference': self.reference or first.get(seed),
                    }
                    first.setdefault(seed, folder)
                    runs.append((name, Config(**{**fields, **changed, **own})))
        return runs

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Returns the fields that each variant changes, by its name."""
        variants = {}
        for text in self.variant:
            name, colon, arguments = text.partition(':')
            if not colon or not name.strip() or name.strip() in variants:
                raise ValueError(f'--variant={text} must be NAME: FLAGS, with a name of its own')
            flag_values = absl_flags.FlagValues()
            define(Config, {}, flag_values)
            try:
                left = flag_values(['--variant', *shlex.split(arguments)])[1:]
            except (absl_flags.Error, ValueError) as error:  # the latter for an open quote
                raise ValueError(f'--variant={text}: {error}') from error
            names = [field.name for field in filter(is_flag, dataclasses.fields(Config))]
            changed = {name: flag_values[name].value for name in names if flag_values[name].present}
            if left or changed.keys() & _SHARED:
                raise ValueError(
                    f'--variant={text} may change how is pruned and fine-tuned, but not '
                    f'{left or sorted(changed.keys() & _SHARED)}'
                )
            variants[name.strip()] = changed
        if not variants:
            raise ValueError('--variant must be given at least once')
        return variants


@dataclasses.dataclass(frozen=True)
class SearchConfig(Config):
    """What `experiments.search` searches: the flags of its runs, and these."""

    network: str = flag('lenet300', 'Network.', choices=('lenet300', 'lenet5'))
    workdir: str = flag('runs/search', 'Folder of the search.')
    space: str = flag(
        'layer_density',
        'What is chosen: compression, one for the network, 20 to 1000; layer_density, 0.001 to 1 '
        'each; or c_rate, 0 to 6 each. With it go the end of the ramp, at 40 to 90 % of the way to '
        '--stop, and factors on the learning rate, 0.3 to 3, and the weight decay, 0.1 to 4.',
        choices=('compression', 'layer_density', 'c_rate'),
    )
    trials: int = flag(
        100, 'Trials of the study in all, after which no worker begins another.', lower_bound=1
    )
    tolerance: float = flag(0.1, 'Points of validation error allowed above the reference.')
    study: str = flag('search', 'Name of the study; workers that give the same work together.')
    storage: str | None = flag(None, 'URL of the database; by default study.db in the workdir.')

    # What the search chooses by itself or has no use for: fields, but no flags.
    compression: float | None = None
    density: float | None = None
    layer_density: str = ''
    c_rate: str = ''
    ramp_end: str = '80%'
    refresh_statistics: int = 0
    cut: float = 0.0
    cut_at: str = '50%'
    count_returns: bool = False
    on_divergence: str = 'stop'
    train_on_all: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self):
        self.to_run(density=1.0)  # checks what runs and the search have in common
        if not math.isfinite(self.tolerance):
            raise ValueError(f'--tolerance={self.tolerance} must be finite')

    def to_run(self, **chosen: Any) -> Config:
        """Returns the configuration of a run with these flags and what was chosen."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**{**fields, **chosen})


@dataclasses.dataclass(frozen=True)
class XorConfig:
    """What `experiments.xor` does."""

    workdir: str = flag('runs/xor', 'Folder of the result.')
    seed: int = flag(0, 'Seeds the points and all networks.', lower_bound=0)
    seeds: int = flag(100, 'Networks under each pruner.', lower_bound=1)
    steps: int = flag(8_000, 'Steps of dense training, and again of pruning.', lower_bound=100)
    noise: float = flag(0.16, 'Standard deviation of the points around the four corners.')
    solved: float = flag(1.0, 'The largest error, in percent, that counts as solved.')

    def __post_init__(self):
        if not 0 < self.noise < math.inf:
            raise ValueError(f'--noise={self.noise} must be finite and above 0')
        if not 0 <= self.solved <= 100:
            raise ValueError(f'--solved={self.solved} must be a percentage')


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """What `experiments.zoo` publishes."""

    workdir: str = flag('runs/latest', 'Folder of a finished run.')
    name: str = flag('', 'Name of the network in the zoo.')

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f'--name={self.name!r} must be letters, digits and underscores')


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `experiments.bench` measures."""

    rounds: int = flag(30, 'Timed calls of each program, in alternation.', lower_bound=1)
    peer: str | None = flag(None, 'A Python that can run the peer; no peer by default.')
    peer_script: str = flag('../shared/peers/torch_step.py', 'The script of the peer.')
    peer_rounds: int = flag(3, 'How often the peer runs, between our rounds.', lower_bound=1)

    def __post_init__(self):
        if self.peer and not os.path.isfile(self.peer_script):  # a Path raises for long names
            raise ValueError(f'--peer_script must be a file, but is {self.peer_script!r}')
        if self.peer_rounds > self.rounds:
            raise ValueError(
                f'--peer_rounds={self.peer_rounds} must be at most --rounds={self.rounds}'
            )


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """What `experiments.scale` measures."""

    network: str = flag('alexnet', 'Network of the step.', choices=('alexnet', 'vgg16'))
    width: float = flag(1.0, 'Channels and hidden units / those of the paper.', lower_bound=0.0)
    batch_size: int = flag(
        0, 'Images per step; by default 8 on CPU and 256 on an accelerator.', lower_bound=0
    )
    compute_dtype: str = flag(
        'float32', 'What the networks compute in.', choices=('float32', 'bfloat16')
    )
    rounds: int = flag(15, 'Timed steps of each program, in alternation.', lower_bound=1)
    sizes: str = flag(
        '0.3,3,30,138',
        'Weights of fully connected networks whose steps are timed, in millions, with commas '
        'between.',
    )
    planned_sizes: str = flag(
        '1000', 'The same for those that are compiled but not run, with no arrays made.'
    )
    sized_batch: int = flag(64, 'Images per step of these networks.', lower_bound=1)
    images: int = flag(
        2_000, 'Images made to time their decoding; 0 leaves that out.', lower_bound=0
    )
    xla_options: str = flag(
        '',
        'Options of the compiler, as NAME=VALUE with commas between, such as '
        'xla_cpu_copy_insertion_use_region_analysis=true.',
    )
    output: str = flag('results/scale', 'What is written: OUTPUT.json, OUTPUT.png and OUTPUT.md.')

    def __post_init__(self):
        if not 0 < self.width < math.inf:
            raise ValueError(f'--width={self.width} must be finite and above 0')
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
class LatencyConfig:
    """What `experiments.latency` measures."""

    model: str = flag(
        'zoo/lenet5.safetensors', 'A pruned network: its file, or fc:INPUTSxUNITS:DENSITY.'
    )
    batches: str = flag('1,64', 'Examples in a call, with commas between.')
    turns: int = flag(31, 'Timed turns of each way, in alternation.', lower_bound=1)
    break_even: bool = flag(
        False, 'Also find, for a layer fc:…, the densities at which sparse is as fast as dense.'
    )
    output: str | None = flag(None, 'A JSON file to write the result to.')

    def __post_init__(self):
        self.sizes()
        if self.break_even and not self.model.startswith('fc:'):
            raise ValueError(f'--break_even is of a layer, not of --model={self.model}')

    def sizes(self) -> list[int]:
        """Returns the sizes of the batches."""
        if not re.fullmatch(r'[1-9]\d{0,5}(,[1-9]\d{0,5})*', self.batches):
            raise ValueError(f'--batches={self.batches} must be numbers with commas between')
        return [int(size) for size in self.batches.split(',')]


_OF_CODING = (
    *('clusters', 'tuned', 'finetuning_steps', 'learning_rate', 'batch_size', 'seed'),
    *('dataset', 'data_dir', 'manual_dir', 'train_on_all'),
)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What `experiments.export` writes."""

    model: str = flag('zoo/lenet5.safetensors', 'File of a pruned network.')
    format: str = flag(
        'sparse',
        'dense and sparse are safetensors, coded is Deep Compression, caffemodel has the masks '
        'beside the weights, as the authors have them; sparse, onnx and stablehlo hold the network '
        'as compaction leaves it.',
        choices=('dense', 'sparse', 'coded', 'caffemodel', 'onnx', 'stablehlo'),
    )
    output: str | None = flag(None, 'The file to write; by default it goes to runs/exports.')
    batch: int = flag(
        1, 'Examples in a call, for which sparse records the fastest kinds.', lower_bound=1
    )

    clusters: str = flag('16', 'Values that the weights of a layer share, as LAYER:NUMBER,…')
    tuned: str = flag(
        'weights',
        'What is tuned: the shared values alone, or also the weights, which then choose anew.',
        choices=('codebooks', 'weights'),
    )
    finetuning_steps: int = flag(1_500, 'Steps of tuning.', lower_bound=0)
    learning_rate: float = flag(5e-4, "Adam's rate at its start.", lower_bound=0.0)
    batch_size: int = flag(64, 'Images per step.', lower_bound=1)
    seed: int = flag(0, 'Seeds the order of the images.', lower_bound=0)
    dataset: str = flag('mnist', 'Data set to tune on.', choices=data.DATASETS)
    data_dir: str | None = flag(None, 'TFDS folder; by default TFDS chooses.')
    manual_dir: str | None = flag(None, "Folder with the set's published files, read offline.")
    train_on_all: bool = flag(False, 'Tune on the validation images too.')

    def __post_init__(self):
        unread = [] if self.format == 'coded' else list(_OF_CODING)
        unread += [] if self.format == 'sparse' else ['batch']
        if not self.finetuning_steps:
            unread += ['tuned', 'learning_rate', 'batch_size', 'seed', 'train_on_all']
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                raise ValueError(f'--{field.name}={value} has no meaning beside the other flags')
        if self.format == 'coded' and not (self.output or '.dns').endswith('.dns'):
            raise ValueError(f'--output={self.output} must end in .dns, by which it is known')
        check_finite(self)
        self.parse_clusters()

    def parse_clusters(self) -> dict[str, int]:
        """Returns how many values each layer may have, by patterns."""
        try:
            return parse_table(self.clusters, int)
        except ValueError as error:
            raise ValueError(f'--clusters: {error}') from error
