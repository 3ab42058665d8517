"""The public names of dns_jax and what is said of them, read from its files.

`python tests/tools/api.py > docs/api.md` writes the page anew; test_api holds it to the code.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'dns_jax'
HEAD = """# Every public name

Each public name of `dns_jax`, with the first line of its docstring; `help` shows the rest. Names in
**bold** are found in `dns_jax` itself, the others in the module above them. Names and modules that
begin with an underscore may change at any time.
"""


class Name(NamedTuple):
    """A public function, class, type or number of a module."""

    name: str
    text: str  # its docstring, or the string behind it
    node: ast.stmt


def modules():
    """The module of each file but the packages' own and private ones, by name, parsed."""
    return {
        '.'.join(path.relative_to(PACKAGE).with_suffix('').parts): ast.parse(
            path.read_text(encoding='utf-8')
        )
        for path in sorted(PACKAGE.rglob('[!_]*.py'))
        if not path.parent.name.startswith('_')
    }


def in_reference():
    """The modules in the order of the pages that show their docstrings."""
    texts = [(ROOT / 'docs' / name).read_text() for name in ('reference.md', 'reference_files.md')]
    return re.findall(r'automodule:: dns_jax\.([\w.]+)', ''.join(texts))


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
    parts, outside, trees = [HEAD], exported(), modules()
    for module in in_reference():
        tree = trees[module]
        lines = [f'## `dns_jax.{module}`', '', ast.get_docstring(tree).splitlines()[0], '']
        # What users name comes first, constants last.
        names = sorted(
            names_of(tree), key=lambda each: (each.name not in outside, each.name.isupper())
        )
        for name, text, _ in names:
            mark = '**' if name in outside else ''
            lines.append(f'- {mark}`{name}`{mark}: {text.splitlines()[0]}')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    print(page(), end='')
