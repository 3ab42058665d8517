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
_UPDATE_BYTES = {'gradient, momentum and weight read': 12, 'momentum and weight written': 8}
_SURGERY_BYTES = {
    'weight and mask read for W⊙T': 5,
    'W⊙T written': 4,
    'weight and mask read for the new mask': 5,
    'new mask written': 1,
}
_MEMORY = {
    'arguments': 'arguments: weights, momenta, masks, batch',
    'temporaries': 'temporaries',
    'planned': 'planned: both, and results with memory of their own',
    'peak': "XLA's own peak",
    'masks': 'masks',
    'masked_weights': 'copies of W⊙T',
    'masked_weights_at_once': 'copies of W⊙T at one time',
    'copied_weights': 'weights copied before they are overwritten',
    'copied_masks': 'masks copied before they are overwritten',
}


def page(result: Result, name: str) -> str:
    """Writes the page.

    Args:
      result: as `experiments.scale.measure` returns it.
      name: of the files beside the page, without their endings.
    """
    machine = result['machine']
    parts = [
        '# What surgery costs at scale',
        f'`{result["command"]}` measured this on {result["device"]}, with {result["cores"]} cores, '
        f'in {result["dtype"]}. `{name}.json` has all numbers, and '
        '`experiments/measurements/scale_report.py` writes this page from it.',
        'Times are medians of single steps. A ratio compares steps of the same round. Surgery '
        'updates its masks at every step (σ = 1), which is the most it can cost. For comparison, '
        'this machine multiplies two large matrices at '
        f'{machine["flop_per_s"] / 1e9:,.0f} GFLOP/s, and reads and writes memory at '
        f'{machine["bytes_per_s"] / 1e9:,.1f} GB/s.',
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
        f'{name} has {step["weights"]:,} weights. A step takes {step["batch_size"]} images. They '
        'are random noise.',
        table(['step', 'ms', 'images/s', 'GFLOP/s', 'of the large product, %'], rows),
        f'Surgery takes {step["ratio"]:.3f}× as long as dense training (half of all rounds '
        f'{low:.3f} to {high:.3f}). This is {verdict} the {step["bar"]:.2f} that we wanted. To '
        'find new thresholds for all layers by one density takes another '
        f'{step["refresh_ms"]:,.0f} ms.',
        f'A step takes {step["flop"] / 1e9:,.1f} GFLOP. This is counted from the '
        f'{step["multiply_adds"] / 1e6:,.0f} million multiply-adds of one image forward. Each '
        'counts as two operations, and each layer counts three times, except the first, whose '
        'inputs need no gradient. The rates above use this count. XLA leaves out products with '
        'padding and adds everything else. It counts '
        f'{step["xla"]["dense"]["flop"] / 1e9:,.1f} GFLOP for the dense step '
        f'({step["xla"]["dense"]["flop"] / step["flop"]:.2f} of ours) and '
        f'{step["xla"]["surgery"]["flop"] / 1e9:,.1f} under surgery.',
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
        "These are the numbers of XLA's plan and of the compiled program, which "
        '`experiments/measurements/hlo.py` reads:',
        table(['MiB', 'dense', 'surgery', 'difference, bytes per weight'], rows),
        f'Surgery needs {more["planned"]:.2f} bytes per weight more: {more["masks"]:.2f} for the '
        f'masks, and {more["temporaries"]:.2f} for temporaries. The products read copies of W⊙T. '
        f'These take up to {surgery["masked_weights_at_once"] / weights:.2f} bytes per weight at '
        'one time. The temporaries grow by less, as this memory holds other arrays at other times. '
        f'{floats or "No"} mask{" is" if floats == 1 else "s are"} held as floats.',
    ]


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
        'These are fully connected networks with two hidden layers. A step takes '
        f'{sizes[0]["batch_size"]} images of 28x28 pixels. Networks marked "not run" were only '
        'compiled.',
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
        'Over these sizes the time of a step grows with the number of weights to the power of '
        f'{slopes["dense"]:.2f} in dense training, and of {slopes["surgery"]:.2f} under surgery. '
        f'For each weight the largest network takes {picoseconds["dense"]:,.0f} ps in dense '
        f'training and {picoseconds["surgery"]:,.0f} ps under surgery, '
        f'{picoseconds["surgery"] - picoseconds["dense"]:,.0f} ps more.\n\n'
        'What is the least time that a weight could take?\n\n'
        f'- {flop:,.0f} operations take {flop * operation:,.0f} ps at the speed of the large '
        'product.\n'
        f'- The update moves {update} bytes ({said["update"]}). This takes {update * byte:,.0f} ps '
        'at the speed of memory.\n'
        f'- Surgery moves {surgery} bytes ({said["surgery"]}). This takes {surgery * byte:,.0f} '
        'ps.\n\n'
        'The operations grow with the batch, and the bytes do not. By these numbers alone the '
        f'ratio would be {ratio(1):.2f} at {last["batch_size"]} images, {ratio(2):.2f} at twice as '
        f'many and {ratio(0.5):.2f} at half as many. XLA counts more bytes, since it also copies '
        f'arguments: {by_xla["dense"]:.0f} per weight in dense training, and '
        f'{by_xla["surgery"]:.0f} under surgery.'
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
        f'The input is {given["images"]:,} JPEGs, made up here, of 500x375 pixels and '
        f'{given["bytes_per_image"] / 1e3:,.0f} kB. They are read from array_record files and '
        f'cropped to {given["size"]} pixels as Caffe does:',
        table(['decoded by', 'cores', 'images/s', 'per core'], rows),
        f'The dense step above needs {wanted:,.1f} images/s. That is {wanted / best:.2f} of what '
        'all cores decode, so decoding '
        f'{"keeps" if best >= wanted else "does not keep"} up with it.',
    ]


def figure(result: Result) -> Figure:
    """Draws the time of a fully connected network's step against weights, below it the ratio."""
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
