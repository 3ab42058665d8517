"""Tests of config.parsers: tables, steps and learning rates."""

import re

import numpy as np
import pytest

from experiments.config.parsers import (
    check_distinct,
    parse_learning_rate,
    parse_numbers,
    parse_step,
    parse_table,
    scale_learning_rate,
)


@pytest.mark.parametrize(
    ('text', 'number', 'expected'),
    [
        ('', float, {}),
        ('2', float, {'*': 2.0}),
        ('conv*:2,fc1:-0.5', float, {'conv*': 2.0, 'fc1': -0.5}),
        ('fc1:3,*:4,', int, {'fc1': 3, '*': 4}),
        ('a:b:1', int, {'a:b': 1}),
        ('fc1:2,3', int, {'fc1': 2, '*': 3}),
    ],
)
def test_tables(text, number, expected):
    table = parse_table(text, number)
    assert list(table.items()) == list(expected.items())
    assert all(type(value) is number for value in table.values())


@pytest.mark.parametrize(
    ('text', 'number', 'message'),
    [
        ('conv1:x', float, "'conv1:x' in 'conv1:x' is not PATTERN:NUMBER"),
        ('a:1,b', float, "'b' in 'a:1,b' is not PATTERN:NUMBER"),
        ('a:', float, "'a:' in 'a:' is not PATTERN:NUMBER"),
        (':1', float, "':1' in ':1' is not PATTERN:NUMBER"),
        ('a:1.5', int, "'a:1.5' in 'a:1.5' is not PATTERN:NUMBER"),
        ('a:1,a:2', float, "'a' stands twice in 'a:1,a:2'"),
        ('1,2', float, 'stands twice'),
        ('*:1,2', float, 'stands twice'),
    ],
)
def test_malformed_tables(text, number, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_table(text, number)


def test_what_is_named_twice_is_refused():
    check_distinct('some', [1, 2, 3])
    with pytest.raises(ValueError, match='--some names 1, 2 twice'):
        check_distinct('some', [1, 2, 1, 3, 2])


def test_numbers_have_bounds():
    assert parse_numbers('sizes', '1,2.5,1e3', 1) == [1, 2.5, 1000]
    assert parse_numbers('shares', '0,1', 0, 1) == [0, 1]


@pytest.mark.parametrize('text', ['', '2,', 'x', '1,,2', '0.9', '3.1', 'inf', 'nan'])
def test_other_numbers_are_refused(text):
    message = re.escape(f'--some must be finite numbers from 1 to 3, with commas, but has {text!r}')
    with pytest.raises(ValueError, match=message):
        parse_numbers('some', text, 1, 3)
    with pytest.raises(ValueError, match='numbers from 4, with'):
        parse_numbers('some', text, 4)


@pytest.mark.parametrize(
    ('text', 'step'), [('0', 0), ('120', 120), ('0%', 0), ('80%', 960), ('33.3%', 400)]
)
def test_steps_and_shares(text, step):
    assert parse_step(text, 1_200) == step


def test_learning_rate_policies_are_those_of_the_library():
    for text, at_50 in (
        ('fixed:0.1', 0.1),
        ('exp:0.1,0.99', 0.1 * 0.99**50),
        ('inv:0.1,0.02,0.5', 0.1 * 2**-0.5),
        ('poly:0.1,2', 0.1 * 0.5**2),
        ('step:0.1,0.5,20', 0.1 * 0.5**2),
    ):
        assert float(parse_learning_rate(text, 100)(50)) == pytest.approx(at_50)


def test_a_cosine_rises_and_falls_to_its_share():
    rate = parse_learning_rate('cosine:0.5,10,0.2', 100)
    angles = np.pi * np.arange(91) / 90
    wanted = [*(0.05 * np.arange(10)), *(0.5 * (0.2 + 0.8 * (1 + np.cos(angles)) / 2))]
    found = [float(rate(np.int32(step))) for step in range(101)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert (found[0], found[10], found[100]) == (0.0, 0.5, pytest.approx(0.1))
    at_once = parse_learning_rate('cosine:0.5,0,0', 4)
    assert [float(at_once(step)) for step in (0, 2, 4)] == pytest.approx([0.5, 0.25, 0.0])


@pytest.mark.parametrize('steps', [1, 5, 10])
def test_a_cosine_longer_than_its_phase_ends_within_it(steps):
    rate = parse_learning_rate('cosine:0.5,10,0.1', steps)
    found = [float(rate(step)) for step in range(steps + 1)]
    assert found[-1] == pytest.approx(0.05)
    assert max(found) == 0.5


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('cosine:0.1,1.5,0', 'must have a whole number of steps'),
        ('cosine:0.1,10,1.5', 'a share of at most 1'),
        ('cosine:0.1,10', 'BASE,STEPS,SHARE'),
        ('cosine:0.1,-1,0', 'cosine'),
        ('cosine:0.1,10,-0.1', 'cosine'),
        ('cosine:0.1,inf,0', 'cosine'),
        ('cosine:nan,10,0', 'cosine'),
    ],
)
def test_a_cosine_that_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_learning_rate(text, 100)


def test_the_base_of_a_learning_rate_is_scaled():
    assert scale_learning_rate('cosine:0.2,10,0.1', 0.5) == 'cosine:0.1,10,0.1'
    assert scale_learning_rate('inv:0.01,1e-4,0.75', 2.0) == 'inv:0.02,1e-4,0.75'
    assert scale_learning_rate('fixed:0.1', 1 / 3) == 'fixed:0.03333'
