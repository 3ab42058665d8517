"""AlexNet on ImageNet: the paper's table 4.

python -m experiments.alexnet --flagfile=experiments/flagfiles/alexnet_imagenet.flags
"""

from experiments.config import command_line
from experiments.devices import hosts
from experiments.training.image_flags import ImageConfig
from experiments.training.run import run

DEFAULTS = {
    'network': 'alexnet',
    'image_size': 227,
    'workdir': 'runs/alexnet',
    'batch_size': 256,
    'reference_steps': 450_000,
    'surgery_steps': 700_000,
    'finetuning_steps': 0,
    'record_every': 1_000,
    'checkpoint_every': 5_000,
    'reference_learning_rate': 'step:0.01,0.1,100000',
    'learning_rate': 'poly:0.002,1',
    'dropout': 0.5,
}

if __name__ == '__main__':
    command_line.launch(DEFAULTS, hosts.with_processes(run), ImageConfig)
