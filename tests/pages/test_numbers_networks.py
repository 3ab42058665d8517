"""The numbers that pages have of networks of today are those of the committed results."""

import statistics

import pytest
from committed import ROOT, median, page, read

from experiments import results

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


@pytest.mark.parametrize('title', NETWORKS)
def test_the_readme_has_a_row_for_each_network(title):
    name, surgery, kept, target, form = NETWORKS[title]
    before = median(name, 'surgery', target, 'reference_error')
    after = (median(name, variant, target) for variant in (surgery, 'gradual'))
    cells = [title, kept, *(form.format(number) for number in (before, *after))]
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert cells in [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def leads(name, *others):
    """By how much soft surgery is better than others at the three densities."""
    pairs = zip(others, DENSITIES, strict=True)
    return [
        median(name, *other) - median(name, 'soft surgery', density) for other, density in pairs
    ]


def test_pages_say_what_became_of_the_gpt():
    own, name = page('results/networks.md'), 'networks_gpt'
    text = 'by {:.2f} bits per character at 10 %, by {:.2f} at 5 % and by {:.2f} at 2 %'
    assert text.format(*leads(name, *(('gradual', density) for density in DENSITIES))) in own
    alike = [median(name, variant, 0.2) for variant in ('surgery', 'soft surgery', 'gradual')]
    text = 'At 20 % surgery has {0:.2f} bits, and soft surgery and gradual pruning have {1:.2f}.'
    assert text.format(*alike) in own
    assert f'{alike[1]:.2f}' == f'{alike[2]:.2f}'
    narrow = leads(name, *((f'dense, width {width}', '') for width in (36, 30, 26)))
    assert 'leads it by {:.2f}, {:.2f} and {:.2f} bits'.format(*narrow) in own
    above = median(name, 'soft surgery', 0.1) - median(name, 'dense as long', '')
    assert f'{above:.2f} bits more than the dense one' in own
    rivals = {
        'RigL has': ('networks_gpt_scratch', 'RigL'),
        'AC/DC has': ('networks_gpt_rivals', 'AC/DC'),
        'Straight-through masks have': ('networks_gpt_rivals', 'straight-through'),
        'Without splicing surgery has': ('networks_gpt_rivals', 'without splicing'),
    }
    for title, rival in rivals.items():
        errors = [median(*rival, density) for density in (0.05, 0.02)]
        assert f'{title} {errors[0]:.2f} and {errors[1]:.2f}' in own
        for density, error in zip((0.05, 0.02), errors, strict=True):
            assert median(name, 'soft surgery', density) < error
    said = page('docs/results.md')
    at_2 = [median(name, variant, 0.02) for variant in ('soft surgery', 'surgery', 'gradual')]
    assert '{:.2f} bits per character by surgery with soft thresholds'.format(*at_2) in said
    assert f'{at_2[1]:.2f} without them, and {at_2[2]:.2f} by gradual pruning' in said


def test_pages_say_what_embeddings_that_take_part_are_worth():
    own, dense = page('results/networks.md'), 'networks_gpt'
    errors = [
        median('networks_gpt_embeddings', 'soft surgery', times) for times in (6.413, 9.17, 12.36)
    ]
    assert 'Soft surgery has {:.2f}, {:.2f} and {:.2f} bits.'.format(*errors) in own
    pairs = list(zip(DENSITIES, (36, 30, 26), errors, strict=True))
    less = [median(dense, 'soft surgery', density) - error for density, _, error in pairs]
    assert 'it has {:.2f}, {:.2f} and {:.2f} more'.format(*less) in own
    lead = [median(dense, f'dense, width {width}', '') - error for _, width, error in pairs]
    assert 'grows to {:.2f}, {:.2f} and {:.2f} bits'.format(*lead) in own
    above = errors[0] - median(dense, 'dense as long', '')
    assert f'{above:.2f} bits more than the dense network that is trained as long' in own
    assert f'it has {errors[-1]:.2f} with as many parameters' in page('docs/results.md')
    assert f'it then has {errors[-1]:.2f} bits with as many' in page('docs/questions.md')
    assert f'a GPT that keeps a twelfth then has [{less[-1]:.2f} bits' in page('docs/rules.md')


def test_the_page_answers_what_changes_are_worth():
    own, name = page('results/networks.md'), 'networks_questions'
    best = median(name, 'soft surgery', 0.05)

    def worth(variant, target=0.05, sign=1):
        return f'{sign * (median(name, variant, target) - best):.2f}'

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
    more = median(name, 'thresholds by mean and std', '', 'kept') / median(
        name, 'soft surgery', 0.05, 'kept'
    )
    more_bits = worth('thresholds by mean and std', '')
    assert f'keep {more:.1f} times as many parameters and have {more_bits} bits more' in own
    for name_of_same in ('logarithmic ramp', 'masks change to the end'):
        assert abs(median(name, name_of_same, 0.05) - best) < 0.01


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
    rigl, set_ = (median('networks_scratch', variant, 0.05) for variant in ('RigL', 'SET'))
    assert f'RigL has {rigl:.2f} bits, and SET has {set_:.2f}' in own


def test_the_page_says_what_patterns_cost_and_gain():
    own, name = page('results/networks.md'), 'networks_patterns'
    variants = ('2 of 4', 'single weights', '4 of 16', 'heads and units')
    two, single, four, heads = (median(name, variant, 0.1) for variant in variants)
    assert f'{two:.2f} bits, where single weights have {single:.2f}. 4 of 16 has {four:.2f}' in own
    assert f'Whole heads and hidden units have {heads:.2f} bits' in own
    batches = read('runtime/units/gpt_heads.json')['batches']
    one, many = (batches[size]['ways']['JAX, shrunken']['ratio'] for size in ('1', '64'))
    assert f'it runs {one:.1f} times as fast for one text, and {many:.1f} times for 64' in own
    channels = median('networks_resnet8_patterns', 'channels', 0.1)
    single = median('networks_resnet8', 'surgery', 0.1)
    narrow = median('networks_resnet8', 'dense, width 0.3125', '')
    said = f'With channels the error is {channels:.1f} %, where single weights have {single:.1f} %'
    assert f'{said}, and a dense network with a third of the channels {narrow:.1f} %' in own


def test_pages_say_what_became_of_the_resnet():
    own, name = page('results/networks.md'), 'networks_resnet8'
    at_10, at_5, at_2 = leads(name, *(('gradual', density) for density in DENSITIES))
    assert f'At 2 % soft surgery leads gradual pruning by {at_2:.1f} points' in own
    assert f'Soft surgery is behind it by {-at_10:.1f} and {-at_5:.1f} points' in own
    hard = [median(name, 'surgery', each) - median(name, 'gradual', each) for each in DENSITIES]
    assert 'without soft thresholds by {:.1f} and {:.1f}'.format(*hard) in own
    above = median(name, 'gradual', 0.1) - median(name, 'dense as long', '')
    assert f'At 10 % the best has {above:.1f} points more than the dense one' in own
    at_20 = [median(name, variant, 0.2) for variant in ('gradual', 'soft surgery', 'surgery')]
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
        at_5, at_2 = (median(*rival, density) for density in (0.05, 0.02))
        assert f'{title} {at_5:.1f} and {at_2:.1f} %' in own
        if 'surgery' not in title:
            assert at_5 - median(name, 'soft surgery', 0.05) > 1
            assert at_2 - median(name, 'soft surgery', 0.02) > 9
