"""The flags of runs on networks whose size is chosen: `flags.Config` and more."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.config.command_line import flag, with_default
from experiments.data import resident, texts
from experiments.training.flags import Config

# The flags that a network is made with, and those that its training reads.
_OWN = {
    'resnet': ('depth', 'width'),
    'gpt': ('depth', 'width', 'heads', 'context', 'tied'),
}
# The statistics of BatchNorm would not be those of an average.
_OF_TRAINING = {'resnet': ('shift', 'mirror', 'fresh_statistics'), 'gpt': ('average',)}


@dataclasses.dataclass(frozen=True)
class SizedConfig(Config):
    """What a run on such a network does: the flags of every run, and these."""

    dataset: str = flag(
        'mnist',
        'Data set: a residual network takes images in colour, a language model a text.',
        choices=(*resident.DATASETS, *texts.DATASETS),
        part='task',
    )
    depth: int | None = flag(
        None,
        'Layers of a residual network, 6n + 2 and by default 20; blocks of a language model, by '
        'default 2.',
        lower_bound=1,
        part='task',
    )
    width: float | None = flag(
        None,
        "Channels of a residual network, as a share of the paper's, by default 1; length of a "
        "character's vector in a language model, by default 128.",
        part='task',
    )
    heads: int | None = flag(
        None, 'Heads of attention in each block, by default 4.', lower_bound=1, part='task'
    )
    context: int | None = flag(
        None, 'Characters that a language model sees, by default 64.', lower_bound=1, part='task'
    )
    tied: bool = flag(
        False, "Whether a language model's output shares the weights of its input.", part='task'
    )
    fresh_statistics: bool = flag(
        False,
        'Whether the running statistics of BatchNorm are estimated anew in the end, in one pass '
        'over the training images, changed as in training, for the network as it is kept.',
    )

    def __post_init__(self):
        super().__post_init__()
        reads = *_OWN[self.network], *_OF_TRAINING[self.network]
        others = {name for names in (*_OWN.values(), *_OF_TRAINING.values()) for name in names}
        self.refuse(others - {*reads}, f'--network={self.network}')
        if self.dropout:
            raise ValueError(f'--dropout={self.dropout} is not for --network={self.network}')
        if self.quantiser != 'none' and self.network == 'gpt':
            raise ValueError(
                f'--quantiser={self.quantiser} rounds layer by layer, but those of --network=gpt '
                'are stacked'
            )
        if self.width is not None and self.width <= 0:
            raise ValueError(f'--width={self.width} must be above 0')
        if self.network == 'gpt' and self.width is not None and self.width % 1:
            raise ValueError(f'--width={self.width} must be a whole number for --network=gpt')

    @property
    def network_options(self) -> dict[str, Any]:
        """What the network is made with beside its name."""
        whole: Callable[[Any], Any] = int if self.network == 'gpt' else lambda value: value
        given = {name: getattr(self, name) for name in _OWN[self.network]}
        return {
            name: whole(value) if name == 'width' else value
            for name, value in given.items()
            if value not in (None, False)
        }


@dataclasses.dataclass(frozen=True)
class ShortConfig(SizedConfig):
    """The same with the defaults of `dns_jax.prune_to` under `dns_jax.slow_pruned`."""

    prune_biases: bool = with_default(Config, 'prune_biases', False)
    ramp: str = with_default(Config, 'ramp', 'poly:3')
    ramp_end: str = with_default(Config, 'ramp_end', '50%')
    stop: str = with_default(Config, 'stop', '60%')
    refresh_every: int = with_default(Config, 'refresh_every', 0)
    hysteresis: float = with_default(Config, 'hysteresis', 0.5)
    pruned_rate: float = with_default(Config, 'pruned_rate', 0.3)
    finetuning_steps: int = with_default(Config, 'finetuning_steps', 0)
