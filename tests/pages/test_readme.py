"""The README: its example runs, and its numbers are those of the committed results."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from absl import flags as absl_flags

import dns_jax
from experiments import alexnet, results
from experiments.config.command_line import define, to_config
from experiments.measurements import latency_report, scale_report
from experiments.reports import run_report as report
from experiments.reports import sweep_tables, tables
from experiments.training.image_flags import ImageConfig

ROOT = Path(__file__).parents[2]
# Flags younger than the results, set to what these runs did without them.
NEWER = {'finetuning_steps'}
README = (ROOT / 'README.md').read_text()


def test_the_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    loop, long_form, zoo, run = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    # A reader's own code adds biases as JAX allows by default.
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        names = {}
        exec(compile(loop, 'README.md', 'exec'), names)
        exec(compile(long_form, 'README.md', 'exec'), names)
        masks, small = dns_jax.get_masks(names['state']), names['small']
        exec(compile(zoo, 'README.md', 'exec'), names)
        exec(compile(run, 'README.md', 'exec'), names)
    assert dns_jax.measure_sizes(small, masks).total.compression == 4.0
    assert jnp.count_nonzero(small['fc']['kernel']) == 5  # and four biases
    assert names['loss'] < 1e-6  # four connections are all that the network needs
    assert names['pruner'].init(small).masks['fc']['kernel'].shape == (8, 4)
    assert names['logits'].shape == (1, 10)


def test_the_short_form_is_short():
    """At most 15 lines, and no idea that the paper does not have."""
    loop, *_ = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert len(loop.splitlines()) <= 15
    for word in ('Rule', 'density', 'refresh', 'update_probability', 'rule', 'optax.tree'):
        assert word not in loop


COMPARISONS = [
    path.stem
    for kind in ('compare', 'ablations', 'repair')
    for path in sorted((ROOT / 'experiments' / 'flagfiles').glob(f'{kind}_*.flags'))
    if path.stem != 'compare_digits'
]


TIMINGS = sorted((ROOT / 'results' / 'runtime').glob('*.json'))


def test_the_commands_are_those_of_the_makefile():
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'\bmake (\w+)', README):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


def test_the_table_is_that_of_the_results():
    assert results.table(results.read_summaries()) in README


@pytest.mark.parametrize('name', ['alexnet_mnist', 'alexnet_mnist_wide'])
def test_alexnet_on_mnist_is_that_of_the_results(name):
    summary = json.loads((ROOT / 'results' / f'{name}.json').read_text())
    assert name != 'alexnet_mnist' or tables.to_text(report.published_tables(summary)) in README
    text = ' '.join(README.split())
    errors = f'{summary["reference_error"]:.2f} → {summary["test_error"]:.2f} % test error'
    assert f'{errors} at {summary["compression"]:.1f}×' in text


def test_the_page_of_scale_is_that_of_the_results():
    result = json.loads((ROOT / 'results' / 'scale.json').read_text())
    page = (ROOT / 'results' / 'scale.md').read_text()
    assert scale_report.page(result, 'scale') == page
    text = ' '.join(README.split())
    assert f'{result["step"]["ratio"]:.2f}× the time of a dense step' in text


def test_the_page_of_many_devices_starts_runs():
    """Its commands are parsed as the entry script does, its manifests as YAML."""
    page = (ROOT / 'docs' / 'many_devices.md').read_text()
    commands = re.findall(r'python -m experiments\.alexnet((?:\s|\\|--\S+)*)', page)
    assert len(commands) == 2
    for command in commands:
        flag_values = absl_flags.FlagValues()
        define(ImageConfig, alexnet.DEFAULTS, flag_values)
        given = command.replace('\\', ' ').replace('$JOB_COMPLETION_INDEX', '1').split()
        left = flag_values(['program', *given])
        config = to_config(ImageConfig, alexnet.DEFAULTS, flag_values, left)
        assert config.distributed
    (manifests,) = re.findall(r'```yaml\n(.*?)```', page, re.DOTALL)
    service, job = yaml.safe_load_all(manifests)
    assert job['spec']['template']['spec']['subdomain'] == service['metadata']['name']


def test_the_frontier_is_that_of_the_results():
    rows = results.read_frontiers()
    assert rows
    assert tables.to_text(sweep_tables.frontier_tables(rows)) in README


@pytest.mark.parametrize('name', COMPARISONS)
def test_the_page_of_comparisons_holds_their_tables_and_commands(name):
    page = (ROOT / 'results' / 'compare.md').read_text()
    rows = results.read_comparison(ROOT / 'results' / f'{name}.csv')
    assert tables.to_text(sweep_tables.compare_tables(rows)) in page
    assert f'python -m experiments.compare --flagfile=experiments/flagfiles/{name}.flags' in page
    # The variants of the table are those of the flagfile, and all its seeds are there.
    flags = (ROOT / 'experiments' / 'flagfiles' / f'{name}.flags').read_text()
    named = re.findall(r'^--variant=([^:]*):', flags, re.MULTILINE)
    assert list(dict.fromkeys(row['variant'] for row in rows)) == named
    (seeds,) = re.findall(r'^--seeds=(\d+)', flags, re.MULTILINE)
    assert {row['seed'] for row in rows} == set(range(int(seeds)))


def test_the_page_of_comparisons_holds_the_other_tables():
    page = (ROOT / 'results' / 'compare.md').read_text()
    assert (
        tables.to_text(sweep_tables.frontier_tables(results.read_frontiers(kind='authors'))) in page
    )
    assert (ROOT / 'results' / 'xor' / 'xor.md').read_text() in page


@pytest.mark.parametrize('path', TIMINGS, ids=lambda path: path.stem)
def test_the_page_of_run_times_holds_the_tables(path):
    page = (ROOT / 'results' / 'runtime.md').read_text()
    assert latency_report.latency_tables(json.loads(path.read_text())) in page


@pytest.mark.parametrize(('name', 'title'), [('lenet300', 'LeNet-300-100'), ('lenet5', 'LeNet-5')])
def test_the_summary_of_pruned_networks_is_of_the_results(name, title):
    row = next(line for line in README.splitlines() if line.startswith(f'| {title} | 2,'))
    batches = json.loads((ROOT / 'results' / 'runtime' / f'{name}.json').read_text())['batches']
    for batch, text in (('1', 'one image'), ('64', '64 images')):
        ways = batches[batch]['ways']
        ours = {way: each['ratio'] for way, each in ways.items() if 'compact' in way}
        del ours['ONNX Runtime, compact']
        assert f'| {max(ours.values()):.2f}× as fast |' in row, text
        alone = max(ratio for way, ratio in ours.items() if way.startswith('JAX, '))
        assert f'{alone:.2f}×' in README
        assert f'{ways["ONNX Runtime, compact"]["ratio"]:.2f}×' in README
    size = (ROOT / 'zoo' / f'{name}.dns').stat().st_size
    assert f'| {size:,} bytes |' in row


def test_results_come_from_their_flagfiles():
    for path in sorted((ROOT / 'results').glob('*-[0-9]*.json')):
        summary = json.loads(path.read_text())
        name, seed = path.stem.rsplit('-', 1)
        assert summary['seed'] == int(seed)
        flagfile = ROOT / 'experiments' / 'flagfiles' / f'{name}.flags'
        for line in flagfile.read_text().splitlines():
            if line.startswith('--'):
                flag, _, value = line[2:].partition('=')
                if flag not in summary['flags'] and flag in NEWER:
                    continue
                used = summary['flags'][flag]
                # A flag without a value is a switch that is on.
                assert used == (type(used)(value) if value else True), line


def test_table_row_gives_median_and_range():
    summaries = [
        {'network': 'lenet5', 'reference_error': 1.0, 'test_error': error, 'kept': kept}
        | {'compression': 431080 / kept}
        for error, kept in ((0.9, 4000), (1.1, 5000), (0.95, 4310))
    ]
    assert results.table_row('label', summaries) == (
        '| label | 3 | 1.00 % | 0.95 % (0.90 to 1.10) | 4,310 (4,000 to 5,000) | '
        '100.0× (86.2 to 107.8) |'
    )


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match='must hold files named'):
        results.read_summaries(tmp_path)


def test_the_bench_rows_are_those_of_the_results():
    bench = json.loads((ROOT / 'results' / 'bench.json').read_text())
    for name in ('lenet300', 'lenet5'):
        row, peer = bench[name], bench['peer'][name]['surgery_ms']
        assert (
            f'| {row["dense_ms"]:.3f} ms | {row["surgery_ms"]:.3f} ms | {row["ratio"]:.3f} | '
            f'{row["steps_per_s"]:.0f} | {row["dense_mib"]:.1f} → {row["surgery_mib"]:.1f} MiB | '
            f'{peer:.3f} ms | {peer / row["surgery_ms"]:.2f}× as fast |'
        ) in README
    for loop, said in (('called', 'a jitted step, called from Python'), ('scanned', 'a scan')):
        for name, optimizer in (('sgd', 'SGD'), ('adam', 'Adam')):
            row = bench['loops'][loop][name]
            assert f'| {said} | {optimizer} | {row["moving"]:.2f} | {row["after"]:.2f} |' in README
    small, large = bench['lenet300'], bench['large']
    share = small['refresh_ms'] / small['surgery_ms'] / 100
    assert (
        f'another {small["refresh_ms"]:.2f} ms at each refresh: {share:.1%} of'.replace('%', ' %')
        in README
    )
    assert (
        f'{large["weights"] / 1e6:.0f} million weights, they take '
        f'{large["refresh_ms"] / 1e3:.2f} s, where a sort takes {large["sort_ms"] / 1e3:.1f} s'
    ) in README


def test_the_layout_names_every_folder():
    layout = README.partition('## Layout')[2]
    for folder in ('dns_jax', 'experiments', 'docs', 'notebooks', 'zoo'):
        assert f'\n{folder}/' in layout
