"""LeNet-300-100 on MNIST: the paper's table 1, first network.

python -m experiments.lenet300 --flagfile=experiments/flagfiles/lenet300_mnist.flags
"""

from experiments.config import command_line
from experiments.training.flags import Config
from experiments.training.run import run

DEFAULTS = {'network': 'lenet300', 'workdir': 'runs/lenet300', 'surgery_steps': 25_000}

if __name__ == '__main__':
    command_line.launch(DEFAULTS, run, Config)
