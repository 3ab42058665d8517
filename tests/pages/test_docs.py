"""The documentation: its examples run, its numbers are those of the results, its paths exist."""

import importlib
import re
import shlex
import statistics
from pathlib import Path

import api
import jax
import pytest
from absl import flags as absl_flags

from experiments import results
from experiments.config.command_line import define, to_config
from experiments.export import ExportConfig
from experiments.latency import LatencyConfig
from experiments.training.flags import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = [*sorted(DOCS.glob('*.md')), ROOT / 'CONTRIBUTING.md']
FOLDERS = 'docs|experiments|notebooks|results|tests|zoo'
QUESTIONS = ' '.join((DOCS / 'questions.md').read_text().split())


@pytest.mark.parametrize('name', ['tutorial', 'own_pruner', 'export', 'resume'])
def test_the_examples_run(name, capsys):
    text = (DOCS / f'{name}.md').read_text()
    blocks = [
        re.sub('^ {3}', '', block, flags=re.MULTILINE)
        for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    ]
    names = {}
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        for block in blocks:
            exec(compile(block, f'{name}.md', 'exec'), names)
    said = capsys.readouterr().out
    if name == 'tutorial':
        compression, accuracy = re.search(r'([\d.]+)×, accuracy ([\d.]+)%', said).groups()
        assert compression == '10.0'
        assert float(accuracy) > 97
    if name == 'own_pruner':
        (kept,) = re.findall(r"'fc': (\d+)", said)
        assert 0 < int(kept) < 64 * 64
    if name == 'resume':
        assert float(said) == 8.0  # of 136 parameters 17 are kept, 8 biases among them


def commands():
    """Every command line of the pages; test_readme has those that join other processes."""
    for path in PAGES:
        for line in re.findall(r'^python -m (experiments\.\w+.*)', path.read_text(), re.MULTILINE):
            if '--distributed' not in line:
                yield line


@pytest.mark.parametrize('line', list(commands()))
def test_the_commands_are_accepted(line):
    module, *arguments = shlex.split(line, comments=True)
    config_type = {
        'experiments.export': ExportConfig,
        'experiments.latency': LatencyConfig,
    }.get(module, Config)
    defaults = getattr(importlib.import_module(module), 'DEFAULTS', {})
    values = absl_flags.FlagValues()
    define(config_type, defaults, values)
    config = to_config(config_type, defaults, values, values(['program', *arguments]))
    for argument in arguments:
        name, _, value = argument.removeprefix('--').partition('=')
        if name != 'flagfile':
            assert str(getattr(config, name)) in (value or 'True', f'{value}.0')


def test_every_module_is_in_the_reference():
    text = (DOCS / 'reference.md').read_text() + (DOCS / 'reference_files.md').read_text()
    named = re.findall(r'automodule:: dns_jax\.([\w.]+)', text)
    assert sorted(named) == sorted(api.modules())


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_what_a_page_names_exists(path):
    text = path.read_text()
    for name in re.findall(rf'`((?:{FOLDERS})/[\w./]+\.\w+)`', text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r'`(\w+\.flags)`', text):
        assert (ROOT / 'experiments' / 'flagfiles' / name).exists(), name
    for target in re.findall(r'(?m)(?:^|`)make ([a-z-]+)', text):
        assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE), target


def median(name, variant, column='test_error', target=None):
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    return statistics.median(
        row[column] for row in rows if row['variant'] == variant and target in (None, row['target'])
    )


def test_the_answers_are_those_of_the_results():
    surgery = median('compare_lenet300', 'surgery', target=50)
    without = median('compare_lenet300', 'without splicing', target=50)
    assert f'{surgery:.2f} % with and {without:.2f} % without' in QUESTIONS
    surgery = median('compare_lenet300', 'surgery', target=100)
    without = median('compare_lenet300', 'without splicing', target=100)
    assert f'{surgery:.2f} % against {without:.2f} %, on each' in QUESTIONS
    gradual = median('compare_lenet300', 'gradual', target=100)
    assert f'{gradual:.2f} % against {surgery:.2f} % at' in QUESTIONS
    fixed, fixed_error = (
        median('ablations_lenet300', 'c, σ constant', name)
        for name in ('compression', 'test_error')
    )
    assert f'{fixed:.0f}× at {fixed_error:.2f} % with it' in QUESTIONS
    never = median('ablations_lenet300', 'c, without splicing', 'compression')
    assert (
        f'{never:.0f}× at {median("ablations_lenet300", "c, without splicing"):.0f} %' in QUESTIONS
    )
    rows = [row for row in results.read_frontiers() if row['network'] == 'lenet300']
    for target in (60, 90, 120):
        error = statistics.median(r['test_error'] for r in rows if r['target'] == target)
        assert re.search(rf'{target}× (comes )?at {error:.2f} %', QUESTIONS)
    kept, back = (
        median('repair_lenet300', 'surgery', name) for name in ('kept', 'returns_returned_kept')
    )
    assert f'{100 * back / kept:.0f} % had been pruned' in QUESTIONS
