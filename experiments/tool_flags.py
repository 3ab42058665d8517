"""The flags of what stands on finished runs, or measures: each a frozen dataclass."""

import dataclasses
import math
import os
import re

from experiments.config.command_line import check_finite, flag
from experiments.config.flags import DATA_DIR_HELP, MANUAL_DIR_HELP
from experiments.config.parsers import parse_table
from experiments.data import resident

CODED = '.dns'  # how the name of a coded file ends
FEWEST_IMAGES = 64  # two batches of those that decoding is timed with


@dataclasses.dataclass(frozen=True)
class XorConfig:
    """What `experiments.xor` does."""

    workdir: str = flag('runs/xor', 'Folder that the result is written to.')
    seed: int = flag(0, 'Seeds the points and all networks.', lower_bound=0)
    seeds: int = flag(100, 'Networks under each pruner and each c.', lower_bound=1)
    steps: int = flag(
        8_000,
        'Steps of dense training, and again of pruning, rounded down to hundreds.',
        lower_bound=100,
    )
    noise: float = flag(
        0.16, 'Standard deviation of the points around the corners of a square with sides of 1.'
    )
    solved: float = flag(1.0, 'Largest error, in percent, that counts as solved.')

    def __post_init__(self):
        check_finite(self)
        if self.noise <= 0:
            raise ValueError(f'--noise={self.noise} must be above 0')
        if not 0 <= self.solved <= 100:
            raise ValueError(f'--solved={self.solved} must be a percentage')


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """What `experiments.zoo` publishes."""

    workdir: str = flag('runs/latest', 'Folder of the finished run.')
    name: str = flag('', 'Name of the network in the zoo, as that of its files; must be given.')

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f'--name={self.name!r} must be letters, digits and underscores')


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
        if 0 < self.images < FEWEST_IMAGES:
            raise ValueError(f'--images={self.images} must be 0 or at least {FEWEST_IMAGES}')
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
    turns: int = flag(31, 'Timed turns of each way to run the network.', lower_bound=1)
    break_even: bool = flag(
        False, 'Also find, for a layer fc:…, the densities at which sparse is as fast as dense.'
    )
    output: str | None = flag(
        None, 'JSON file that the result is written to; by default none is written.'
    )

    def __post_init__(self):
        self.sizes()
        if self.break_even and not self.model.startswith('fc:'):
            raise ValueError(f'--break_even is of a layer, not of --model={self.model}')

    def sizes(self) -> list[int]:
        """Returns the sizes of the batches."""
        if not re.fullmatch(r'[1-9]\d{0,5}(,[1-9]\d{0,5})*', self.batches):
            raise ValueError(f'--batches={self.batches} must be numbers with commas between')
        return [int(size) for size in self.batches.split(',')]


_CODING_FLAGS = (
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
    output: str | None = flag(None, 'File that is written; by default one in runs/exports.')
    batch: int = flag(
        1,
        'Examples in a call, for which --format=sparse records how each layer is computed fastest.',
        lower_bound=1,
    )

    clusters: str = flag(
        '16', 'With --format=coded: values that the weights of a layer share, as LAYER:NUMBER,…'
    )
    tuned: str = flag(
        'weights',
        'What is tuned with --format=coded: codebooks tunes the shared values alone; weights tunes '
        'the weights as well, each of which takes the nearest shared value.',
        choices=('codebooks', 'weights'),
    )
    finetuning_steps: int = flag(1_500, 'Steps of tuning; 0 leaves tuning out.', lower_bound=0)
    learning_rate: float = flag(
        5e-4, "Adam's learning rate at the start, from which it falls to 0.", lower_bound=0.0
    )
    batch_size: int = flag(64, 'Images per step of tuning.', lower_bound=1)
    seed: int = flag(0, 'Seeds the order of the images in tuning.', lower_bound=0)
    dataset: str = flag('mnist', 'Data set to tune on.', choices=resident.DATASETS)
    data_dir: str | None = flag(None, DATA_DIR_HELP)
    manual_dir: str | None = flag(None, MANUAL_DIR_HELP)
    train_on_all: bool = flag(False, 'Tune on the validation images too.')

    def __post_init__(self):
        unread = [] if self.format == 'coded' else list(_CODING_FLAGS)
        unread += [] if self.format == 'sparse' else ['batch']
        if not self.finetuning_steps:
            unread += ['tuned', 'learning_rate', 'batch_size', 'seed', 'train_on_all']
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                raise ValueError(f'--{field.name}={value} has no meaning beside the other flags')
        if self.format == 'coded' and not (self.output or CODED).endswith(CODED):
            raise ValueError(f'--output={self.output} must end in {CODED}, by which it is known')
        check_finite(self)
        self.parse_clusters()

    def parse_clusters(self) -> dict[str, int]:
        """Returns how many values each layer may have, by patterns."""
        try:
            return parse_table(self.clusters, int)
        except ValueError as error:
            raise ValueError(f'--clusters: {error}') from error
