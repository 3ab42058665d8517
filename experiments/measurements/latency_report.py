"""What the timing of a pruned network says, as tables in Markdown."""

from collections.abc import Mapping
from typing import Any

from experiments.reports.tables import table


def latency_tables(result: Mapping[str, Any]) -> str:
    """Writes the tables of one measurement.

    Args:
      result: as `experiments.latency.measure` returns it.

    Returns:
      Markdown: the ways to run the network; the layers of a chain and what bounds them; the
      densities of break-even, where they were looked for.
    """
    parts = [
        f'## {result["model"]}',
        f'`{result["command"]}` on one core, {result["device"]}:',
        _ways(result),
    ]
    if 'layers' in result:
        parts += [
            f'This core needs {1e12 / result["multiply_adds_per_s"]:.1f} ps for a multiply-add in '
            f'a product of two large matrices, and {1e12 / result["bytes_per_s"]:.0f} ps to copy a '
            'byte of memory. So if everything came from memory, a layer would take at least this '
            'long, in µs:',
            _bounds(result),
        ]
    if 'break_even' in result:
        parts += ['Sparse is as fast as dense at these densities:', _break_even(result)]
    return '\n\n'.join(parts)


def _ways(result: Mapping[str, Any]) -> str:
    batches = result['batches']
    header = ['way']
    for batch in batches:
        header += [f'batch {batch}: median µs', 'least', 'ratio']
    rows = []
    for way in next(iter(batches.values()))['ways']:
        row = [way]
        for of_batch in batches.values():
            entry = of_batch['ways'][way]
            row += [f'{entry["median_us"]:,.1f}', f'{entry["least_us"]:,.1f}']
            row += [f'{entry["ratio"]:.2f}×']
        rows.append(row)
    return table(header, rows)


def _bounds(result: Mapping[str, Any]) -> str:
    """The least time of each layer, dense and from kept weights alone, and that of its runner."""
    header = ['layer', 'inputs → units', 'kept', 'kept %']
    for batch in result['batches']:
        header += [f'batch {batch}: dense', 'kept alone', 'by itself']
    rows = []
    for name, layer in result['layers'].items():
        row = [name, f'{layer["inputs"]:,} → {layer["units"]:,}', f'{layer["kept"]:,}']
        row.append(f'{100 * layer["kept"] / layer["weights"]:.1f}')
        for batch, of_batch in result['batches'].items():
            examples = int(batch)
            moved = 4 * layer['numbers'] * examples
            dense, kept = (
                _bound(result, examples * layer[multiply_adds], moved + weight_bytes)
                for multiply_adds, weight_bytes in (
                    ('multiply_adds', 4 * layer['weights']),
                    ('kept_multiply_adds', 8 * layer['kept']),  # a value and a position each
                )
            )
            way = 'JAX and C++' if 'JAX and C++' in of_batch['seconds'] else 'JAX'
            seconds, kind = of_batch['seconds'][way][name], of_batch['kinds'][way][name]
            row += [f'{dense:,.2f}', f'{kept:,.2f}', f'{1e6 * seconds[kind]:,.1f} ({kind})']
        rows.append(row)
    return table(header, rows)


def _bound(result: Mapping[str, Any], multiply_adds: int, bytes_moved: int) -> float:
    computing = multiply_adds / result['multiply_adds_per_s']
    return 1e6 * max(computing, bytes_moved / result['bytes_per_s'])


def _break_even(result: Mapping[str, Any]) -> str:
    of_batches = result['break_even']
    ways = next(iter(of_batches.values()))
    rows = [[way, *(_density(of_batch[way]) for of_batch in of_batches.values())] for way in ways]
    return table(['way', *(f'batch {batch}' for batch in of_batches)], rows)


def _density(density: float) -> str:
    if density == 1:
        return 'all tried'
    return f'{100 * density:.1f} %' if density else 'none tried'
