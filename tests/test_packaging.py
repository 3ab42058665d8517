"""What `python -m build` makes of the library: the wheel, and what it installs."""

import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import dns_jax

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    # A copy, lest the build leave its folders in the project.
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        (source / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(ROOT / 'dns_jax', source / 'dns_jax', ignore=shutil.ignore_patterns('__py*'))
    command = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, source]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (path,) = folder.glob('*.whl')
    return path


def test_it_holds_the_library_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith('.dist-info/METADATA'))
        fields = email.message_from_bytes(archive.read(metadata))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'dns_jax').rglob('*.py')}
    installed = {name for name in names if not name.startswith(metadata.split('/')[0])}
    assert installed == {*modules, 'dns_jax/py.typed', 'dns_jax/inference/weighted_slices.cc'}
    assert fields['Version'] == dns_jax.__version__
    needs = [need for need in fields.get_all('Requires-Dist') if 'extra' not in need]
    assert sorted(need.split('>')[0] for need in needs) == ['jax', 'jaxlib', 'numpy', 'optax']


def test_it_is_all_that_is_installed(wheel, tmp_path):
    site = tmp_path / 'site'
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index']
    subprocess.run([*command, '--target', site, wheel], check=True, capture_output=True)
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); import dns_jax, importlib.util\n'
        'print(dns_jax.__file__); print(importlib.util.find_spec("experiments"))'
    )
    answer = subprocess.run(
        [sys.executable, '-P', '-c', code, site],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    file, experiments = answer.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    assert experiments == 'None'


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert 'version' not in project
    assert 'version' not in yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert f'## {dns_jax.__version__}' in (ROOT / 'CHANGELOG.md').read_text()


def test_hooks_have_the_versions_of_the_requirements():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    (ruff,) = (hook['rev'] for hook in hooks if 'ruff' in hook['repo'])
    assert f'ruff=={ruff.lstrip("v")}\n' in (ROOT / 'requirements.txt').read_text()
