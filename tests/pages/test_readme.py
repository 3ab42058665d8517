"""The README: it is short, its example runs, its numbers are those of the results."""

import json
import re
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import dns_jax
from experiments import results

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_example_runs_and_is_short():
    """At most 15 lines, and no idea that the paper does not have."""
    (loop,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert len(loop.splitlines()) <= 15
    for word in ('Rule', 'density', 'refresh', 'update_probability', 'rule', 'optax.tree'):
        assert word not in loop
    names = {}
    # A reader's own code adds biases as JAX allows by default.
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        exec(compile(loop, 'README.md', 'exec'), names)
    masks, small = dns_jax.get_masks(names['state']), names['small']
    assert dns_jax.measure_sizes(small, masks).total.compression == 4.0
    assert jnp.count_nonzero(small['fc']['kernel']) == 5  # and four biases
    assert names['loss'] < 1e-6  # four connections are all that the network needs


@pytest.mark.parametrize(
    ('title', 'variant'),
    [
        ('surgery', 'surgery'),
        ('surgery without splicing', 'without splicing'),
        ('gradual pruning', 'gradual'),
        ('pruning in rounds', 'Han et al., by density'),
        ('RigL', 'RigL'),
        ('SET', 'SET'),
        ('pruning in one step', 'one shot'),
    ],
)
def test_the_comparison_is_that_of_the_results(title, variant):
    rows = results.read_comparison(ROOT / 'results' / 'compare_lenet300.csv')
    errors = (
        statistics.median(
            row['test_error'] for row in rows if (row['variant'], row['target']) == (variant, size)
        )
        for size in (50, 100)
    )
    cells = (f'{error:.2f} %' for error in errors)
    assert ['', title, *cells, ''] in [re.split(r' *\| *', line) for line in README.splitlines()]


def test_what_surgery_reaches_is_that_of_the_results():
    text = ' '.join(README.split())
    rows = results.read_frontiers()
    for network, target in (('lenet300', 60), ('lenet5', 200)):
        error = statistics.median(
            row['test_error']
            for row in rows
            if (row['network'], row['target']) == (network, target)
        )
        assert f'reaches {target}× at {error:.2f} %' in text
    rows = results.read_comparison(ROOT / 'results' / 'compare_lenet300.csv')
    reference = statistics.median(row['reference_error'] for row in rows)
    assert f'with an error of {reference:.2f} %,' in text


def test_the_price_is_the_highest_that_was_measured():
    bench, scale = (
        json.loads((ROOT / 'results' / f'{name}.json').read_text()) for name in ('bench', 'scale')
    )
    ratios = [bench[name]['ratio'] for name in ('lenet300', 'lenet5')]
    ratios += [row['moving'] for loop in bench['loops'].values() for row in loop.values()]
    ratios += [scale['step']['ratio'], *(row.get('ratio', 0) for row in scale['sizes'])]
    assert f'a step takes up to {100 * max(ratios) - 100:.0f} % longer' in README


def test_the_tree_names_folders():
    (tree,) = re.findall(r'```text\n(.*?)```', README, re.DOTALL)
    for name in re.findall(r'(\w+)/', tree):
        assert any((folder / name).is_dir() for folder in (ROOT, ROOT / 'dns_jax'))
