"""The study of a search: where its trials are kept, which are given up, which wins, what they show.

Whoever imports this needs Optuna, the extra `search`.
"""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as drawing
from sqlalchemy.exc import ArgumentError, DatabaseError, SQLAlchemyError

from experiments.config.command_line import identify
from experiments.reports import plots
from experiments.sweeps.flags import SearchConfig

_HEARTBEAT = 60  # seconds; a trial that misses two was killed
_FEWEST_COMPLETED = 5  # completed trials before any is given up


def check_storage(url: str) -> None:
    """Connects to a database once.

    Raises:
      ValueError: if it is no URL of a database that can be used here.
      OSError: if the database cannot be reached.
    """
    try:
        sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect().close()
    except (ArgumentError, ValueError, TypeError):
        # Their own messages may quote what stands where a password does.
        raise ValueError(
            f'--storage={_hide_password(url)} must be the URL of a database, such as '
            'postgresql+psycopg://user:password@host/name'
        ) from None
    except ImportError as error:
        raise ValueError(f'--storage={_hide_password(url)} needs a package: {error}') from error
    except SQLAlchemyError as error:
        raise _storage_error(url, error) from error


@contextlib.contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turns what a database raises into an `OSError` that names it."""
    try:
        yield
    except Exception as error:
        # Optuna may stumble over such an error, and raise another that hides it.
        at: BaseException | None = error
        while at and not isinstance(at, SQLAlchemyError):
            at = at.__context__
        if at is None:
            raise
        raise _storage_error(url, at) from error


def _storage_error(url: str, error: SQLAlchemyError) -> OSError:
    """Says what the database itself said, if it did."""
    return OSError(f'--storage={_hide_password(url)}: {getattr(error, "orig", None) or error}')


def _hide_password(url: str) -> str:
    scheme, slashes, rest = url.partition('://')
    user, at, address = rest.rpartition('@')
    # Where the @ was forgotten, what stands in the place of the port may be the password.
    address = re.sub(r'^([^/:]*):(?!\d+(/|$))[^/]*', r'\1:***', address.partition('?')[0])
    return f'{scheme}{slashes}{user and "***"}{at}{address}'


def open_study(url: str, config: SearchConfig) -> optuna.Study:
    """Joins the study of a search, or founds it.

    Raises:
      ValueError: if it has trials with other flags.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=_open_storage(url), study_name=config.study, load_if_exists=True
    )
    own, others = identify(config), study.user_attrs.get('flags', {})
    if trials(study, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED):
        different = [name for name in own if name not in others or others[name] != own[name]]
        if different:
            pairs = (f'{name} was {others.get(name)!r}, is {own[name]!r}' for name in different)
            raise ValueError(f'--study={config.study} has other flags: {", ".join(pairs)}')
    study.set_user_attr('flags', own)
    return study


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    # A connection for each question: none lies idle through a trial until the server drops it.
    engine = {'poolclass': sqlalchemy.NullPool}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ExperimentalWarning)
        for _ in range(2):
            # It fails where another worker makes the tables at this very moment.
            with contextlib.suppress(DatabaseError):
                return optuna.storages.RDBStorage(url, engine, heartbeat_interval=_HEARTBEAT)
            time.sleep(1)
        return optuna.storages.RDBStorage(url, engine, heartbeat_interval=_HEARTBEAT)


def trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Returns the trials of a study that are in one of some states."""
    return study.get_trials(deepcopy=False, states=states)


def is_hopeless(completed: Sequence[FrozenTrial], step: int, excess: float) -> bool:
    """Says whether to give a trial up: it would have to recover by more than any other did.

    Args:
      completed: the others.
      step: where the trial is.
      excess: points of validation error above what is allowed.

    Returns:
      Whether the excess is above what the error of each of the others fell by from that step to
      its end; never while they are but a few.
    """
    falls = [
        other.intermediate_values[step] - other.intermediate_values[max(other.intermediate_values)]
        for other in completed
        if step in other.intermediate_values
    ]
    return len(falls) >= _FEWEST_COMPLETED and excess > max(0.0, *falls)


def find_best(completed: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Returns the trial that keeps the fewest parameters, of those whose error is allowed."""
    allowed = [trial for trial in completed if max(trial.constraints.values()) <= 0]
    return min(allowed, key=lambda trial: (trial.values, trial.number), default=None)


def draw(folder: Path, completed: Sequence[FrozenTrial], allowed: float) -> None:
    """Writes Optuna's pictures of kept parameters and error, `importance.png` and `pareto.png`.

    Args:
      folder: where to.
      completed: the trials.
      allowed: the validation error allowed, in percent.
    """
    with warnings.catch_warnings(), plt.rc_context():
        warnings.simplefilter('ignore', ExperimentalWarning)
        # That low values count as good, and that few trials say little.
        warnings.filterwarnings('ignore', 'PedAnova|.*importances will be equal', UserWarning)
        # Optuna draws them for a study of two objectives.
        both = optuna.create_study(directions=['minimize', 'minimize'])
        both.set_metric_names(['kept parameters', 'validation error (%)'])
        for trial in completed:
            values = [*trial.values, trial.user_attrs['validation_error']]
            own = {'params': trial.params, 'distributions': trial.distributions}
            both.add_trial(optuna.create_trial(values=values, **own))
        axes: dict[str, Any] = {
            'importance': drawing.plot_param_importances(both),
            'pareto': drawing.plot_pareto_front(both),
        }
        axes['pareto'].axhline(allowed, color='black', linestyle='--', label='allowed')
        axes['pareto'].set_xscale('log')
        axes['pareto'].legend()
        for name, of_picture in axes.items():
            plots.save(of_picture.figure, folder / f'{name}.png', bbox_inches='tight')
            plt.close(of_picture.figure)
