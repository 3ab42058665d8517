"""Tests of what the files say by themselves: who imports whom, and what is documented."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import dns_jax

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / 'dns_jax').glob('*.py'))
EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))

# What each module of the library may import from the library.
LEAVES = {'typing', 'layers'}
MIDDLE = LEAVES | {'importance', 'masks', 'thresholds', 'schedules', 'optimizers'}
# Which other packages an artefact module may import besides.
ARTEFACT_PACKAGES = {
    'entropy': {'constriction'},
    'export': {'flax', 'jax2onnx', 'onnx', 'safetensors'},
    'sharing': {'sklearn'},
    'sparse': {'safetensors'},
    'steps': {'scipy'},
}
ALLOWED = {
    '__init__': None,  # the public names, from wherever they are
    'typing': set(),
    'layers': {'typing'},
    'importance': {'typing'},
    'masks': LEAVES,
    'thresholds': LEAVES | {'masks'},
    'schedules': LEAVES,
    'optimizers': LEAVES,
    'surgery': MIDDLE,
    'pruners': MIDDLE | {'surgery'},
    'training': LEAVES | {'masks'},
    'metrics': LEAVES | {'masks'},
    'files': set(),
    'chain': set(),
    'compact': LEAVES | {'chain', 'masks'},
    'sparse': LEAVES | {'files', 'masks'},
    'codec': LEAVES | {'entropy', 'files', 'header', 'masks', 'sharing', 'sparse'},
    'entropy': set(),
    'header': set(),
    'sharing': LEAVES | {'masks'},
    'native': set(),
    'steps': LEAVES | {'chain', 'native'},
    'runners': LEAVES | {'chain', 'native', 'steps'},
    'export': LEAVES | {'chain', 'files', 'sparse'},
    'caffe': LEAVES,
    'caffe_writer': LEAVES | {'caffe', 'chain', 'files', 'masks'},
}


def imported(path):
    """Full dotted names of all that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path.name} imports relatively'
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return names


def siblings(path, package):
    """The modules of a package that a file imports."""
    names = [name.split('.') for name in imported(path)]
    return {parts[1] if len(parts) > 1 else '__init__' for parts in names if parts[0] == package}


@pytest.mark.parametrize('path', LIBRARY, ids=lambda path: path.stem)
def test_library_imports_point_down(path):
    assert path.stem in ALLOWED, 'say in ALLOWED what the new module may import'
    if ALLOWED[path.stem] is not None:
        assert siblings(path, 'dns_jax') <= ALLOWED[path.stem]


@pytest.mark.parametrize('path', LIBRARY, ids=lambda path: path.stem)
def test_library_imports_little(path):
    others = {name.split('.')[0] for name in imported(path)} - set(sys.stdlib_module_names)
    allowed = ARTEFACT_PACKAGES.get(path.stem, set())
    assert others <= {'jax', 'numpy', 'optax', 'dns_jax'} | allowed


def is_entry(path):
    """Whether a file is run rather than imported."""
    return "__name__ == '__main__'" in path.read_text(encoding='utf-8')


SCRIPTS = [path for path in EXPERIMENTS if is_entry(path)]


def test_there_are_entry_scripts():
    assert {'lenet5', 'lenet300'} <= {path.stem for path in SCRIPTS}


# Those that do not start an experiment have work of their own.
TOOLS = {
    'alexnet': {'flags', 'hosts', 'image_flags', 'run'},
    'bench': {'commands', 'flags', 'models', 'train'},
    'compare': {'commands', 'flags', 'parsers', 'plots', 'report', 'sweep', 'workdir'},
    'export': {
        *('artefacts', 'commands', 'data', 'flags', 'models', 'references', 'report', 'train'),
        'tuning',
    },
    'frontier': {'commands', 'flags', 'plots', 'report', 'sweep'},
    'latency': {'artefacts', 'commands', 'flags', 'latency_report', 'models'},
    'results': {'report'},
    'scale': {*('commands', 'flags', 'models', 'scale_input', 'scale_programs', 'scale_report')},
    'search': None,  # an experiment of its own, with modules of its own
    'vgg16': {'flags', 'hosts', 'image_flags', 'run'},
    'xor': {'commands', 'flags', 'models', 'probes', 'report', 'train', 'xor_plots'},
    'zoo': {'commands', 'flags', 'report'},
}


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.stem)
def test_entry_scripts_only_parse_and_delegate(path):
    allowed = TOOLS.get(path.stem, {'flags', 'hosts', 'image_flags', 'run'})
    assert allowed is None or siblings(path, 'experiments') <= allowed
    assert path.stem in TOOLS or len(path.read_text(encoding='utf-8').splitlines()) < 60
    for other in EXPERIMENTS:
        assert path.stem not in siblings(other, 'experiments'), f'{other.name} imports a script'


def test_public_names():
    assert dns_jax.__all__ == sorted(dns_jax.__all__)
    assert len(set(dns_jax.__all__)) == len(dns_jax.__all__)
    bound = {
        name
        for name, value in vars(dns_jax).items()
        if not name.startswith('_') and not inspect.ismodule(value)
    }
    assert set(dns_jax.__all__) == bound


FUNCTIONS = [
    name for name in dns_jax.__all__ if inspect.isfunction(inspect.unwrap(getattr(dns_jax, name)))
]


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_are_documented(name):
    function = inspect.unwrap(getattr(dns_jax, name))
    text = inspect.getdoc(function)
    assert 'Returns:\n' in text
    assert 'Example:\n  >>> ' in text
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        assert f'\n  {parameter.name}: ' in text, f'{parameter.name} is not explained'
    assert not parameters or 'Args:\n' in text
    raises = any(
        isinstance(node, ast.Raise) for node in ast.walk(ast.parse(inspect.getsource(function)))
    )
    assert not raises or 'Raises:\n' in text


@pytest.mark.parametrize(
    'name', [n for n in dns_jax.__all__ if isinstance(getattr(dns_jax, n), type)]
)
def test_classes_are_documented(name):
    text = inspect.getdoc(getattr(dns_jax, name))
    assert text.split('\n')[0].endswith('.')
    assert f'{name}(' not in text, 'the docstring that NamedTuple makes up'
