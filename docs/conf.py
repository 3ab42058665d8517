"""The documentation site: `make docs` builds it into docs/_build."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import dns_jax  # noqa: E402
from docutils import nodes  # noqa: E402
from docutils.utils.math.latex2mathml import tex2mathml  # noqa: E402

project = 'dns_jax'
author = copyright = 'the dns_jax authors'
version = release = dns_jax.__version__

# The source folder is the repository, which has notebooks beside docs.
root_doc = 'docs/index'
include_patterns = ['*.md', 'docs/*.md', 'notebooks/*.ipynb', 'results/*.md']
exclude_patterns = ['README.md', 'docs/_build']

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_enable_extensions = ['amsmath', 'dollarmath']
myst_heading_anchors = 3
nb_execution_mode = 'cache'  # run again when they change
nb_execution_timeout = 120  # seconds for a cell
nb_execution_raise_on_error = True
default_role = 'code'
autodoc_member_order = (
    'groupwise'  # classes and functions first, constants last
)
autodoc_typehints = (
    'none'  # aliases of unions of unions; docstrings say shapes and dtypes
)
autodoc_default_options = {'members': True, 'undoc-members': False}
napoleon_custom_sections = [('Reference', 'notes_style')]

html_theme = 'furo'
html_title = f'dns_jax {version}'


def setup(app):
    """Writes formulas as MathML, which browsers show without a script."""

    def inline(writer, node):
        writer.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    def block(writer, node):
        formula = tex2mathml(node.astext(), as_block=True)
        writer.body.append(f'<div style="overflow-x: auto">{formula}</div>')
        raise nodes.SkipNode

    def leave_out(app, what, name, obj, options, lines):
        """Leaves out what Python itself says of the fields of named tuples."""
        if lines and lines[0].startswith('Alias for field number'):
            lines.clear()

    app.add_html_math_renderer('mathml', (inline, None), (block, None))
    app.connect('autodoc-process-docstring', leave_out)
