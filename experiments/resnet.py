r"""ResNet-8, 20 or 56 on CIFAR-10, by SGD with momentum.

python -m experiments.resnet --flagfile=experiments/flagfiles/resnet8_cifar10.flags \
  --kernel_density=0.05
"""

from experiments.config import command_line
from experiments.training.run import run
from experiments.training.sized_flags import ShortConfig

DEFAULTS = {
    'network': 'resnet',
    'dataset': 'cifar10',
    'workdir': 'runs/resnet',
    'batch_size': 128,
    'reference_steps': 32_000,
    'surgery_steps': 32_000,
    'optimizer': 'sgd',
    'reference_learning_rate': 'cosine:0.1,500,0',
    'learning_rate': 'cosine:0.1,500,0',
    'shift': 4,
    'mirror': True,
}

if __name__ == '__main__':
    command_line.launch(DEFAULTS, run, ShortConfig)
