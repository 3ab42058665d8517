"""Tests of what the files say by themselves: who imports whom, and nothing reads what could run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / 'dns_jax').rglob('*.py'))
EXPERIMENTS = sorted((ROOT / 'experiments').rglob('*.py'))
TESTS = sorted((ROOT / 'tests').rglob('*.py'))
# Each imports from those before it alone; side by side they know nothing of each other.
WINGS = (
    {'dns_jax._core'},
    {'dns_jax'},  # the method
    {'dns_jax.pruners'},
    {'dns_jax.inference'},
    {'dns_jax.files'},
    {'experiments.baselines', 'experiments.devices'},
    {'experiments.networks'},
    {'experiments.data'},
    {'experiments.config'},
    {'experiments.reports'},
    {'experiments.artefacts'},
    {'experiments.training'},
    {'experiments.plain'},
    {'experiments.measurements', 'experiments.own_loops', 'experiments.sweeps'},
    {'experiments'},  # the commands
)
RANKS = {wing: rank for rank, wings in enumerate(WINGS) for wing in wings}
# What the library may import besides jax, NumPy and optax; each is an extra.
EXTRAS = {
    'dns_jax.files._entropy': {'constriction'},
    'dns_jax.files.export': {'flax', 'jax2onnx', 'onnx', 'safetensors'},
    'dns_jax.files.sharing': {'sklearn'},
    'dns_jax.files.sparse': {'safetensors'},
    'dns_jax.inference.kernels': {'scipy'},
}
MOST_LINES = 400  # of a file of tests
MOST_FILES = 20  # in a folder, the commands left out


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


def name_of(path):
    """The dotted name of a module of ours."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in (*LIBRARY, *EXPERIMENTS)}


def own_imports(path):
    """The modules of ours that a file imports."""
    for name in imported(path):
        while name and name not in MODULES:
            name = name.rpartition('.')[0]
        if name:
            yield name


def wing_of(module):
    """The folder that a module is in, as a dotted name."""
    is_folder = MODULES[module].name == '__init__.py'
    return module if is_folder else module.rpartition('.')[0]


def private_to(module):
    """The folder that alone may import a module, and those in it; '' for any."""
    folder, underscore, _ = module.partition('._')
    return folder if underscore else ''


def test_imports_point_down():
    up = []
    for module, path in MODULES.items():
        for other in own_imports(path):
            own, theirs = wing_of(module), wing_of(other)
            if own != theirs and RANKS[own] <= RANKS[theirs]:
                up.append(f'{module} imports {other}')
            if not own.startswith(private_to(other)):
                up.append(f'{module} imports {other}, which is private to {private_to(other)}')
            if own == theirs == 'experiments':
                up.append(f'{module} imports the command {other}')
    assert not up


def test_imports_make_no_circle():
    left = {module: set(own_imports(path)) - {module} for module, path in MODULES.items()}
    while left:
        free = {module for module, others in left.items() if not others & left.keys()}
        assert free, f'a circle among {sorted(left)}'
        left = {module: others for module, others in left.items() if module not in free}


def test_the_library_imports_little():
    for path in LIBRARY:
        others = {name.split('.')[0] for name in imported(path)} - set(sys.stdlib_module_names)
        allowed = {'jax', 'numpy', 'optax', 'dns_jax'} | EXTRAS.get(name_of(path), set())
        assert others <= allowed, path


def test_folders_are_no_fuller_than_the_eye_takes_in():
    for wing in RANKS.keys() - {'experiments'}:
        files = [module for module in MODULES if wing_of(module) == wing]
        assert len(files) <= MOST_FILES + 1, wing  # beside __init__


def test_commands_only_parse_and_delegate():
    """Those that start a run; tools have work of their own."""
    for name in ('lenet300', 'lenet5', 'alexnet', 'vgg16', 'resnet', 'gpt', 'own_loop'):
        assert len(MODULES[f'experiments.{name}'].read_text().splitlines()) < 60


# Modules without a file of their own: what is asked of them is asked there, of what uses them.
ASKED_WITH = {
    # One run each, all by the same way.
    **dict.fromkeys(
        ('lenet300', 'lenet5', 'alexnet', 'vgg16', 'resnet', 'gpt'),
        'commands/test_flags_of_commands',
    ),
    'baselines/ranks': 'baselines/test_low_rank',
    'data/archives': 'data/test_builders',
    'devices/hosts': 'devices/test_distributed',
    'networks/logic': 'commands/test_xor',
    'reports/pages': 'reports/test_run_report',
    'reports/plots': 'reports/test_run_report',
    'reports/published': 'commands/test_frontier',
    'reports/summaries': 'reports/test_run_report',
    'reports/sweep_tables': 'commands/test_compare',
    'reports/tables': 'reports/test_run_report',
    'sweeps/sweep': 'commands/test_frontier',
    'sweeps/sweep_report': 'commands/test_frontier',
    'training/image_flags': 'training/test_feeds',
    'training/pruning': 'training/test_plan',
    'training/side_by_side': 'training/test_run',
    'training/task': 'training/test_run',
}


def test_every_module_has_its_tests():
    """As tests/ROOM/test_MODULE.py, beside which may lie files of its subjects."""
    for path in (*LIBRARY, *EXPERIMENTS):
        top, *rooms, _ = path.relative_to(ROOT).parts
        name = '/'.join([*rooms, path.stem])
        room = [folder.lstrip('_') for folder in rooms]
        room = room or ['method' if top == 'dns_jax' else 'commands']
        wanted = '/'.join([*room, f'test_{path.stem.lstrip("_")}'])
        if path.stem != '__init__':
            found = ASKED_WITH.get(name, wanted) if top == 'experiments' else wanted
            assert (ROOT / 'tests' / f'{found}.py').exists(), f'{name} has no tests/{found}.py'
            assert found == wanted or not (ROOT / 'tests' / f'{wanted}.py').exists(), name


def test_no_file_of_tests_is_longer_than_a_reader_bears():
    for path in TESTS:
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


# Whatever reads with these runs what a file says.
UNSAFE_MODULES = {
    *('pickle', '_pickle', 'pickletools', 'cPickle', 'cloudpickle', 'dill', 'shelve', 'marshal'),
    *('joblib', 'jsonpickle'),
}
UNSAFE_CALLS = {'eval', 'exec', '__import__', 'torch.load', 'pd.read_pickle'}
MAY_RUN_CODE = {
    'tests/pages/test_docs.py',
    'tests/contracts/test_libraries.py',
    'tests/pages/test_readme.py',
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
