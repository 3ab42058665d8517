"""VGG-16 on ImageNet: the network that the paper's readers asked for.

python -m experiments.vgg16 --flagfile=experiments/flagfiles/vgg16_imagenet.flags
"""

from experiments.config import command_line
from experiments.devices import hosts
from experiments.training.image_flags import ImageConfig
from experiments.training.run import run

DEFAULTS = {
    'network': 'vgg16',
    'image_size': 224,
    'workdir': 'runs/vgg16',
    'batch_size': 256,
    'reference_steps': 370_000,
    'surgery_steps': 370_000,
    'finetuning_steps': 0,
    'record_every': 1_000,
    'checkpoint_every': 5_000,
    'reference_learning_rate': 'step:0.01,0.1,125000',
    'learning_rate': 'poly:0.002,1',
    'dropout': 0.5,
}

if __name__ == '__main__':
    command_line.launch(DEFAULTS, hosts.with_processes(run), ImageConfig)
