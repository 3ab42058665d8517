"""Mutation testing: changes one operator or number of a module, and asks if its tests notice.

Run by `make mutants`, on a copy of the working tree; pytest never collects it. The mutants are
those of cosmic-ray. Starting Python with JAX takes longer than most of the tests that kill one, so
this process imports the packages once and forks for every mutant, before JAX has any thread.
"""

import argparse
import ast
import collections
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHOD = ROOT / 'tests' / 'method'
SUITES = {  # the tests of each module, up to the first that fails
    module: [
        f'dns_jax/{module}.py',
        *sorted(f'tests/method/{path.name}' for path in METHOD.glob(f'test_{module}*.py')),
        'tests/method/test_rules.py',
        'tests/contracts/test_arguments.py',
    ]
    for module in ('schedules', 'masks', 'thresholds', 'transformation')
}
PRELOADED = ('pytest', 'jax', 'optax', 'chex', 'flax.nnx', 'hypothesis.extra.numpy', 'tqdm')
TIMEOUT = 600  # seconds
# Between arithmetic and bits, and from an order to an identity, a change is a TypeError or the same
# again: left out, so that the share of the killed says something.
FAMILIES = ({'Add', 'Sub', 'Mul', 'Div', 'FloorDiv', 'Mod', 'Pow'},)
FAMILIES += ({'BitOr', 'BitAnd', 'BitXor', 'LShift', 'RShift'}, {'Is', 'IsNot'})
FAMILIES += ({'Eq', 'NotEq', 'Lt', 'LtE', 'Gt', 'GtE'},)


def is_telling(operator):
    """Whether an operator of cosmic-ray makes mutants worth a run."""
    found = re.fullmatch(r'core/Replace(?:Binary|Comparison)Operator_(\w+)_(\w+)', operator)
    if found:
        return any(set(found.groups()) <= family for family in FAMILIES)
    return operator != 'core/RemoveDecorator'


def annotations(source):
    """The (line, column) ranges of what has no effect: annotations of types."""
    ranges = []
    for node in ast.walk(ast.parse(source)):
        for name in ('annotation', 'returns'):
            part = getattr(node, name, None)
            if part is not None:
                start, end = (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)
                ranges.append((start, end))
    return ranges


def mutants_of(source):
    """Yields for each mutant its name, its line, and its source."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    tree, idle = get_ast(source), annotations(source)
    for name in sorted(filter(is_telling, plugins.operator_names())):
        make = plugins.get_operator(name)
        if make.arguments():
            continue  # needs to be told which variables
        operator = make()
        starts = [
            start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)
        ]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last for first, last in idle):
                mutated = mutate_code(source, operator, occurrence)
                if compiles(mutated):
                    yield f'{name.removeprefix("core/")} {occurrence}', start[0], mutated


def compiles(source):
    """Whether it is Python at all: `x ** not y` is not."""
    try:
        compile(source, 'mutant', 'exec')
    except SyntaxError:
        return False
    return True


class Order:
    """A plugin of pytest that puts first what is fast and has killed many, and takes the times."""

    def __init__(self, times_file, kills):
        self.times_file, self.kills = times_file, kills
        self.known = json.loads(times_file.read_text()) if times_file.exists() else {}
        self.times = {}

    def pytest_collection_modifyitems(self, items):
        def gain(item):
            return (self.kills[item.nodeid] + 0.2) / self.known.get(item.nodeid, 1.0)

        items.sort(key=gain, reverse=True)

    def pytest_runtest_logreport(self, report):
        before = self.times.get(report.nodeid, 0.01)
        self.times[report.nodeid] = before + report.duration

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus == 0:
            self.times_file.write_text(json.dumps(self.times))


def run_tests(copy, tests, log, order):
    """Runs tests in a process of their own; returns their exit status, None if out of time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        options = ['-x', '-q', '-n0', '-p', 'no:cacheprovider', '--tb=line']
        # pytest cannot rewrite the assertions of packages that are imported already.
        options += ['-W', 'ignore::pytest.PytestAssertRewriteWarning']
        os._exit(pytest.main([*options, *tests], plugins=[order]))
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def differing_lines(old, new):
    """The first line that differs, as it was and as it is."""
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    return next(((one.strip(), two.strip()) for one, two in pairs if one != two), ('', ''))


def try_module(module, copy, work, only_survivors):
    """Tests all mutants of a module that have no result yet; writes a line of JSON for each."""
    path, results = copy / 'dns_jax' / f'{module}.py', work / f'{module}.jsonl'
    source, log = path.read_text(encoding='utf-8'), work / 'log.txt'
    known = read(results)
    if only_survivors:
        known = {name: row for name, row in known.items() if row['outcome'] == 'killed'}
        results.write_text(''.join(json.dumps(row) + '\n' for row in known.values()))
    kills = collections.Counter(name for row in known.values() for name in row['by'])

    def run():
        return run_tests(copy, SUITES[module], log, Order(work / f'{module}.times', kills))

    if run() != 0:
        sys.exit(f'the tests of {module} fail without any mutant:\n{log.read_text()}')
    # A mutant of the same length, written in the same second, would be read from these.
    shutil.rmtree(copy / 'dns_jax' / '__pycache__', ignore_errors=True)
    sys.dont_write_bytecode = True
    for name, line, mutated in mutants_of(source):
        if name in known:
            continue
        path.write_text(mutated, encoding='utf-8')
        start = time.monotonic()
        status = run()
        outcome = {0: 'survived', None: 'out of time'}.get(status, 'killed')
        failed = re.findall(
            r'^(?:FAILED|ERROR) (.+?)(?: - |$)', log.read_text(errors='replace'), re.M
        )
        old, new = differing_lines(source, mutated)
        kills.update(failed[:1])
        row = {'name': name, 'line': line, 'old': old, 'new': new, 'outcome': outcome}
        row |= {'by': failed[:1], 'seconds': round(time.monotonic() - start, 1)}
        with results.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')
    path.write_text(source, encoding='utf-8')
    sys.dont_write_bytecode = False


def read(results):
    """The results of a module, by the names of its mutants."""
    if not results.exists():
        return {}
    rows = map(json.loads, results.read_text(encoding='utf-8').splitlines())
    return {row['name']: row for row in rows}


def report(work, modules):
    """Prints the table of the modules, and every survivor."""
    print('| module | mutants | killed | out of time | survived | killed, share |')
    print('|---|---|---|---|---|---|')
    for module in modules:
        rows = read(work / f'{module}.jsonl').values()
        count = {
            outcome: sum(row['outcome'] == outcome for row in rows)
            for outcome in ('killed', 'out of time', 'survived')
        }
        numbers = ' | '.join(map(str, count.values()))
        share = 1 - count['survived'] / len(rows)
        print(f'| `{module}` | {len(rows)} | {numbers} | {share:.1%} |')
    for module in modules:
        for row in read(work / f'{module}.jsonl').values():
            if row['outcome'] == 'survived':
                print(f'{module}:{row["line"]} {row["name"]}\n  {row["old"]}\n  {row["new"]}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('modules', nargs='*', default=list(SUITES), help=', '.join(SUITES))
    parser.add_argument('--workdir', type=Path, default=ROOT / 'runs' / 'mutation')
    parser.add_argument('--survivors', action='store_true', help='test those of a run before again')
    arguments = parser.parse_args()
    work = arguments.workdir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(work / 'compiled')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
    copy = work / 'copy'
    shutil.rmtree(copy, ignore_errors=True)
    for part in ('dns_jax', 'experiments', 'tests', 'pyproject.toml'):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, copy / part)
    sys.path[:] = [entry for entry in sys.path if Path(entry or '.').resolve() not in (ROOT, HERE)]
    for package in PRELOADED:
        importlib.import_module(package)
    for module in arguments.modules:
        try_module(module, copy, work, arguments.survivors)
    report(work, arguments.modules)


HERE = Path(__file__).resolve().parent

if __name__ == '__main__':
    main()
