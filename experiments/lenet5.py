"""LeNet-5 on MNIST: the paper's table 1, second network.

python -m experiments.lenet5 --flagfile=experiments/flagfiles/lenet5_mnist.flags
"""

from experiments.config import command_line
from experiments.training.flags import Config
from experiments.training.run import run

DEFAULTS = {'network': 'lenet5', 'workdir': 'runs/lenet5', 'surgery_steps': 16_000}

if __name__ == '__main__':
    command_line.launch(DEFAULTS, run, Config)
