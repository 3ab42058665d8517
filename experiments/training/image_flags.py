"""The flags of runs on streamed images, those of ImageNet above all: `flags.Config` and more."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from experiments.config.command_line import flag
from experiments.data.crops import CROPS
from experiments.devices.hosts import parse_distributed
from experiments.devices.meshes import parse_mesh
from experiments.training.flags import Config


@dataclasses.dataclass(frozen=True)
class ImageConfig(Config):
    """What a run on streamed images does: the flags of every run, and these."""

    dataset: str = flag(
        'imagenet2012',
        'Image classification set of TFDS; imagenet2012 needs --manual_dir until it is prepared.',
    )
    image_size: int = flag(224, 'Height and width of the images, in pixels.', lower_bound=1)
    crop: str = flag(
        'caffe',
        'What to take of an image. caffe: the image is warped to 256/227 of --image_size, and a '
        'random part of that is taken, mirrored or not; random_resized: a random part of 8 to '
        '100 % of the image, mirrored or not; whole: the whole image.',
        choices=CROPS,
    )
    width: float = flag(
        1.0, "Channels and hidden units, as a share of the paper's.", lower_bound=0.0
    )
    compute_dtype: str = flag(
        'float32',
        'Data type in which the network computes; weights stay float32, masks bool.',
        choices=('float32', 'bfloat16'),
    )
    accumulate: int = flag(
        1,
        'Parts of a batch that are computed one after the other, to need less memory.',
        lower_bound=1,
    )
    workers: int = flag(
        0,
        'Processes that decode images, for each process of the run; 0 decodes in its threads.',
        decides=False,
        lower_bound=0,
    )
    mesh: str = flag(
        '',
        'Devices along each axis, as data:4,model:2: batches are split over data, fully connected '
        'layers over model. By default all devices share the batch.',
        decides=False,
    )
    distributed: str = flag(
        '',
        'How processes find each other: auto under SLURM, Kubernetes, Open MPI or on Cloud TPU, or '
        'HOST:PORT,PROCESSES,PROCESS. By default there is one process.',
        decides=False,
    )

    def __post_init__(self):
        super().__post_init__()
        parse_mesh(self.mesh)
        if self.distributed:
            parse_distributed(self.distributed)
        if self.width <= 0:
            raise ValueError(f'--width={self.width} must be above 0')

    @property
    def network_options(self) -> dict[str, Any]:
        """What the network is made with beside its name; how many classes, the data say."""
        return {'width': self.width, 'dtype': jnp.dtype(self.compute_dtype)}
