"""The documentation: its examples run, its commands are accepted, what it names exists."""

import importlib
import re
from pathlib import Path

import api
import jax
import pytest
import yaml
from absl import flags as absl_flags

from experiments.config.command_line import define, to_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = [*sorted(DOCS.glob('*.md')), *(ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING'))]
FOLDERS = 'docs|experiments|notebooks|results|tests|zoo'


def blocks(name):
    text = (DOCS / f'{name}.md').read_text()
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.mark.parametrize(
    'name', ['tutorial', 'own_pruner', 'export', 'resume', 'rules', 'results', 'inference']
)
def test_the_examples_run(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        for block in blocks(name):
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
    if name == 'inference':
        assert names['logits'].shape == (1, 10)


def test_code_is_shown_without_scrolling():
    for path in sorted(DOCS.glob('*.md')):
        for block in blocks(path.stem):
            assert max(map(len, block.splitlines())) <= 80, path.name


def commands():
    """Every command of the pages with its flags, which may go on in further lines."""
    for path in PAGES:
        text = path.read_text().replace('$JOB_COMPLETION_INDEX', '1')
        for module, flags in re.findall(r'python -m (\S+)((?:\s|\\|--[^\s`]+)*)', text):
            if flags.strip():
                yield module, flags.replace('\\', ' ').split()


@pytest.mark.parametrize(('module', 'flags'), [*commands()], ids=str)
def test_the_commands_are_accepted(module, flags):
    command = importlib.import_module(module)
    # A command knows other configurations too: of one run of many, or what several share.
    (name,) = re.findall(r'\.launch\(.*, (\w+)\)', Path(command.__file__).read_text())
    config_type = vars(command)[name]
    defaults, values = getattr(command, 'DEFAULTS', {}), absl_flags.FlagValues()
    define(config_type, defaults, values)
    assert to_config(config_type, defaults, values, values(['program', *flags]))
    for name, _, value in (flag.removeprefix('--').partition('=') for flag in flags):
        if name in values:  # but for --flagfile and the --no of a switch
            assert str(values[name].value) in (value or 'True', f'{value}.0')


def test_the_manifests_fit_each_other():
    (manifests,) = re.findall(
        r'```yaml\n(.*?)```', (DOCS / 'many_devices.md').read_text(), re.DOTALL
    )
    service, job = yaml.safe_load_all(manifests)
    assert job['spec']['template']['spec']['subdomain'] == service['metadata']['name']


def test_every_module_is_in_the_reference():
    assert sorted(api.in_reference()) == sorted(api.modules())


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_what_a_page_names_exists(path):
    text = path.read_text()
    for name in re.findall(rf'`((?:{FOLDERS})/[\w./]+\.\w+)`', text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r'`(\w+\.flags)`', text):
        assert (ROOT / 'experiments' / 'flagfiles' / name).exists(), name
    for name in re.findall(r'\]\((?!http)([^)#]+)', text):
        assert (path.parent / name).exists(), name
    for target in re.findall(r'(?m)(?:^|`)make ([a-z-]+)', text):
        assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE), target
