"""The numbers of the pages are those of the committed results."""

import json
import re
import statistics
from pathlib import Path

import pytest

from experiments import diversity, low_rank, mixed, one_bit, results, sizes
from experiments.measurements import latency_report, scale_report
from experiments.reports import run_report, sweep_tables, tables

ROOT = Path(__file__).parents[2]
# Flags younger than the results, set to what these runs did without them.
NEWER = {'finetuning_steps'}
FLAGFILES = ROOT / 'experiments' / 'flagfiles'
PAGES_OF_COMPARISONS = {
    **dict.fromkeys(('compare', 'ablations', 'repair'), 'compare.md'),
    'quantisers': 'baselines.md',
    'units': 'runtime.md',
    'networks': 'networks.md',
}
COMPARISONS = [
    (path.stem, page)
    for kind, page in PAGES_OF_COMPARISONS.items()
    for path in sorted(FLAGFILES.glob(f'{kind}_*.flags'))
    if path.stem != 'compare_digits'
]
BOTH = ('compression', 'test_error')
TIMINGS = sorted((ROOT / 'results' / 'runtime').glob('*.json'))


def page(name):
    """A page as it is written, with single spaces for its line breaks."""
    return ' '.join((ROOT / name).read_text(encoding='utf-8').split())


def read(name):
    return json.loads((ROOT / 'results' / name).read_text(encoding='utf-8'))


def text(table):
    """A table as it stands in `page`."""
    return ' '.join(table.split())


def test_the_tables_are_those_of_the_results():
    said = page('docs/results.md')
    assert text(results.table(results.read_summaries())) in said
    rows = results.read_frontiers()
    assert rows
    assert text(tables.to_text(sweep_tables.frontier_tables(rows))) in said


@pytest.mark.parametrize('name', ['alexnet_mnist', 'alexnet_mnist_wide'])
def test_alexnet_on_mnist_is_that_of_the_results(name):
    summary, said = read(f'{name}.json'), page('docs/imagenet.md')
    table = text(tables.to_text(run_report.published_tables(summary)))
    assert name != 'alexnet_mnist' or table in said
    errors = f'{summary["reference_error"]:.2f} → {summary["test_error"]:.2f} % test error'
    assert f'{errors} at {summary["compression"]:.1f}×' in said


def test_the_page_of_scale_is_that_of_the_results():
    result = read('scale.json')
    assert scale_report.page(result, 'scale') == (ROOT / 'results' / 'scale.md').read_text()
    said = page('docs/performance.md')
    assert f'{result["step"]["ratio"]:.2f}× the time of a dense step' in said
    ratios = [row['ratio'] for row in result['sizes'] if 'ratio' in row]
    assert f'it takes {min(ratios):.2f}× to {max(ratios):.2f}×' in said


@pytest.mark.parametrize(('name', 'page'), COMPARISONS)
def test_pages_hold_the_tables_and_commands_of_comparisons(name, page):
    said = (ROOT / 'results' / page).read_text()
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    assert tables.to_text(sweep_tables.compare_tables(rows)) in said
    assert f'python -m experiments.compare --flagfile=experiments/flagfiles/{name}.flags' in said
    # The variants of the table are those of the flagfile, and all its seeds are there.
    flags = (FLAGFILES / f'{name}.flags').read_text()
    named = re.findall(r'^--variant=([^:]*):', flags, re.MULTILINE)
    assert list(dict.fromkeys(row['variant'] for row in rows)) == named
    (seeds,) = re.findall(r'^--seeds=(\d+)', flags, re.MULTILINE)
    assert {row['seed'] for row in rows} == set(range(int(seeds)))


NETWORKS = {  # with the variant of surgery
    'LeNet-5, MNIST': ('compare_lenet5', 'surgery', '1 % of all weights', 100, '{:.2f} %'),
    'GPT of 2 blocks, tiny Shakespeare': (
        'networks_gpt',
        'soft surgery',
        '2 % of the kernels',
        0.02,
        '{:.2f} bits',
    ),
    'ResNet-8, part of CIFAR-10': (
        'networks_resnet8',
        'soft surgery',
        '2 % of the kernels',
        0.02,
        '{:.1f} %',
    ),
}
DENSITIES = (0.1, 0.05, 0.02)


def middle(name, variant, target, column='test_error'):
    """The median of a comparison over its seeds."""
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    own = [row for row in rows if (row['variant'], row['target']) == (variant, target)]
    return statistics.median(row[column] for row in own)


@pytest.mark.parametrize('title', NETWORKS)
def test_the_readme_has_a_row_for_each_network(title):
    name, surgery, kept, target, form = NETWORKS[title]
    before = middle(name, 'surgery', target, 'reference_error')
    after = (middle(name, variant, target) for variant in (surgery, 'gradual'))
    cells = [title, kept, *(form.format(number) for number in (before, *after))]
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert cells in [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def leads(name, *others):
    """By how much soft surgery is better than others at the three densities."""
    pairs = zip(others, DENSITIES, strict=True)
    return [
        middle(name, *other) - middle(name, 'soft surgery', density) for other, density in pairs
    ]


def test_pages_say_what_became_of_the_gpt():
    own, name = page('results/networks.md'), 'networks_gpt'
    text = 'by {:.2f} bits per character at 10 %, by {:.2f} at 5 % and by {:.2f} at 2 %'
    assert text.format(*leads(name, *(('gradual', density) for density in DENSITIES))) in own
    alike = [middle(name, variant, 0.2) for variant in ('surgery', 'soft surgery', 'gradual')]
    text = 'At 20 % surgery has {0:.2f} bits, and soft surgery and gradual pruning have {1:.2f}.'
    assert text.format(*alike) in own
    assert f'{alike[1]:.2f}' == f'{alike[2]:.2f}'
    narrow = leads(name, *((f'dense, width {width}', '') for width in (36, 30, 26)))
    assert 'leads it by {:.2f}, {:.2f} and {:.2f} bits'.format(*narrow) in own
    above = middle(name, 'soft surgery', 0.1) - middle(name, 'dense as long', '')
    assert f'{above:.2f} bits more than the dense one' in own
    rivals = {
        'RigL has': ('networks_gpt_scratch', 'RigL'),
        'AC/DC has': ('networks_gpt_rivals', 'AC/DC'),
        'Straight-through masks have': ('networks_gpt_rivals', 'straight-through'),
        'Without splicing surgery has': ('networks_gpt_rivals', 'without splicing'),
    }
    for title, rival in rivals.items():
        errors = [middle(*rival, density) for density in (0.05, 0.02)]
        assert f'{title} {errors[0]:.2f} and {errors[1]:.2f}' in own
        for density, error in zip((0.05, 0.02), errors, strict=True):
            assert middle(name, 'soft surgery', density) < error
    said = page('docs/results.md')
    at_2 = [middle(name, variant, 0.02) for variant in ('soft surgery', 'surgery', 'gradual')]
    assert '{:.2f} bits per character by surgery with soft thresholds'.format(*at_2) in said
    assert f'{at_2[1]:.2f} without them, and {at_2[2]:.2f} by gradual pruning' in said


def test_pages_say_what_embeddings_that_take_part_are_worth():
    own, dense = page('results/networks.md'), 'networks_gpt'
    errors = [
        middle('networks_gpt_embeddings', 'soft surgery', times) for times in (6.413, 9.17, 12.36)
    ]
    assert 'Soft surgery has {:.2f}, {:.2f} and {:.2f} bits.'.format(*errors) in own
    pairs = list(zip(DENSITIES, (36, 30, 26), errors, strict=True))
    less = [middle(dense, 'soft surgery', density) - error for density, _, error in pairs]
    assert 'it has {:.2f}, {:.2f} and {:.2f} more'.format(*less) in own
    lead = [middle(dense, f'dense, width {width}', '') - error for _, width, error in pairs]
    assert 'grows to {:.2f}, {:.2f} and {:.2f} bits'.format(*lead) in own
    above = errors[0] - middle(dense, 'dense as long', '')
    assert f'{above:.2f} bits more than the dense network that is trained as long' in own
    assert f'it has {errors[-1]:.2f} with as many parameters' in page('docs/results.md')
    assert f'it then has {errors[-1]:.2f} bits with as many' in page('docs/questions.md')
    assert f'a GPT that keeps a twelfth then has [{less[-1]:.2f} bits' in page('docs/rules.md')


def test_the_page_answers_what_changes_are_worth():
    own, name = page('results/networks.md'), 'networks_questions'
    best = middle(name, 'soft surgery', 0.05)

    def worth(variant, target=0.05, sign=1):
        return f'{sign * (middle(name, variant, target) - best):.2f}'

    assert f'without it the error is {worth("no splicing")} bits higher' in own
    assert f'the error is {worth("hard thresholds")} bits higher. By gradual' in own
    assert f'pruning it is {worth("gradual")} higher' in own
    assert f'the error is {worth("embeddings take part", 7.22, -1)} bits lower' in own
    assert f'without it the error is {worth("no weight decay", sign=-1)} bits lower' in own
    for rate in ('at a tenth', 'nearly as fast'):
        assert f'{worth(f"pruned weights learn {rate}")} bits higher at a tenth' in own
    for allocation in ('layers compared by rms', 'layers share by their axes'):
        assert f'(ERK), have {worth(allocation)} bits more' in own
    assert f'every 47th step cost {worth("thresholds every 47 steps")} bits' in own
    more = middle(name, 'thresholds by mean and std', '', 'kept') / middle(
        name, 'soft surgery', 0.05, 'kept'
    )
    more_bits = worth('thresholds by mean and std', '')
    assert f'keep {more:.1f} times as many parameters and have {more_bits} bits more' in own
    for name_of_same in ('logarithmic ramp', 'masks change to the end'):
        assert abs(middle(name, name_of_same, 0.05) - best) < 0.01


def test_the_page_says_what_comes_of_random_weights():
    own = page('results/networks.md')
    for title, variant in {'Soft surgery': 'soft surgery', 'Gradual pruning': 'gradual'}.items():
        first, dense = (
            results.read_comparison(ROOT / 'results' / f'networks_{name}.csv')
            for name in ('scratch', 'questions')
        )
        pairs = [
            [
                row['test_error']
                for row in rows
                if (row['variant'], row['target']) == (variant, 0.05)
            ]
            for rows in (first, dense)
        ]
        assert all(one < other for one, other in zip(*pairs, strict=True))
        found, after = map(statistics.median, pairs)
        half = 'Where half of the steps train a dense network first'
        assert f'{title} has {found:.2f} bits. {half}, it has {after:.2f}.' in own
    rigl, set_ = (middle('networks_scratch', variant, 0.05) for variant in ('RigL', 'SET'))
    assert f'RigL has {rigl:.2f} bits, and SET has {set_:.2f}' in own


def test_the_page_says_what_patterns_cost_and_gain():
    own, name = page('results/networks.md'), 'networks_patterns'
    variants = ('2 of 4', 'single weights', '4 of 16', 'heads and units')
    two, single, four, heads = (middle(name, variant, 0.1) for variant in variants)
    assert f'{two:.2f} bits, where single weights have {single:.2f}. 4 of 16 has {four:.2f}' in own
    assert f'Whole heads and hidden units have {heads:.2f} bits' in own
    batches = read('runtime/units/gpt_heads.json')['batches']
    one, many = (batches[size]['ways']['JAX, shrunken']['ratio'] for size in ('1', '64'))
    assert f'it runs {one:.1f} times as fast for one text, and {many:.1f} times for 64' in own
    channels = middle('networks_resnet8_patterns', 'channels', 0.1)
    single = middle('networks_resnet8', 'surgery', 0.1)
    narrow = middle('networks_resnet8', 'dense, width 0.3125', '')
    said = f'With channels the error is {channels:.1f} %, where single weights have {single:.1f} %'
    assert f'{said}, and a dense network with a third of the channels {narrow:.1f} %' in own


def test_pages_say_what_became_of_the_resnet():
    own, name = page('results/networks.md'), 'networks_resnet8'
    at_10, at_5, at_2 = leads(name, *(('gradual', density) for density in DENSITIES))
    assert f'At 2 % soft surgery leads gradual pruning by {at_2:.1f} points' in own
    assert f'Soft surgery is behind it by {-at_10:.1f} and {-at_5:.1f} points' in own
    hard = [middle(name, 'surgery', each) - middle(name, 'gradual', each) for each in DENSITIES]
    assert 'without soft thresholds by {:.1f} and {:.1f}'.format(*hard) in own
    above = middle(name, 'gradual', 0.1) - middle(name, 'dense as long', '')
    assert f'At 10 % the best has {above:.1f} points more than the dense one' in own
    at_20 = [middle(name, variant, 0.2) for variant in ('gradual', 'soft surgery', 'surgery')]
    text = 'gradual pruning has {:.1f} %, soft surgery {:.1f} % and surgery {:.1f} %'
    assert text.format(*at_20) in own
    widths = ((f'dense, width {width}', '') for width in (0.3125, 0.21875, 0.15625))
    assert 'leads it by {:.1f}, {:.1f} and {:.1f} points'.format(*leads(name, *widths)) in own
    rivals = {
        'Straight-through masks have': ('networks_resnet8_rivals', 'straight-through'),
        'AC/DC has': ('networks_resnet8_rivals', 'AC/DC'),
        'RigL has': ('networks_resnet8_scratch', 'RigL'),
        'Without splicing surgery has': ('networks_resnet8_rivals', 'without splicing'),
        'with it surgery has': (name, 'surgery'),
    }
    for title, rival in rivals.items():
        at_5, at_2 = (middle(*rival, density) for density in (0.05, 0.02))
        assert f'{title} {at_5:.1f} and {at_2:.1f} %' in own
        if 'surgery' not in title:
            assert at_5 - middle(name, 'soft surgery', 0.05) > 1
            assert at_2 - middle(name, 'soft surgery', 0.02) > 9


def test_the_page_of_comparisons_holds_the_other_tables():
    said = (ROOT / 'results' / 'compare.md').read_text()
    authors = sweep_tables.frontier_tables(results.read_frontiers(kind='authors'))
    assert tables.to_text(authors) in said
    assert (ROOT / 'results' / 'xor' / 'xor.md').read_text() in said


@pytest.mark.parametrize(
    ('name', 'module'),
    [
        ('low_rank_lenet300', low_rank),
        ('low_rank_lenet5', low_rank),
        ('mixed_lenet5', mixed),
        ('diversity_mnist', diversity),
        ('one_bit_mnist', one_bit),
        ('sizes_lenet300', sizes),
        ('sizes_lenet5', sizes),
    ],
)
def test_the_page_of_baselines_holds_the_other_tables(name, module):
    said = (ROOT / 'results' / 'baselines.md').read_text()
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    assert module.to_table(rows) in said
    command = module.__name__.split('.')[1]
    flagfile = FLAGFILES / f'{name}.flags'
    assert f'python -m experiments.{command} --flagfile=experiments/flagfiles/{name}.flags' in said
    (seeds,) = re.findall(r'^--seeds=(\d+)', flagfile.read_text(), re.MULTILINE)
    assert {row['seed'] for row in rows} == set(range(int(seeds)))


@pytest.mark.parametrize('path', TIMINGS, ids=lambda path: path.stem)
def test_the_page_of_run_times_holds_the_tables(path):
    said = (ROOT / 'results' / 'runtime.md').read_text()
    assert latency_report.latency_tables(json.loads(path.read_text())) in said


@pytest.mark.parametrize(
    ('network', 'title'), [('lenet300', 'LeNet-300-100'), ('lenet5', 'LeNet-5')]
)
def test_the_curve_by_units_is_that_of_the_results(network, title):
    said = (ROOT / 'results' / 'runtime.md').read_text()
    rows = results.read_comparison(ROOT / 'results' / f'units_{network}.csv')
    for units in dict.fromkeys(row['variant'] for row in rows):
        own = [row for row in rows if row['variant'] == units]
        timing = read(f'runtime/units/{network}_{units}.json')
        products = sum(layer['multiply_adds'] for layer in timing['layers'].values())
        error = tables.middle_and_range(own, 'test_error', '.2f', ' %')
        cells = [title, units, f'{products:,}', error]
        for batch in ('1', '64'):
            times = {
                way: each['median_us'] for way, each in timing['batches'][batch]['ways'].items()
            }
            trained = times['dense JAX, as trained']
            fastest = min(time for way, time in times.items() if way.startswith('dense JAX'))
            compact = min(times['JAX, compact'], times['JAX, compact, batch last'])
            cells += [f'{trained:,.1f}', f'{fastest:,.1f}', f'{compact:,.1f}']
            cells += [f'{trained / compact:.2f}×', f'{fastest / compact:.2f}×']
        assert f'| {" | ".join(cells)} |' in said


@pytest.mark.parametrize(('name', 'title'), [('lenet300', 'LeNet-300-100'), ('lenet5', 'LeNet-5')])
def test_files_and_speed_are_those_of_the_results(name, title):
    said = page('docs/results.md')
    size = (ROOT / 'zoo' / f'{name}.dns').stat().st_size
    best = []
    for batch, of_batch in read(f'runtime/{name}.json')['batches'].items():
        ratios = {way: each['ratio'] for way, each in of_batch['ways'].items() if 'compact' in way}
        onnx = ratios.pop('ONNX Runtime, compact')
        alone = max(ratio for way, ratio in ratios.items() if way.startswith('JAX, '))
        assert f'| {title} | {batch} | {alone:.2f}× | {onnx:.2f}× |' in said
        best.append(f'{max(ratios.values()):.2f}× as fast')
    assert re.search(
        rf'\| {title} \| 2,\d+ \| {size:,} bytes \|[^\n]*?\| {" . ".join(best)} \|', said
    )


def test_results_come_from_their_flagfiles():
    for path in sorted((ROOT / 'results').glob('*-[0-9]*.json')):
        summary = json.loads(path.read_text())
        name, seed = path.stem.rsplit('-', 1)
        assert summary['seed'] == int(seed)
        for line in (FLAGFILES / f'{name}.flags').read_text().splitlines():
            if line.startswith('--'):
                flag, _, value = line[2:].partition('=')
                if flag not in summary['flags'] and flag in (*NEWER, 'flagfile'):
                    continue
                if not value:  # a switch
                    assert summary['flags'][flag.removeprefix('no')] == (flag[:2] != 'no'), line
                    continue
                used = summary['flags'][flag]
                assert used == type(used)(value), line


def test_the_cost_of_a_step_is_that_of_the_bench():
    bench, said = read('bench.json'), page('docs/performance.md')
    for name in ('lenet300', 'lenet5'):
        row, peer = bench[name], bench['peer'][name]['surgery_ms']
        assert (
            f'| {row["dense_ms"]:.3f} ms | {row["surgery_ms"]:.3f} ms | {row["ratio"]:.3f} | '
            f'{row["steps_per_s"]:.0f} | {row["dense_mib"]:.1f} → {row["surgery_mib"]:.1f} MiB | '
            f'{peer:.3f} ms | {peer / row["surgery_ms"]:.2f}× as fast |'
        ) in said
    for loop, title in (('called', 'a jitted step, called from Python'), ('scanned', 'a scan')):
        for name, optimizer in (('sgd', 'SGD'), ('adam', 'Adam')):
            row = bench['loops'][loop][name]
            kinds = 'moving', 'units', 'blocks', 'two_of_four', 'packed', 'after'
            ratios = ' | '.join(f'{row[kind]:.2f}' for kind in kinds)
            assert f'| {title} | {optimizer} | {ratios} |' in said
    small, large = bench['lenet300'], bench['large']
    share = 100 * small['refresh_ms'] / small['surgery_ms'] / 100
    assert f'another {small["refresh_ms"]:.2f} ms at each refresh: {share:.1f} % of' in said
    assert (
        f'{large["weights"] / 1e6:.0f} million weights. There the search takes '
        f'{large["refresh_ms"] / 1e3:.2f} s, and a sort takes {large["sort_ms"] / 1e3:.1f} s'
    ) in said


def median(name, variant, column='test_error', target=None):
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    return statistics.median(
        row[column] for row in rows if row['variant'] == variant and target in (None, row['target'])
    )


def test_the_answers_to_questions_are_those_of_the_results():
    said = page('docs/questions.md')
    surgery = median('compare_lenet300', 'surgery', target=50)
    without = median('compare_lenet300', 'without splicing', target=50)
    assert f'{surgery:.2f} % with it and {without:.2f} % without' in said
    surgery = median('compare_lenet300', 'surgery', target=100)
    without = median('compare_lenet300', 'without splicing', target=100)
    assert f'{surgery:.2f} % with it and {without:.2f} % without' in said
    gradual = median('compare_lenet300', 'gradual', target=100)
    assert f'{surgery:.2f} %, and gradual pruning {gradual:.2f} %' in said
    fixed, error = (median('ablations_lenet300', 'c, σ constant', name) for name in BOTH)
    assert f'{fixed:.0f}× at {error:.2f} %' in said
    never, error = (median('ablations_lenet300', 'c, without splicing', name) for name in BOTH)
    assert f'{never:.0f}× at {error:.0f} %' in said
    rows = [row for row in results.read_frontiers() if row['network'] == 'lenet300']
    for target in (60, 90, 120):
        error = statistics.median(row['test_error'] for row in rows if row['target'] == target)
        assert f'{target}× at {error:.2f} %' in said
    kept, back = (
        median('repair_lenet300', 'surgery', name) for name in ('kept', 'returns_returned_kept')
    )
    assert f'{100 * back / kept:.0f} % had been pruned' in said
