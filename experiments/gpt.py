r"""A small GPT on the characters of tiny Shakespeare, by AdamW.

python -m experiments.gpt --flagfile=experiments/flagfiles/gpt_shakespeare.flags \
  --kernel_density=0.1
"""

from experiments.config import command_line
from experiments.training.run import run
from experiments.training.sized_flags import ShortConfig

DEFAULTS = {
    'network': 'gpt',
    'dataset': 'tiny_shakespeare',
    'workdir': 'runs/gpt',
    'batch_size': 32,
    'reference_steps': 2_000,
    'surgery_steps': 2_000,
    'optimizer': 'adamw',
    'clip': 1.0,
    'reference_learning_rate': 'cosine:8e-3,100,0.1',
    'learning_rate': 'cosine:16e-3,100,0.1',
    'reference_weight_decay': 0.1,
    'weight_decay': 0.1,
    'decay_biases': False,
}

if __name__ == '__main__':
    command_line.launch(DEFAULTS, run, ShortConfig)
