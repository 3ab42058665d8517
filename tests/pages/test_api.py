"""The public API: docs/api.md lists it, and every function and class says what it is."""

import ast
import builtins
import doctest
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import api
import pytest

import dns_jax

ROOT = Path(__file__).parents[2]
TREES = api.modules()


def functions():
    """Every public function, and every public method of a public class."""
    for module, tree in TREES.items():
        for name, _, node in api.names_of(tree):
            if isinstance(node, ast.FunctionDef):
                yield f'{module}.{name}', node
            elif isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith('_'):
                        yield f'{module}.{name}.{method.name}', method


FUNCTIONS = dict(functions())
CLASSES = {
    f'{module}.{name.name}': name
    for module, tree in TREES.items()
    for name in api.names_of(tree)
    if isinstance(name.node, ast.ClassDef)
}
# What the papers say is in these modules, and there it says where; but these are our own.
OF_PAPERS = ('densities', 'importance', 'masks', 'optimizers', 'prune', 'pruners', 'schedules')
OF_PAPERS += ('sparse_training', 'thresholds', 'transformation')
OUR_OWN = {f'masks.{name}' for name in ('init_masks', 'count_kept', 'count_events', 'throw_coins')}
OUR_OWN |= {'masks.find_empty_layers', 'importance.chance', 'thresholds.make_band'}
OUR_OWN |= {'schedules.update_at', 'schedules.log_linear_density', 'pruners.by_rules.one_shot'}
OUR_OWN |= {'schedules.check_finite', 'importance.untied'}
OUR_OWN |= {'densities.layer_density', 'transformation.freeze', 'transformation.get_masks'}

each_function = pytest.mark.parametrize('name', FUNCTIONS)


def sections(text):
    """The parts of a docstring by their titles, with '' for what comes first."""
    found, title = {'': []}, ''
    for line in text.splitlines():
        if re.fullmatch('(Args|Returns|Raises|Example|Reference):', line):
            title = line[:-1]
            assert title not in found
            found[title] = []
        else:
            found[title].append(line)
    return found


def entries(lines):
    """What the entries of a section are about: the words before a colon at its first indent."""
    matches = (re.match(r'  (\S.*?): ', line) for line in lines)
    return [match[1] for match in matches if match]


def is_property(node):
    return any(getattr(line, 'id', '') == 'property' for line in node.decorator_list)


def raised(node):
    """The names of the exceptions that a function raises itself."""
    causes = (part.exc for part in ast.walk(node) if isinstance(part, ast.Raise) and part.exc)
    names = (getattr(getattr(cause, 'func', cause), 'id', '') for cause in causes)
    return {name for name in names if name and isinstance(getattr(builtins, name, None), type)}


def test_the_page_is_that_of_the_code():
    page = (ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
    assert page == api.page(), 'python tests/tools/api.py > docs/api.md writes it anew'
    assert '](docs/api.md)' in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_names_are_those_that_python_finds():
    """The files are read, not run: what they make is asked of the modules themselves."""
    listed = set()
    for module, tree in TREES.items():
        names = {name.name for name in api.names_of(tree)}
        listed |= names
        made = vars(importlib.import_module(f'dns_jax.{module}'))
        assert names <= made.keys()
        own = {
            name
            for name, value in made.items()
            if getattr(value, '__module__', '') == f'dns_jax.{module}' and name[0] != '_'
        }
        assert own <= names
    assert api.exported() == set(dns_jax.__all__) <= listed


def test_public_names():
    assert dns_jax.__all__ == sorted(dns_jax.__all__)
    assert len(set(dns_jax.__all__)) == len(dns_jax.__all__)
    bound = {
        name
        for name, value in vars(dns_jax).items()
        if not name.startswith('_') and not inspect.ismodule(value)
    }
    assert set(dns_jax.__all__) == bound


def is_method(name):
    return name.split('.')[-2][0].isupper()


def parameters(name):
    """The parameters of a function, as a docstring names them."""
    signature = FUNCTIONS[name].args
    names = [parameter.arg for parameter in (*signature.posonlyargs, *signature.args)]
    names = names[is_method(name) :]  # without self
    names += [f'*{signature.vararg.arg}'] if signature.vararg else []
    names += [parameter.arg for parameter in signature.kwonlyargs]
    return names + ([f'**{signature.kwarg.arg}'] if signature.kwarg else [])


@each_function
def test_functions_say_what_they_take_return_and_raise(name):
    node = FUNCTIONS[name]
    found = sections(ast.get_docstring(node))
    summary, *rest = found['']
    assert summary.endswith('.')
    assert not rest or rest[0] == ''
    if is_property(node):
        return  # its first line says it
    assert entries(found.get('Args', [])) == parameters(name)
    gives_nothing = isinstance(node.returns, ast.Constant) and node.returns.value is None
    assert ('Returns' in found) != gives_nothing
    listed = {error for entry in entries(found.get('Raises', [])) for error in entry.split(', ')}
    assert raised(node) <= listed
    # Some raise again what they caught, by a type that is not in the source.
    assert 'Raises' in found or not any(isinstance(part, ast.Raise) for part in ast.walk(node))


@each_function
def test_functions_show_an_example_and_where_they_are_from(name):
    found = sections(ast.get_docstring(FUNCTIONS[name]))
    if not is_method(name):
        assert any(line.startswith('  >>> ') for line in found.get('Example', []))
    if name.split('.')[0] in OF_PAPERS:
        assert ('Reference' in found) != (name in OUR_OWN)


def test_examples_are_run():
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['tool'][
        'pytest'
    ]
    assert '--doctest-modules' in settings['ini_options']['addopts'].split()
    assert 'dns_jax' in settings['ini_options']['testpaths']
    for name in dns_jax.__all__:
        value = inspect.unwrap(getattr(dns_jax, name))
        if inspect.isfunction(value):
            (test,) = doctest.DocTestFinder(recurse=False).find(value, name)
            assert any(example.want for example in test.examples), name


@pytest.mark.parametrize('module', TREES)
def test_examples_can_be_copied(module):
    """They import all that they use but the public names of their own module.

    That they print what they say is asked where pytest runs them, among all names of the module.
    """
    made = importlib.import_module(f'dns_jax.{module}')
    own = {name.name for name in api.names_of(TREES[module])}
    for test in doctest.DocTestFinder().find(made, module):
        used, given = set(), own | vars(builtins).keys()
        for node in ast.walk(ast.parse(''.join(each.source for each in test.examples))):
            match node:
                case ast.Name(name, ast.Load()):
                    used.add(name)
                case ast.Name(name) | ast.arg(name) | ast.FunctionDef(name) | ast.ClassDef(name):
                    given.add(name)
                case ast.alias(name, renamed):
                    given.add(renamed or name.partition('.')[0])
        assert used <= given, test.name


@pytest.mark.parametrize('name', CLASSES)
def test_classes_are_documented(name):
    """And arrays of states have a shape and a dtype."""
    summary, *rest = CLASSES[name].text.splitlines()
    assert summary.endswith('.')
    assert not rest or rest[0] == ''
    module = name.rpartition('.')[0].replace('.', '/')
    lines = (ROOT / 'dns_jax' / f'{module}.py').read_text(encoding='utf-8').splitlines()
    for field in CLASSES[name].node.body:
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) == 'jax.Array':
            assert re.search(r'#: shape=.*(dtype=|typed PRNG key)', lines[field.lineno - 1])
