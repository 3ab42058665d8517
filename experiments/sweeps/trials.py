"""A worker of a search: it takes part in a study, trial by trial, and concludes it.

Whoever imports this needs Optuna, the extra `search`.
"""

import contextlib
import dataclasses
import fcntl
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from dns_jax.files.writing import write_whole
from experiments.config.command_line import identify, print_result
from experiments.devices import progress
from experiments.sweeps import studies
from experiments.sweeps.flags import SearchConfig
from experiments.sweeps.space import make_config, make_ranges
from experiments.training import side_by_side
from experiments.training.divergence import Diverged
from experiments.training.flags import Config
from experiments.training.phases import Stopped, stop_on_signals
from experiments.training.plan import make_plan
from experiments.training.task import Run, Task
from experiments.training.workdir import CHECKPOINTS_FOLDER, release

# Shares of a trial's steps between which a trial may be given up: before, the errors of harsh
# trials still fall fast; after, little is left to save.
_WATCHED = (0.4, 0.8)


def take_part(config: SearchConfig) -> dict[str, Any]:
    """Takes part in a study until it has all its trials, then writes and prints what it found.

    Raises:
      As `experiments.search.search` does.
    """
    if config.storage:
        studies.check_storage(config.storage)
    folder = Path(config.workdir)
    url = config.storage or f'sqlite:///{folder}/study.db?timeout=60'
    with studies.named_errors(url), stop_on_signals() as stopping:
        task = Task(config.base())
        try:
            with _one_at_a_time(folder / 'lock', stopping):
                study = studies.open_study(url, config)
                reference = config.base().reference or _train_reference(config, task, stopping)
            _do_trials(study, config, task, reference, stopping)
        except Stopped as error:
            name = signal.Signals(stopping[0]).name
            raise Stopped(f'{name}: the same command goes on with the study') from error
        return _conclude(config, study, task.parameters)


def _do_trials(
    study: optuna.Study, config: SearchConfig, task: Task, reference: str, stopping: list[int]
) -> None:
    with progress.bar(total=config.trials, desc=config.study, unit=' trials') as bar:
        while True:
            done = len(_finished(study))  # other workers finish some too
            bar.update(done - bar.n)
            if best := studies.find_best(studies.trials(study, TrialState.COMPLETE)):
                bar.set_postfix(best=best.number, kept=f'{best.values[0]:,.0f}')
            if done >= config.trials:
                return
            if stopping:
                raise Stopped
            study.optimize(
                lambda trial: _operate(trial, config, task, reference, stopping), n_trials=1
            )


def _operate(
    trial: optuna.Trial, config: SearchConfig, task: Task, reference: str, stopping: list[int]
) -> float:
    """Does a trial and returns how many parameters it keeps."""
    # Workers must not draw the same numbers; one alone repeats itself.
    seed = (10_007 * config.base().seed + trial.number) % 2**32
    trial.study.sampler = optuna.samplers.TPESampler(seed=seed)
    choice = {
        name: trial.suggest_float(name, low, high, log=logarithmic)
        for name, (low, high, logarithmic) in make_ranges(config).items()
    }
    folder = Path(config.workdir) / 'trials' / f'{config.study}-{trial.number}'
    own = dataclasses.replace(
        make_config(config, choice),
        workdir=str(folder),
        reference=reference,
        overwrite=True,
        # No trial is resumed: one checkpoint, at the end of a phase, is the fewest there can be.
        checkpoint_every=config.base().record_every * _steps(config),
    )
    records = []

    def on_record(record):
        records.append(record)
        _report(trial, config, record, bound)

    started = time.perf_counter()
    runs = [Run(task, make_plan(own), on_record)]
    dense = side_by_side.train_references(runs, stopping)
    reference_error = task.measure(dense[0], task.dataset.validation)
    bound = reference_error + config.tolerance
    try:
        states = side_by_side.train_surgery(runs, dense, stopping)
        side_by_side.finetune(runs, states, stopping)
    except (optuna.TrialPruned, Diverged) as reason:
        progress.say(f'trial {trial.number}: given up, {reason}')
        if isinstance(reason, Diverged):
            trial.set_constraint('validation error', 100.0)
        raise optuna.TrialPruned from reason
    finally:
        shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
        release(folder)
    kept, error = sum(records[-1]['kept'].values()), records[-1]['validation_error']
    # Rounded: 2.02 + 0.1 is not quite 2.12.
    trial.set_constraint('validation error', round(error - bound, 9))
    trial.set_user_attr('validation_error', error)
    trial.set_user_attr('reference_validation_error', reference_error)
    trial.set_user_attr('seconds', round(time.perf_counter() - started, 1))
    progress.say(
        f'trial {trial.number}: kept {kept:,}, validation error {error:.2f} % '
        f'({bound:.2f} % is allowed)'
    )
    return kept


def _report(
    trial: optuna.Trial, config: SearchConfig, record: Mapping[str, Any], bound: float
) -> None:
    """Tells the study how far a trial is, and gives it up if it is hopeless."""
    before = config.base().surgery_steps if record['phase'] == 'finetuning' else 0
    step, error = before + record['step'], record['validation_error']
    trial.report(error, step)
    if _WATCHED[0] <= step / _steps(config) <= _WATCHED[1]:
        others = studies.trials(trial.study, TrialState.COMPLETE)
        if studies.is_hopeless(others, step, error - bound):
            trial.set_constraint('validation error', error - bound)
            raise optuna.TrialPruned(f'a validation error of {error:.2f} % at step {step}')


def _train_reference(config: SearchConfig, task: Task, stopping: list[int]) -> str:
    """Trains the network that all trials start from, goes on with it, or finds it finished."""
    folder = Path(config.workdir) / 'reference'
    plan = make_plan(config.reference_run(str(folder)))
    side_by_side.train_references([Run(task, plan)], stopping)
    release(folder)  # to the next worker, which finds it finished
    return str(folder)


def _conclude(config: SearchConfig, study: optuna.Study, parameters: int) -> dict[str, Any]:
    """Writes the flagfile and the pictures, and prints the result."""
    folder, completed = Path(config.workdir), studies.trials(study, TrialState.COMPLETE)
    given_up = len(_finished(study)) - len(completed)
    best, path = studies.find_best(completed), folder / 'best.flags'
    if best is None:
        path.unlink(missing_ok=True)  # another study's
        raise RuntimeError(
            f'none of {len(completed)} trials, with {given_up} more given up, has a validation '
            f'error of at most {config.tolerance} points above the reference: raise --tolerance '
            'or --trials'
        )
    kept = round(best.values[0])
    result = {
        'study': config.study,
        'completed': len(completed),
        'given_up': given_up,
        'trial': best.number,
        'parameters': parameters,
        'kept': kept,
        'compression': parameters / kept if kept else None,
        **best.user_attrs,
        'tolerance': config.tolerance,
        'flagfile': str(path),
    }
    allowed = best.user_attrs['reference_validation_error'] + config.tolerance
    studies.draw(folder, completed, allowed)
    write_whole(path, _format_flagfile(config, make_config(config, best.params), result))
    print(f'Flagfile and pictures: {path}, {folder / "importance.png"}, {folder / "pareto.png"}')
    print_result(result)
    return result


def _format_flagfile(config: SearchConfig, best: Config, result: Mapping[str, Any]) -> str:
    sizes = f'{result["kept"]:,} of {result["parameters"]:,}'
    error, reference = result['validation_error'], result['reference_validation_error']
    trials = f'{result["completed"]} trials, {result["given_up"]} more given up'
    head = f"""\
# {config.network} on {best.dataset}, found by experiments.search.
# Command: python -m experiments.{config.network} --flagfile={result['flagfile']}
# Time of surgery where it was found: {result['seconds']:.0f} seconds
# Expected result, seed {best.seed}: {sizes} parameters kept,
# validation error {error:.2f} %, that of the reference {reference:.2f} %
#
# Trial {result['trial']} of the study {config.study!r}: {trials}. The choice was
# made on the validation images; a final run may train on them too, with --train_on_all.
"""
    places = {'data_dir': best.data_dir, 'manual_dir': best.manual_dir}
    values = {**identify(best), **places, 'workdir': str(Path(config.workdir) / 'best')}
    del values['network']  # which the script stands for
    # All of them, as scripts have defaults of their own; None is a flag left out.
    lines = [f'--{name}={value}\n' for name, value in values.items() if value is not None]
    return head + ''.join(lines)


@contextlib.contextmanager
def _one_at_a_time(path: Path, stopping: list[int]) -> Iterator[None]:
    """Lets the workers of a folder in one by one, by a lock that dies with its holder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('w')
    except OSError as error:
        raise OSError(
            f'--workdir={path.parent} must be a folder that can be written: {error}'
        ) from error
    with file:
        while True:
            if stopping:
                raise Stopped
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _steps(config: SearchConfig) -> int:
    run = config.base()
    return run.surgery_steps + run.finetuning_steps


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that count: not those that run, were stopped or were killed."""
    return studies.trials(study, TrialState.COMPLETE, TrialState.PRUNED)
