"""LeNet-5 on MNIST: the paper's table 1, second network.

python -m experiments.lenet5 --flagfile=experiments/flagfiles/lenet5_mnist.flags

The defaults are the settings of the authors' solver.
"""

from experiments import flags
from experiments.run import run

DEFAULTS = {
    'network': 'lenet5',
    'workdir': 'runs/lenet5',
    'surgery_steps': 16_000,
    'c_rate': 'conv1:2,conv2:3,fc1:4,fc2:2.5',
    'stop': 'conv*:14000,fc*:10000',
}

if __name__ == '__main__':
    flags.launch(DEFAULTS, run)
