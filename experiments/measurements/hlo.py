"""What a compiled program holds in memory, read from XLA's text of it.

An array counts as held where its instruction lies in the entry computation or in one that it runs
as a loop, a branch or a call; what lies within a fusion exists one value at a time.
"""

import collections
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 'f64': 8}
_FLOATS = {'bf16', 'f16', 'f32', 'f64'}
_SAME_MEMORY = {'bitcast', 'get-tuple-element', 'tuple', 'opt-barrier'}
_SAME_VALUES = {'bitcast', 'copy', 'transpose', 'reshape'}

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_RUN = re.compile(r'(?:body|condition|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)')
_FUSED = re.compile(r'calls=%?([\w.\-]+)')


class Array(NamedTuple):
    """What an instruction gives, or one part of it."""

    dtype: str  # as XLA writes it
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Counts the elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Counts the bytes; 0 for types that hold no numbers."""
        return self.size * _BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]  # several for a tuple
    operation: str
    operands: tuple[str, ...]
    rest: str  # of the line, operands and attributes
    is_root: bool


Computation = dict[str, Instruction]


class CompiledText(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def held(self) -> list[Computation]:
        """Returns the entry and all computations that are run by it, not fused into it."""
        names, waiting = [], [self.entry]
        while waiting:
            name = waiting.pop()
            if name in names or name not in self.computations:
                continue
            names.append(name)
            for line in self.computations[name].values():
                if line.operation in ('while', 'call', 'conditional'):
                    for found in _RUN.findall(line.rest):
                        waiting += re.findall(r'[\w.\-]+', found)
        return [self.computations[name] for name in names]


def parse(text: str) -> CompiledText:
    """Reads a program.

    Args:
      text: as `jax.stages.Compiled.as_text` gives it.

    Returns:
      Its computations, their instructions in the order of the text, which for a compiled program
      is that of running.

    Raises:
      ValueError: if the text has no entry.
    """
    computations: dict[str, Computation] = {}
    entry, current = '', {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, types, operation, rest = found.groups()
            arrays = tuple(
                Array(dtype, tuple(map(int, filter(None, shape.split(',')))))
                for dtype, shape in _ARRAY.findall(types)
            )
            operands = tuple(re.findall(r'%([\w.\-]+)', rest.partition(')')[0]))
            current[name] = Instruction(name, arrays, operation, operands, rest, bool(root))
    if not entry:
        raise ValueError(f'text must be of a compiled program, but has no ENTRY: {text[:80]!r}')
    return CompiledText(computations, entry)


def masks_as_floats(program: CompiledText, shapes: Iterable[Sequence[int]]) -> list[str]:
    """Finds float arrays of a mask's size that are the mask converted, and held in memory."""
    sizes = set(map(math.prod, shapes))
    return [
        line.name
        for computation in program.held()
        for line in computation.values()
        if _holds(line, _FLOATS, sizes) and _is_converted(program, computation, line)
    ]


def masked_weights(program: CompiledText, shapes: Iterable[Sequence[int]]) -> list[Instruction]:
    """Finds the copies W⊙T: held float arrays of a mask's size, computed from a mask."""
    sizes = set(map(math.prod, shapes))
    return [
        line
        for computation in program.held()
        for line in computation.values()
        if line.operation in ('fusion', 'select')
        and _holds(line, _FLOATS, sizes)
        and any(_holds(computation[name], {'pred'}, _sizes(line)) for name in line.operands)
    ]


def copied_parameters(program: CompiledText) -> dict[str, int]:
    """Counts what a program copies of its own arguments, because it writes over them.

    Returns:
      `{dtype: bytes}`.
    """
    entry, copied = program.computations[program.entry], collections.Counter()
    for line in entry.values():
        if line.operation == 'copy' and entry[line.operands[0]].operation == 'parameter':
            for array in line.arrays:
                copied[array.dtype] += array.bytes
    return dict(copied)


def most_at_once(program: CompiledText, names: Collection[str]) -> int:
    """Counts how many bytes some arrays of the entry take at most at one time.

    Args:
      program: from `parse`; its entry must be in the order of running.
      names: of the instructions that give the arrays.

    Returns:
      The bytes between their computation and their last use, at the fullest moment.
    """
    entry = program.computations[program.entry]
    owners: dict[str, set[str]] = {}
    last = {}
    for number, line in enumerate(entry.values()):
        of_operands = set().union(*(owners.get(name, set()) for name in line.operands))
        last |= dict.fromkeys(of_operands, number)
        owners[line.name] = of_operands if line.operation in _SAME_MEMORY else set()
        if line.name in names:
            owners[line.name], last[line.name] = {line.name}, number
    most = alive = 0
    ends = collections.Counter()
    for number, line in enumerate(entry.values()):
        if line.name in names:
            size = sum(array.bytes for array in line.arrays)
            alive += size
            ends[last[line.name]] += size
        most = max(most, alive)
        alive -= ends[number]
    return most


def _sizes(line: Instruction) -> set[int]:
    return {array.size for array in line.arrays}


def _holds(line: Instruction, dtypes: Collection[str], sizes: Collection[int]) -> bool:
    return any(array.dtype in dtypes and array.size in sizes for array in line.arrays)


def _is_converted(program: CompiledText, computation: Computation, line: Instruction) -> bool:
    """Says whether values are converted masks and nothing else, also where a fusion does that."""
    if line.operation in _SAME_VALUES:
        return _is_converted(program, computation, computation[line.operands[0]])
    if line.operation == 'convert':
        return computation[line.operands[0]].arrays[0].dtype == 'pred'
    fused = _FUSED.search(line.rest) if line.operation == 'fusion' else None
    if not fused:
        return False
    within = program.computations[fused[1]]
    (root,) = (inner for inner in within.values() if inner.is_root)
    values = [within[name] for name in root.operands] if root.operation == 'tuple' else [root]
    return any(_is_converted(program, within, value) for value in values)
