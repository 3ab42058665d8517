"""Tests of files.sharing: clusters are those of k-means, and their gradients add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import full, random_network

from dns_jax.files.sharing import expand, round_codebooks
from dns_jax.files.sharing import share_weights as share

KERNEL = np.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.25]], np.float32)
PARAMS = {'fc': {'kernel': KERNEL, 'bias': np.array([7, 8], np.float32)}}
MASKS = {'fc': {'kernel': KERNEL != 0, 'bias': np.array(True)}}
W, T = np.ones(2, np.float32), np.ones(2, bool)


@pytest.mark.parametrize('clusters', [1, 2, 5, 16])
def test_each_weight_is_in_the_nearest_cluster(clusters):
    params, masks = random_network(scale=0.5)
    network = share(params, masks, clusters)
    for layer, book in network.codebooks.items():
        assert 1 <= len(book) <= clusters
        assert (np.diff(book) > 0).all()
        used = []
        for leaf, mask in full(masks, params)[layer].items():
            weights = params[layer][leaf][mask].astype(np.float64)
            places = network.assignments[layer][leaf][mask]
            distances = np.abs(weights[:, None] - book.astype(np.float64))
            chosen = distances[np.arange(len(weights)), places]
            np.testing.assert_array_equal(chosen, distances.min(1))
            used.append(places)
        np.testing.assert_array_equal(np.unique(np.concatenate(used)), np.arange(len(book)))


def lloyd(values, clusters):
    """K-means from evenly spaced centroids, until nothing moves."""
    centroids = np.linspace(values.min(), values.max(), clusters)
    while True:
        nearest = np.abs(values[:, None] - centroids).argmin(1)
        moved = np.array([values[nearest == each].mean() for each in range(clusters)])
        if (moved == centroids).all():
            return centroids
        centroids = moved


def test_centroids_are_those_of_k_means():
    values = np.random.default_rng(1).uniform(-1, 1, 500).astype(np.float32)
    book = share(values, np.ones(500, bool), 6).codebooks['']
    wanted = round_codebooks({'': lloyd(values.astype(np.float64), 6)})['']
    np.testing.assert_array_equal(book, wanted)


def test_initialisation_is_linear_not_by_density():
    """A lone large weight keeps a centroid of its own, as the paper wants."""
    values = np.concatenate([np.linspace(0, 0.1, 1000), [1.0]]).astype(np.float32)
    assert share(values, np.ones(1001, bool), 2).codebooks[''][1] == 1.0


def test_values_that_round_to_one_are_one():
    network = share(np.float32([1, 1 + 2**-20, 2]), np.ones(3, bool), 3)
    np.testing.assert_array_equal(network.codebooks[''], np.float32([1, 2]))


def test_weights_that_k_means_cannot_tell_apart():
    """Beside 1e9, float32 has no room for 1, 2 and 3, so that fewer clusters come out."""
    values = np.float32([1, 2, 3, 1e9])
    network = share(values, np.ones(4, bool), 3)
    assert 1 < len(network.codebooks['']) <= 3
    np.testing.assert_allclose(expand(*network[:3])[-1], 1e9, rtol=0.01)


def test_bias_and_kernel_share_a_codebook():
    network = share(PARAMS, MASKS, 2)
    assert list(network.codebooks) == ['fc']
    np.testing.assert_array_equal(
        network.codebooks['fc'], round_codebooks({'': [-1 / 12, 7.5]})['']
    )
    np.testing.assert_array_equal(network.assignments['fc']['bias'], [1, 1])


def test_clusters_by_pattern():
    params, masks = random_network(scale=0.9)
    network = share(params, masks, {'a': 3, '*': 5})
    assert {layer: len(book) for layer, book in network.codebooks.items()} == {
        'a': 3,
        'b': 5,
        'c': 5,
    }


def test_rounding():
    edges = [0.0, 1.0, 0.1, -0.1, 1e-45, 3.4028235e38, -3.4028235e38]
    (rounded,) = round_codebooks({'a': edges}).values()
    assert rounded.dtype == np.float32
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(rounded[:4], edges[:4], rtol=2**-8)
    assert np.isfinite(rounded).all()
    np.testing.assert_array_equal(round_codebooks({'a': rounded})['a'], rounded)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"codebooks\['a'\] has a value that is not finite"):
            round_codebooks({'a': [1.0, bad]})


def test_gradient_of_a_centroid_is_the_sum_over_its_cluster():
    params, masks = random_network(scale=0.5)
    network = share(params, masks, 4)
    factors = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), params)

    @jax.jit
    def loss(codebooks):
        weights = expand(codebooks, network.assignments, network.masks)
        parts = jax.tree.map(
            lambda leaf, factor: jnp.sum(jnp.sin(leaf) * factor.astype(np.float32)),
            weights,
            factors,
        )
        return sum(jax.tree.leaves(parts))

    gradients = jax.grad(loss)(jax.tree.map(jnp.asarray, network.codebooks))
    masks = full(masks, params)
    for layer, book in network.codebooks.items():
        wanted = np.zeros(len(book))
        for leaf, mask in masks[layer].items():
            places = network.assignments[layer][leaf][mask]
            of_weights = (np.cos(book[places].astype(np.float64))) * factors[layer][leaf][mask]
            np.add.at(wanted, places, of_weights)
        np.testing.assert_allclose(gradients[layer], wanted, atol=1e-5)


def test_expand_writes_zeros_where_pruned_and_all_under_a_scalar_mask():
    books = {'': np.float32([5, 6])}
    assignments = {'a': np.int32([[0, 1], [1, 0]]), 'b': np.int32([1, 1])}
    masks = {'a': np.array([[True, False], [True, False]]), 'b': np.array(False)}
    weights = expand(books, assignments, masks)
    np.testing.assert_array_equal(weights['a'], np.float32([[5, 0], [6, 0]]), strict=True)
    np.testing.assert_array_equal(weights['b'], np.float32([6, 6]), strict=True)


def test_expand_refuses():
    with pytest.raises(ValueError, match="codebooks must have the layer 'a'"):
        expand({'b': np.zeros(1)}, {'a': {'w': np.zeros(2, int)}}, {'a': {'w': np.ones(2, bool)}})
    with pytest.raises(ValueError, match='masks must have the leaves of params'):
        expand({'': np.zeros(1)}, {'w': np.zeros(2, int)}, {'v': np.ones(2, bool)})


@pytest.mark.parametrize(
    ('params', 'masks', 'clusters', 'error', 'message'),
    [
        ({'a': W}, {'b': T}, 2, ValueError, 'masks must have the leaves of params'),
        ({'a': W}, {'a': W}, 2, TypeError, r"masks\['a'\] must be boolean"),
        ({'a': np.ones(2)}, {'a': T}, 2, TypeError, r"params\['a'\].*float64"),
        ({'a': W * np.nan}, {'a': T}, 2, ValueError, r"params\['a'\].*not finite"),
        ({'a': W * np.inf}, {'a': np.array(True)}, 2, ValueError, r"params\['a'\].*not finite"),
        ({'a': W}, {'a': T}, 0, ValueError, r"clusters=0: wanted 1 to 65536 for the layers \[''\]"),
        ({'a': W}, {'a': T}, 65537, ValueError, 'clusters=65537'),
        ({'a': {'w': W}, 'b': {'w': W}}, {'a': {'w': T}, 'b': {'w': T}}, {'a': 3}, ValueError, 'b'),
        ({'a': W}, {'a': T}, {'*': 3, 'x': 4}, ValueError, "pattern 'x' is the first match"),
    ],
)
def test_what_cannot_be_shared(params, masks, clusters, error, message):
    with pytest.raises(error, match=message):
        share(params, masks, clusters)
