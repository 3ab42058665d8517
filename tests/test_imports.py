"""Tests of what the files say by themselves: who imports whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / 'dns_jax').glob('*.py'))
EXPERIMENTS = sorted((ROOT / 'experiments').glob('*.py'))
TESTS = sorted((ROOT / 'tests').rglob('*.py'))

# What each module of the library may import from the library.
LEAVES = {'typing', 'roles', 'layers'}
MIDDLE = LEAVES | {'counts', 'densities', 'importance', 'masks', 'schedules', 'stacking'}
MIDDLE |= {'thresholds'}
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
    'roles': {'typing'},
    'layers': {'typing', 'roles'},
    'counts': set(),
    '_search': {'counts'},
    'stacking': LEAVES,
    'importance': {'typing'},
    'masks': LEAVES | {'counts'},
    'thresholds': LEAVES | {'schedules'},
    'densities': LEAVES | {'counts', 'masks', '_search', 'thresholds'},
    'schedules': LEAVES,
    'optimizers': LEAVES,
    '_rules': MIDDLE,
    'surgery': MIDDLE | {'_rules'},
    'prune': MIDDLE | {'_rules', 'surgery'},
    'pruners': MIDDLE | {'_rules', '_search', 'surgery'},
    'training': LEAVES | {'masks', 'surgery'},
    'metrics': LEAVES | {'counts', 'masks'},
    'files': set(),
    'chain': set(),
    'compact': LEAVES | {'chain', 'masks'},
    'sparse': LEAVES | {'files', 'masks'},
    'codec': LEAVES | {'entropy', 'files', 'header', 'masks', 'sharing'},
    'entropy': set(),
    'header': set(),
    'sharing': LEAVES | {'files', 'masks'},
    'native': set(),
    'steps': LEAVES | {'chain', 'native'},
    'runners': LEAVES | {'chain', 'native', 'steps'},
    'export': LEAVES | {'chain', 'files', 'sparse'},
    'caffe': LEAVES,
    'caffe_writer': LEAVES | {'caffe', 'chain', 'files', 'header', 'masks'},
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


# Whatever reads with these runs what a file says.
UNSAFE_MODULES = {
    *('pickle', '_pickle', 'pickletools', 'cPickle', 'cloudpickle', 'dill', 'shelve', 'marshal'),
    *('joblib', 'jsonpickle'),
}
UNSAFE_CALLS = {'eval', 'exec', '__import__', 'torch.load', 'pd.read_pickle'}
MAY_RUN_CODE = {
    'tests/test_docs.py',
    'tests/test_libraries.py',
    'tests/test_readme.py',
}  # the examples of our pages


def unsafe(path):
    """Finds what in a file could run what another file says: lines and why."""
    found = [name for name in imported(path) if name.split('.')[0] in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        module, _, name = called.rpartition('.')
        if keywords.get('allow_pickle', 'False') != 'False':
            found.append(f'{called} with pickles, line {node.lineno}')
        if module in ('np', 'numpy') and name == 'load' and 'allow_pickle' not in keywords:
            found.append(f'{called} that does not refuse pickles, line {node.lineno}')
        if module == 'yaml' and name not in ('safe_load', 'safe_dump'):
            found.append(f'{called}, line {node.lineno}')
        if called.removeprefix('builtins.') in UNSAFE_CALLS:
            found.append(f'{called}, line {node.lineno}')
    return found


@pytest.mark.parametrize('path', [*LIBRARY, *EXPERIMENTS, *TESTS], ids=lambda path: path.stem)
def test_nothing_reads_what_could_run(path):
    """No pickle, nor what else makes objects or programs of a file, anywhere."""
    if path.relative_to(ROOT).as_posix() not in MAY_RUN_CODE:
        assert not unsafe(path)


@pytest.mark.parametrize(
    'line',
    [
        *('import pickle', 'from cloudpickle import loads', 'import joblib.numpy_pickle'),
        *("np.load('a.npz')", "np.load('a.npz', allow_pickle=True)", 'eval(text)', 'exec(text)'),
        *("np.save('a', b, allow_pickle=flag)", 'yaml.load(text)', 'builtins.exec(text)'),
        *('torch.load(path)', "__import__('os')"),
    ],
)
def test_what_could_run_is_found(line, tmp_path):
    path = tmp_path / 'some.py'
    path.write_text(line)
    assert len(unsafe(path)) == 1


def is_entry(path):
    """Whether a file is run rather than imported."""
    return "__name__ == '__main__'" in path.read_text(encoding='utf-8')


SCRIPTS = [path for path in EXPERIMENTS if is_entry(path)]


def test_there_are_entry_scripts():
    assert {'lenet5', 'lenet300'} <= {path.stem for path in SCRIPTS}


# Those that do not start an experiment have work of their own.
TOOLS = {
    'alexnet': {'command_line', 'hosts', 'image_flags', 'run'},
    'bench': {'command_line', 'loops', 'models', 'progress', 'timing', 'tool_flags', 'train'},
    'compare': {
        *('command_line', 'flags', 'parsers', 'plots', 'sweep', 'sweep_flags', 'sweep_report'),
        'workdir',
    },
    'export': {
        *('artefacts', 'command_line', 'data', 'models', 'references', 'tables', 'tool_flags'),
        *('train', 'tuning'),
    },
    'frontier': {'command_line', 'flags', 'plots', 'sweep', 'sweep_flags', 'sweep_report'},
    'latency': {
        *('artefacts', 'command_line', 'latency_report', 'models', 'progress', 'timing'),
        'tool_flags',
    },
    'own_loop': {'command_line', 'own_runs'},
    'results': {'summaries', 'sweep_report', 'tables'},
    'scale': {
        *('command_line', 'models', 'progress', 'scale_input', 'scale_programs', 'scale_report'),
        *('plots', 'timing', 'tool_flags'),
    },
    'search': None,  # an experiment of its own, with modules of its own
    'vgg16': {'command_line', 'hosts', 'image_flags', 'run'},
    'xor': {
        *('command_line', 'models', 'plots', 'probes', 'progress', 'tables', 'tool_flags', 'train'),
        'xor_plots',
    },
    'zoo': {'command_line', 'report', 'summaries', 'tool_flags', 'workdir'},
}


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.stem)
def test_entry_scripts_only_parse_and_delegate(path):
    allowed = TOOLS.get(path.stem, {'command_line', 'flags', 'run'})
    assert allowed is None or siblings(path, 'experiments') <= allowed
    assert path.stem in TOOLS or len(path.read_text(encoding='utf-8').splitlines()) < 60
    for other in EXPERIMENTS:
        assert path.stem not in siblings(other, 'experiments'), f'{other.name} imports a script'
