"""What surgery costs at scale, as a page in Markdown and a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from experiments.networks.names import NETWORK_NAMES
from experiments.reports.plots import BLACK, BLUE, ORANGE, style
from experiments.reports.tables import table

Result = Mapping[str, Any]

_KINDS = {
    'dense': 'dense',
    'surgery': 'surgery, masks updated',
    'density': 'the same, thresholds refreshed',
}
# Bytes per weight that a step must at least move: float32 weights, momenta and gradients, masks of
# one byte.
_UPDATE_BYTES = {
    'gradient, momentum and weight read': 12,
    'momentum and weight written': 8,
}
_SURGERY_BYTES = {
    'weight and mask read for W⊙T': 5,
    'W⊙T written': 4,
    'weight and mask read for the new mask': 5,
    'new mask written': 1,
}
_MEMORY = {
    'arguments': 'arguments: weights, momenta, masks, batch',
    'temporaries': 'temporaries',
    'planned': 'planned: both, and what is not written over them',
    'peak': "XLA's own peak",
    'masks': 'of these: masks',
    'masked_weights': 'copies W⊙T',
    'masked_weights_at_once': 'of them at one time',
    'copied_weights': 'arguments copied before they are written over: weights',
    'copied_masks': 'and masks',
}


def page(result: Result, name: str) -> str:
    """Writes the page.

    Args:
      result: as `experiments.scale.measure` returns it.
      name: of the files beside the page, without their endings.

    Returns:
      Markdown.
    """
    machine = result['machine']
    parts = [
        '# What surgery costs at scale',
        f'`{result["command"]}`, {result["device"]}, {result["cores"]} cores, computed in '
        f'{result["dtype"]}; all numbers are in `{name}.json`, and '
        '`experiments/measurements/scale_report.py` writes this page from it. Times are medians of '
        'single steps, ratios are within a round. Surgery updates its masks at every step (σ = 1), '
        'the most it can cost. In the same process, a product of two large matrices reaches '
        f'{machine["flop_per_s"] / 1e9:,.0f} GFLOP/s, and a pass over memory '
        f'{machine["bytes_per_s"] / 1e9:,.1f} GB/s, read and written.',
        '## The step',
        *_step(result),
        '## Memory',
        *_memory(result['step']),
    ]
    if result['sizes']:
        parts += ['## Cost against size', *_sizes(result, name)]
    if 'input' in result:
        parts += ['## Input', *_input(result)]
    return '\n\n'.join(parts) + '\n'


def _step(result: Result) -> list[str]:
    step, machine = result['step'], result['machine']
    rows = []
    for kind, title in _KINDS.items():
        seconds = step['ms'][kind] / 1e3
        rate = step['flop'] / seconds
        rows.append(
            [
                title,
                f'{1e3 * seconds:,.1f}',
                f'{step["batch_size"] / seconds:,.1f}',
                f'{rate / 1e9:,.0f}',
                f'{100 * rate / machine["flop_per_s"]:.0f}',
            ]
        )
    low, high = step['ratio_quartiles']
    verdict = 'within' if step['ratio'] <= step['bar'] else 'above'
    name = NETWORK_NAMES[step['network']] + (
        f' of width {step["width"]}' if step['width'] != 1 else ''
    )
    return [
        f'{name}, {step["weights"]:,} weights, {step["batch_size"]} images of noise.',
        table(['step', 'ms', 'images/s', 'GFLOP/s', 'of the large product, %'], rows),
        f'Surgery takes {step["ratio"]:.3f}× as long as dense training (half of all rounds '
        f'{low:.3f} to {high:.3f}), {verdict} the {step["bar"]:.2f} wanted. A refresh of the '
        f'thresholds of all layers by one density adds {step["refresh_ms"]:,.0f} ms where it is '
        'due.',
        f'A step is {step["flop"] / 1e9:,.1f} GFLOP, counted from '
        f'{step["multiply_adds"] / 1e6:,.0f} million multiply-adds of one image forward: two '
        'operations each, three times for every layer but the first, whose inputs need no '
        f'gradient. XLA counts {step["xla"]["dense"]["flop"] / 1e9:,.1f} GFLOP for the dense step, '
        f'{step["xla"]["dense"]["flop"] / step["flop"]:.2f} of that, as it leaves out products '
        f'with padding and adds all else, and {step["xla"]["surgery"]["flop"] / 1e9:,.1f} under '
        'surgery. Rates above are by the first count.',
    ]


def _memory(step: Mapping[str, Any]) -> list[str]:
    weights, memory = step['weights'], step['memory']
    dense, surgery = memory['dense'], memory['surgery']
    rows = [
        [
            title,
            f'{dense[key] / 2**20:,.1f}',
            f'{surgery[key] / 2**20:,.1f}',
            f'{(surgery[key] - dense[key]) / weights:+.2f}',
        ]
        for key, title in _MEMORY.items()
    ]
    more = {
        key: (surgery[key] - dense[key]) / weights for key in ('planned', 'masks', 'temporaries')
    }
    floats = surgery['masks_as_floats']
    return [
        'As XLA plans it, and as its program says (`experiments/measurements/hlo.py`):',
        table(['MiB', 'dense', 'surgery', 'difference, bytes per weight'], rows),
        f'Surgery needs {more["planned"]:.2f} bytes per weight more: {more["masks"]:.2f} for the '
        f'masks themselves, {more["temporaries"]:.2f} of temporaries. The copies W⊙T that the '
        f'products read take {surgery["masked_weights_at_once"] / weights:.2f} bytes per weight '
        f'when most of them are alive, {_share(surgery)} of what all of them take; what of that '
        'the temporaries did not grow by lies in memory that is for other arrays at other times. '
        f'{floats or "No"} mask{"" if floats == 1 else "s"} held as '
        f'float{"" if floats == 1 else "s"}.',
    ]


def _share(memory: Mapping[str, int]) -> str:
    share = memory['masked_weights_at_once'] / max(1, memory['masked_weights'])
    return f'{100 * share:.0f} %'


def _sizes(result: Result, name: str) -> list[str]:
    sizes, machine = result['sizes'], result['machine']
    header = ['weights', 'dense ms', 'surgery ms', 'ratio', 'GFLOP', 'planned MiB: dense']
    header += ['surgery', 'more, bytes per weight']
    rows = []
    for row in sizes:
        memory = [row['memory'][kind]['planned'] for kind in ('dense', 'surgery')]
        timed = (
            [f'{row["ms"]["dense"]:,.2f}', f'{row["ms"]["surgery"]:,.2f}', f'{row["ratio"]:.3f}']
            if 'ms' in row
            else ['not run', '', '']
        )
        rows.append(
            [
                f'{row["weights"]:,}',
                *timed,
                f'{row["flop"] / 1e9:,.2f}',
                *(f'{each / 2**20:,.0f}' for each in memory),
                f'{(memory[1] - memory[0]) / row["weights"]:.2f}',
            ]
        )
    parts = [
        f'Fully connected networks of two hidden layers, {sizes[0]["batch_size"]} images of 28x28 '
        'pixels a step; those not run are compiled from shapes alone.',
        table(header, rows),
    ]
    timed = [row for row in sizes if 'ms' in row]
    if len(timed) > 1:
        parts += [f'![Time of a step against weights]({name}.png)', _slope(timed, machine)]
    return parts


def _slope(timed: Sequence[Mapping[str, Any]], machine: Mapping[str, float]) -> str:
    """Explains how times grow with size by operations and bytes per weight."""
    weights = np.array([row['weights'] for row in timed], float)
    slopes = {
        kind: np.polyfit(np.log(weights), np.log([row['ms'][kind] for row in timed]), 1)[0]
        for kind in ('dense', 'surgery')
    }
    last = timed[-1]
    picoseconds = {kind: 1e9 * last['ms'][kind] / last['weights'] for kind in slopes}
    flop = last['flop'] / last['weights']
    update, surgery = sum(_UPDATE_BYTES.values()), sum(_SURGERY_BYTES.values())
    by_xla = {kind: last['xla'][kind]['bytes'] / last['weights'] for kind in slopes}
    byte, operation = 1e12 / machine['bytes_per_s'], 1e12 / machine['flop_per_s']
    said = {
        title: '; '.join(f'{what} {count}' for what, count in parts.items())
        for title, parts in (('update', _UPDATE_BYTES), ('surgery', _SURGERY_BYTES))
    }

    def ratio(batches: float) -> float:
        return 1 + surgery * byte / (batches * flop * operation + update * byte)

    return (
        f'Over these sizes time grows as weights to the power of {slopes["dense"]:.2f} dense and '
        f'{slopes["surgery"]:.2f} under surgery. Per weight, the largest takes '
        f'{picoseconds["dense"]:,.0f} ps dense and {picoseconds["surgery"]:,.0f} under surgery, '
        f'{picoseconds["surgery"] - picoseconds["dense"]:,.0f} more. Its {flop:,.0f} operations '
        f'per weight take at least {flop * operation:,.0f} ps at the speed of the large product; '
        f'the {update} bytes of the update ({said["update"]}) {update * byte:,.0f} ps, and the '
        f'{surgery} bytes of surgery ({said["surgery"]}) {surgery * byte:,.0f} ps at the speed of '
        f'the pass over memory. The operations grow with the batch, the bytes do not: by these '
        f'alone the ratio is {ratio(1):.2f} at {last["batch_size"]} images, {ratio(2):.2f} at '
        f'twice and {ratio(0.5):.2f} at half as many. XLA counts '
        f'{by_xla["dense"]:.0f} bytes per weight read and written dense, {by_xla["surgery"]:.0f} '
        'under surgery, copies of arguments included.'
    )


def _input(result: Result) -> list[str]:
    given, step = result['input'], result['step']
    wanted = 1e3 * step['batch_size'] / step['ms']['dense']
    rows = [
        [
            f'{row["workers"]} processes' if row['workers'] else 'threads of this process',
            f'{row["cores"]}',
            f'{row["images_per_s"]:,.0f}',
            f'{row["images_per_core_s"]:,.0f}',
        ]
        for row in given['rows']
    ]
    best = max(row['images_per_s'] for row in given['rows'])
    return [
        f'{given["images"]:,} JPEGs of 500x375 pixels and {given["bytes_per_image"] / 1e3:,.0f} kB '
        f'made up here, read from array_record files and cropped to {given["size"]} pixels as '
        'Caffe does:',
        table(['decoded by', 'cores', 'images/s', 'per core'], rows),
        f'The dense step above takes {wanted:,.1f} images/s, {wanted / best:.2f} of what all cores '
        f'decode, so decoding {"keeps" if best >= wanted else "does not keep"} up with it.',
    ]


def figure(result: Result) -> Figure:
    """Draws the time of a fully connected network's step against weights, below it the ratio.

    Args:
      result: as `experiments.scale.measure` returns it.

    Returns:
      The picture.
    """
    timed = [row for row in result['sizes'] if 'ms' in row]
    picture = Figure(figsize=(9, 6), dpi=100, layout='constrained')
    times, ratios = picture.subplots(2, sharex=True, height_ratios=(2, 1))
    times.set_title('A training step of fully connected networks')
    weights = [row['weights'] for row in timed]
    for kind, colour, marker in (('dense', BLACK, 'o'), ('surgery', BLUE, 's')):
        milliseconds = [row['ms'][kind] for row in timed]
        times.plot(weights, milliseconds, color=colour, marker=marker, label=kind)
    ratios.plot(weights, [row['ratio'] for row in timed], color=BLUE, marker='s')
    step = result['step']
    name = NETWORK_NAMES[step['network']]
    point = {'color': ORANGE, 'marker': 'D', 'linestyle': ''}
    ratios.plot([step['weights']], [step['ratio']], label=f'{name}, surgery', **point)
    times.plot([step['weights']], [step['ms']['surgery']], **point)
    ratios.axhline(step['bar'], color=ORANGE, linestyle='--', label=f'wanted of {name} at most')
    for axes in (times, ratios):
        axes.set_xscale('log')
        style(axes)
    if timed:
        times.set_yscale('log')
    times.yaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
    times.set_ylabel('time of a step (ms)')
    ratios.set_ylabel('surgery / dense')
    ratios.set_xlabel('weights')
    picture.legend(loc='outside right upper', frameon=False, fontsize=9)
    return picture
