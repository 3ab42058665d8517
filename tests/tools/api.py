"""The public names of dns_jax and what is said of them, read from its files.

`python tests/tools/api.py > docs/api.md` writes the page anew; test_api holds it to the code.
"""

import ast
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / 'dns_jax'
HEAD = """# The public API

Every public name of `dns_jax`, by the module that has it, with the first line of its docstring;
`help` has the rest. Those in bold are names of `dns_jax` itself, which needs jax, numpy and optax
alone. Names and modules that begin with an underscore may change at any time.
"""


class Name(NamedTuple):
    """A public function, class, type or number of a module."""

    name: str
    text: str  # its docstring, or the string behind it
    node: ast.stmt


def modules():
    """The module of each file but the packages' own and private ones, by name, parsed."""
    paths = sorted(PACKAGE.rglob('[!_]*.py'), key=lambda path: (path.parent != PACKAGE, path))
    return {
        '.'.join(path.relative_to(PACKAGE).with_suffix('').parts): ast.parse(
            path.read_text(encoding='utf-8')
        )
        for path in paths
    }


def names_of(tree):
    """The public names that a module makes, in their order."""
    names = []
    for node, behind in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(Name(node.name, ast.get_docstring(node) or '', node))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            is_text = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            text = str(behind.value.value) if is_text else ''
            names.append(Name(node.targets[0].id, text, node))
    return [name for name in names if not name.name.startswith('_')]


def exported():
    """The names of the package itself."""
    tree = ast.parse((PACKAGE / '__init__.py').read_text(encoding='utf-8'))
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '__all__':
            return set(ast.literal_eval(node.value))
    raise AssertionError('no __all__')


def page():
    """What docs/api.md must be."""
    parts, outside = [HEAD], exported()
    for module, tree in modules().items():
        lines = [f'## `dns_jax.{module}`', '', ast.get_docstring(tree).splitlines()[0], '']
        for name, text, _ in names_of(tree):
            mark = '**' if name in outside else ''
            lines.append(f'- {mark}`{name}`{mark}: {text.splitlines()[0]}')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    print(page(), end='')
