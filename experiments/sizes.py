"""Networks of several methods, all coded: their error against bytes, and against multiply-adds.

python -m experiments.sizes --flagfile=experiments/flagfiles/sizes_lenet300.flags

Each network goes through the codec of `experiments.export`, which counts all that a method needs:
masks, signs, factors, scales, codebooks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dns_jax.files.codec import SUFFIX
from dns_jax.files.writing import write_whole
from experiments.artefacts.loading import load_model
from experiments.config import command_line
from experiments.config.command_line import flag, flags_of, read_variant
from experiments.plain.coding import CodingConfig, code, find_network
from experiments.plain.training import make_folder
from experiments.reports import plots
from experiments.reports.tables import Rows, group_rows, middle_and_range, table, to_csv

_SEED = '{seed}'

# Of the table: their names, formats and units.
_COLUMNS = (
    ('bytes', ',.0f'),
    ('multiply_adds', ',.0f'),
    ('error_before', '.2f', ' %'),
    ('test_error', '.2f', ' %'),
)


@dataclasses.dataclass(frozen=True)
class SizesConfig:
    """What `experiments.sizes` does."""

    workdir: str = flag('runs/sizes', 'Folder that the result is written to.', decides=False)
    coded: tuple[str, ...] = flag(
        (),
        'NAME: FLAGS of how the networks of one method are coded, as in "surgery: '
        '--model=runs/compare/surgery-100-{seed}/pruned.safetensors --clusters=5". Each seed '
        'stands in its turn for {seed}, which one seed does not need. Give this flag once for each '
        'method and --clusters.',
    )
    seeds: int = flag(3, 'Networks of each method, with the seeds from 0 upwards.', lower_bound=1)
    shared: Mapping[str, Any] = flags_of(CodingConfig, 'model')

    def __post_init__(self):
        if not self.files():
            raise ValueError('--coded must be given at least once')
        points = [(method, own.clusters) for method, seed, own in self.files() if not seed]
        if twice := sorted({point for point in points if points.count(point) > 1}):
            raise ValueError(f'--coded has one NAME and --clusters twice: {twice}')

    def files(self) -> list[tuple[str, int, CodingConfig]]:
        """Returns the method, the seed and the flags of each file to write."""
        files = []
        for text in self.coded:
            name, changed = read_variant('coded', text, CodingConfig)
            model = changed.get('model', '')
            if not model or (self.seeds > 1 and _SEED not in model):
                raise ValueError(f'--coded={text} must have a --model with {_SEED}')
            for seed in range(self.seeds):
                own = {'model': model.replace(_SEED, f'{seed}')}
                files.append((name, seed, CodingConfig(**{**self.shared, **changed, **own})))
        return files


def compare(config: SizesConfig) -> list[dict[str, Any]]:
    """Codes all networks, writes `sizes.csv`, `.md` and `.png`, and prints the table.

    Returns:
      A row for each network.

    Raises:
      ValueError, RuntimeError: if a network cannot be read or coded, the folder has rows, or data
        are damaged.
      OSError: if a file cannot be read or written.
      FloatingPointError: if tuning diverges.
    """
    networks = []
    for *_, own in config.files():
        networks.append(load_model(own.model, to_run=False))
        find_network(own.model, networks[-1])  # before the work: what cannot be coded is refused
    folder = make_folder(config.workdir, 'sizes')
    rows = []
    for number, (method, seed, own) in enumerate(config.files()):
        path = folder / f'{number}{SUFFIX}'
        result = code(own, networks[number], path)
        rows.append(
            {
                **{'method': method, 'clusters': own.clusters, 'seed': seed},
                **{'bytes': path.stat().st_size, 'kept': result['kept']},
                **{'multiply_adds': result['multiply_adds'], 'test_error': result['error']},
                'error_before': result['error_before'],
            }
        )
        write_whole(folder / 'sizes.csv', to_csv(rows))  # at once, lest it be lost
    text = to_table(rows)
    write_whole(folder / 'sizes.md', text + '\n')
    plots.save(plots.sizes_figure(rows), folder / 'sizes.png')
    print(text)
    print(f'\nTable and picture: {folder}')
    command_line.print_result(rows)
    return rows


def to_table(rows: Rows) -> str:
    """Writes sizes and errors as Markdown, medians and ranges over seeds."""
    lines = []
    for (method, clusters), own in group_rows(rows, 'method', 'clusters').items():
        cells = [middle_and_range(own, *column) for column in _COLUMNS]
        # In rows that were read back from a CSV a lone number is a float.
        values = clusters if isinstance(clusters, str) else f'{clusters:g}'
        lines.append((method, values, *cells))
    header = 'method', 'values of a layer', 'bytes', 'multiply-adds', 'before coding', 'coded'
    return table(header, lines)


if __name__ == '__main__':
    command_line.launch({}, compare, SizesConfig)
