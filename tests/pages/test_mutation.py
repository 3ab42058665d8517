"""The page of mutation testing fits the code, and what is said of its mutants is so."""

import re
from pathlib import Path

import mutation
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'results' / 'mutation.md').read_text(encoding='utf-8')
# | `module` | mutants | killed | survived | share killed |
TABLE = re.findall(r'^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) % \|$', PAGE, re.MULTILINE)
# | `module` | `code` | `became` | why it lives |
SURVIVORS = re.findall(r'^\| `(\w+)` \| `(.+?)` \| `(.+?)` \| (.+) \|$', PAGE, re.MULTILINE)


def test_the_table_adds_up_and_all_survivors_are_explained():
    measured = [row[0] for row in TABLE]
    # What is not, the page says.
    assert all(f'`{module}`' in PAGE for module in mutation.SUITES)
    assert set(measured) <= set(mutation.SUITES)
    for module, mutants, killed, survived, share in TABLE:
        assert int(killed) + int(survived) == int(mutants)
        assert float(share) == round(100 * int(killed) / int(mutants), 1) >= 90
        assert sum(row[0] == module for row in SURVIVORS) == int(survived)
    mutants, killed, survived = (sum(int(row[at]) for row in TABLE) for at in (1, 2, 3))
    share = f'{100 * killed / mutants:.1f} %'
    assert f'| all | {mutants} | {killed} | {survived} | {share} |' in PAGE


@pytest.mark.parametrize(('module', 'code', 'became', 'why'), SURVIVORS)
def test_the_code_of_a_survivor_is_still_there(module, code, became, why):
    # Some went into private modules since.
    sources = [path.read_text(encoding='utf-8') for path in (ROOT / 'dns_jax').rglob('*.py')]
    assert any(code.replace(r'\|', '|') in source for source in sources), module
    assert code != became
    assert why


def test_operators_that_tell_nothing_are_left_out():
    telling = ('Binary', 'Add_Sub'), ('Binary', 'BitOr_BitAnd'), ('Comparison', 'Lt_LtE')
    for kind, pair in telling:
        assert mutation.is_telling(f'core/Replace{kind}Operator_{pair}')
    silent = ('Binary', 'Add_BitOr'), ('Binary', 'LShift_Mul'), ('Comparison', 'Lt_Is')
    for kind, pair in silent:
        assert not mutation.is_telling(f'core/Replace{kind}Operator_{pair}')
    assert mutation.is_telling('core/NumberReplacer')
    assert not mutation.is_telling('core/RemoveDecorator')


def test_mutants_of_a_function():
    pytest.importorskip('cosmic_ray')
    source = 'def add(x: 1 + 2, y) -> 3:\n    return x + y\n'
    mutants = {mutated.splitlines()[1].strip() for _, _, mutated in mutation.mutants_of(source)}
    signs = ('-', '*', '/', '//', '%', '**')
    assert mutants == {f'return x {sign} y' for sign in signs}
