"""Tests of inference.stages: chains and kinds that do not fit, and layers at the ends of chains."""

import pytest
from networks import SMALL_CHAIN as CHAIN
from networks import SMALL_PARAMS as PARAMS

from dns_jax.inference.runners import jax_runner, scipy_runner


@pytest.mark.parametrize('make_runner', [jax_runner, scipy_runner])
@pytest.mark.parametrize(
    'kinds', [{}, {'a': 'dense'}, {'a': 'dense', 'b': 'tiny'}, dict.fromkeys('abc', 'dense')]
)
def test_kinds_of_other_layers(make_runner, kinds):
    with pytest.raises(ValueError, match=r"kinds must give one of .* for each of \['a', 'b'\]"):
        make_runner(CHAIN, PARAMS, (4, 4, 1), kinds)


@pytest.mark.parametrize('make_runner', [jax_runner, scipy_runner])
def test_chain_that_does_not_fit(make_runner):
    with pytest.raises(ValueError, match='kernel of shape'):
        make_runner(CHAIN, PARAMS, (4, 4, 2), {'a': 'dense', 'b': 'dense'})


def test_scipy_has_no_kernel_in_cpp():
    with pytest.raises(ValueError, match='kinds must give one of'):
        scipy_runner(CHAIN, PARAMS, (4, 4, 1), {'a': 'native', 'b': 'dense'})
