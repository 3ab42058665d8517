"""The numbers of the pages are those of the committed results."""

import json
import re
import statistics

import pytest
from committed import ROOT, median, page, read

from experiments import diversity, low_rank, mixed, one_bit, results, sizes
from experiments.measurements import latency_report, scale_report
from experiments.reports import run_report, sweep_tables, tables

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
    fixed, error = (median('ablations_lenet300', 'c, σ constant', column=name) for name in BOTH)
    assert f'{fixed:.0f}× at {error:.2f} %' in said
    never, error = (
        median('ablations_lenet300', 'c, without splicing', column=name) for name in BOTH
    )
    assert f'{never:.0f}× at {error:.0f} %' in said
    rows = [row for row in results.read_frontiers() if row['network'] == 'lenet300']
    for target in (60, 90, 120):
        error = statistics.median(row['test_error'] for row in rows if row['target'] == target)
        assert f'{target}× at {error:.2f} %' in said
    kept, back = (
        median('repair_lenet300', 'surgery', column=name)
        for name in ('kept', 'returns_returned_kept')
    )
    assert f'{100 * back / kept:.0f} % had been pruned' in said
