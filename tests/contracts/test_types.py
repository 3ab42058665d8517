"""What a type checker says of the code in the pages."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dns_jax

COMPAT_TABLE = 'field'
SCRIPT = """
import jax
import jax.numpy as jnp
import optax

import dns_jax
from dns_jax.files.sparse import load_sparse

params = {'fc': {'kernel': jnp.ones((4, 4)), 'bias': jnp.ones(4)}}
rule = dns_jax.Rule(dns_jax.global_density(0.1), 0.5)
pruner = dns_jax.surgery(rule, jax.random.key(0))
optimizer = optax.chain(dns_jax.prune_to(compression=10, steps=100), optax.adam(1e-3))
state = optimizer.init(params)
masks = dns_jax.get_masks(state)
print(dns_jax.apply_masks(params, masks)['fc']['kernel'].shape)
print(load_sparse('file').params['fc']['kernel'].shape, load_sparse('file').masks['fc'])
print(pruner.init(params).masks['fc'], pruner.init(params).thresholds['fc'].low)
print(masks['fc']['kernel'].sum())
print(dns_jax.prune_to(density=0.1, steps=10).init(params).masks['fc'])
print(dns_jax.freeze(masks).init(params).masks)
sizes = dns_jax.measure_sizes(params, masks)
print(sizes.total.compression + 1, sizes.layers['fc'].kept // 2)
loss, grads = dns_jax.masked_value_and_grad(lambda p, x: (p['fc']['kernel'] @ x).sum())(
    params, masks, jnp.ones(4)
)
print(loss + 1, grads['fc'])
print(dns_jax.count_kept(masks)['fc'] + 1, dns_jax.count_events(masks, masks)['fc'].pruned)
(apart,) = dns_jax.unstack({'fc': 0}, params)
print(apart['fc'], dns_jax.init_masks(params)['fc'], dns_jax.find_empty_layers(masks)[0])
_, new = pruner.update(grads, pruner.init(params), params)
print(new.masks['fc'])
tuples = (jnp.ones(3), jnp.ones(3))
first, second = dns_jax.apply_masks(tuples, tuples)
print(first.shape)
"""


def test_pyright_takes_what_the_pages_show(tmp_path):
    pyright = Path(sys.executable).parent / 'pyright'
    if not pyright.exists():
        pytest.skip('no pyright')
    root = Path(dns_jax.__file__).parents[1]
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'pyrightconfig.json').write_text(
        json.dumps({'typeCheckingMode': 'standard', 'extraPaths': [str(root)]})
    )
    done = subprocess.run(
        [pyright, '--pythonpath', sys.executable, '-p', tmp_path, tmp_path / 'script.py'],
        capture_output=True,
        text=True,
        check=False,
    )
    if 'nodeenv' in done.stderr:
        pytest.skip('no node')
    assert '0 errors' in done.stdout, textwrap.indent(done.stdout, '  ')
