"""Tests of sweeps.studies: storages, who wins, and who is hopeless."""

import contextlib
import re
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from experiments import search
from experiments.sweeps import studies


@pytest.mark.parametrize(
    ('url', 'error', 'message'),
    [
        ('oracles', ValueError, 'oracles must be the URL of a database, such as postgresql'),
        ('oracles://me:secret@host/name', ValueError, r'oracles://\*\*\*@host/name must be the'),
        ('postgresql://me:secret@host:1x/name', ValueError, r'//\*\*\*@host:\*\*\*/name must be'),
        ('postgresql://me:secret/name', ValueError, r'postgresql://me:\*\*\*/name must be'),
        ('mysql+none://me:secret@host:1/name?password=secret', ValueError, '@host:1/name must be'),
        ('sqlite:///missing/study.db', OSError, r'sqlite:///missing/study.db: unable to open'),
    ],
)
def test_a_storage_that_is_none_is_refused(make_played, url, error, message):
    config = make_played(storage=url)
    with pytest.raises(error, match=f'^--storage=.*{message}') as caught:
        search.search(config)
    assert 'secret' not in str(caught.value)
    assert not Path(config.workdir).exists()


def test_a_database_without_its_driver_or_server_is_refused_without_the_password(make_played):
    # Whether a driver is installed or not, nobody listens there.
    config = make_played(storage='mysql+pymysql://me:s3cr@t/word@localhost:1/name?password=s3cr')
    with pytest.raises(
        (ValueError, OSError), match=r'^--storage=mysql.*localhost:1/name'
    ) as caught:
        search.search(config)
    assert not re.search('s3cr|word', str(caught.value))
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize('failures', [2, 3])
def test_a_database_in_the_making_is_tried_again(make_config, monkeypatch, tmp_path, failures):
    """As where another worker makes the same tables at the same moment."""
    make, pauses = optuna.storages.RDBStorage.__init__, []

    def make_storage(*args, **kwargs):
        if len(pauses) < failures:
            raise sqlalchemy.exc.IntegrityError('INSERT', None, ValueError('it is there'))
        make(*args, **kwargs)

    monkeypatch.setattr(optuna.storages.RDBStorage, '__init__', make_storage)
    monkeypatch.setattr(studies.time, 'sleep', pauses.append)
    outcome = (
        contextlib.nullcontext() if failures == 2 else pytest.raises(sqlalchemy.exc.DBAPIError)
    )
    with outcome:
        assert studies.open_study(f'sqlite:///{tmp_path}/study.db', make_config()).trials == []
    assert len(pauses) == 2


def trial_like(number=0, value=0.0, constraint=0.0, course=()):
    trial = optuna.create_trial(
        value=value,
        constraints={'validation error': constraint},
        intermediate_values=dict(enumerate(course, start=1)),
    )
    trial.number = number
    return trial


def test_the_best_is_the_smallest_allowed_and_of_these_the_first():
    rows = [(0, 5.0, 0.1), (1, 9.0, -3.0), (2, 7.0, 0.0), (3, 7.0, -1.0), (4, 8.0, -1.0)]
    trials = [trial_like(*row) for row in rows]
    assert studies.find_best(trials).number == 2
    assert studies.find_best(trials[::-1]).number == 2
    assert studies.find_best(trials[:1]) is None
    assert studies.find_best([]) is None


def test_hopeless_is_what_would_have_to_recover_more_than_any():
    # From step 2 to their ends they fall by 4, 3, 1, −2 and −5 points.
    others = [trial_like(course=(9, 6 + fall, 7, 6)) for fall in (4, 3, 1, -2, -5)]
    assert not studies.is_hopeless(others, 2, 4.0)
    assert studies.is_hopeless(others, 2, 4.1)
    assert not studies.is_hopeless(others[:4], 2, 50.0)
    assert not studies.is_hopeless(others, 5, 50.0)
    # What is allowed already is never hopeless, even if all others got worse.
    worse = [trial_like(course=(1, 2))] * 5
    assert not studies.is_hopeless(worse, 1, 0.0)
    assert not studies.is_hopeless(worse, 1, -0.5)
    assert studies.is_hopeless(worse, 1, 0.1)
