"""Tests of low_rank: sizes, errors and tables of short runs on the digits."""

import csv
from pathlib import Path

import pytest

from experiments import low_rank
from experiments.low_rank import LowRankConfig


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    config = LowRankConfig(
        workdir=str(tmp_path_factory.mktemp('low_rank') / 'run'),
        dataset='digits',
        data_dir=str(data_dir),
        seeds=1,
        sizes='1.05,8',
        compressions='8,40',
        steps=300,
        tuning_steps=200,
    )
    return config, low_rank.compare(config)


def test_networks_are_as_small_as_asked_for(run):
    _, rows = run
    for row in rows:
        wanted = 266_610 / (row['compression'] or row['size'])
        assert wanted * 0.9 <= row['kept'] <= wanted
    assert [(row['size'], row['compression']) for row in rows] == [
        *((1.05, None), (8, None)),
        *((1.05, 8), (8, 40)),
    ]


def test_training_makes_good_what_factorising_lost(run):
    _, rows = run
    large, small, *_ = rows
    assert small['reference_error'] < 25  # chance is 90 %
    assert large['untuned_error'] == pytest.approx(large['reference_error'], abs=1)
    assert small['untuned_error'] > small['reference_error']
    assert small['test_error'] < small['untuned_error']


def test_files_and_table_have_every_row(run):
    config, rows = run
    with open(f'{config.workdir}/low_rank.csv', newline='') as file:
        written = list(csv.DictReader(file))
    assert [float(row['test_error']) for row in written] == [row['test_error'] for row in rows]
    table = Path(config.workdir, 'low_rank.md').read_text()
    assert table.count('surgery to') == 2


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'sizes': '0.5'}, '--sizes'),
        ({'sizes': '2,x'}, '--sizes'),
        ({'compressions': '10'}, '--compressions=10 must be as many'),
    ],
)
def test_sizes_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LowRankConfig(**fields)
