"""Pages: what is in them, and how a browser shows them."""

import base64
import re
import shutil

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright
from told_runs import RECORDS, SUMMARY, write_records

from experiments import results
from experiments.reports import plots, sweep_tables
from experiments.reports import run_report as report
from experiments.reports.pages import Bar, Section, render
from experiments.reports.tables import Table
from experiments.sweeps import sweep_report

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
# Nothing but the page: no updates, no sandbox, which root may not have.
OPTIONS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync']


def make_figure():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], color=plots.BLUE, label='a <b>')
    axes.set(title='Rising', xlabel='steps', ylabel='error')
    figure.legend()
    return figure


@pytest.fixture(scope='module')
def page():
    wide = Table('Much', [f'column {at}' for at in range(20)], [['row', *'x' * 19]])
    sections = [
        Section('One <b>', 'A & B', [Bar('Bytes', '10', '1', 0.1)], [wide], [make_figure()]),
        Section('Two', lines=['--flag=<1>', 'x' * 300]),
        Section('Three', lines=['--folded=1', '--folded=2'], is_folded=True),
    ]
    return render('Title', 'lead', [('3×', 'compression')], sections)


@pytest.fixture(scope='module')
def real_page():
    rows = [row for row in results.read_frontiers() if row['network'] == 'lenet5']
    tables, figure = sweep_tables.frontier_tables(rows), plots.frontier_figure(rows)
    return sweep_report.page('Frontier', rows, tables, figure, {'seeds': 5}, {'runs/9-1': 'nan'})


@pytest.fixture(scope='module')
def comparison():
    rows = [
        {**row, 'network': 'lenet300', 'dataset': 'mnist'}
        for row in results.read_comparison(results.FOLDER / 'repair_lenet300.csv')
    ]
    tables, figure = sweep_tables.compare_tables(rows), plots.compare_figure(rows)
    return sweep_report.page('Comparison', rows, tables, figure, {'variant': ('a:', 'b:')}, {})


@pytest.fixture(scope='module')
def run_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    write_records(folder, RECORDS)
    return report.write(folder, SUMMARY, np.ones((784, 20), bool))[1].read_text()


def test_a_page_needs_nothing_else(page):
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {'data:'}
    assert '<script' not in page
    assert 'url(' not in page


def test_texts_are_texts(page):
    assert '<h2>One &lt;b&gt;</h2>' in page
    assert '--flag=&lt;1&gt;' in page
    assert 'A &amp; B' in page


def test_a_cell_breaks_only_around_a_range():
    cells = ['name', '1.00 % (0.91 to 1.12)', '3 MiB']
    page = render('T', '', [], [Section('One', tables=[Table('Some', ['', 'a', 'b'], [cells])])])
    assert '<td>1.00\xa0% (0.91\xa0to 1.12)</td><td>3\xa0MiB</td>' in page


def test_many_lines_are_folded(page, run_page):
    assert re.search(r'<details>\s*<summary>2 lines</summary>\s*<pre[^>]*>--folded=1\n', page)
    assert page.count('<details>') == 1
    assert run_page.count('<details>') == 0  # it has no flags


def test_a_run_says_what_its_words_mean(run_page):
    assert 'spliced when it is put back' in run_page
    assert 'with its place in the layer' in run_page


def test_pictures_say_what_they_show_and_follow_the_theme(page):
    pattern = r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"'
    source, words = re.search(pattern, page).groups()
    assert words == 'Rising; error, steps; a &lt;b&gt;'
    svg = base64.b64decode(source).decode()
    assert f'stroke: light-dark({plots.BLUE}, {plots.DARK[plots.BLUE]})' in svg
    assert '>Rising</text>' in svg  # text, and no outlines of letters


def test_equal_pages_are_equal_files():
    first, second = (render('T', '', [], [Section('One', figures=[make_figure()])]) for _ in '12')
    assert first == second


def test_a_sweep_is_told_beside_what_others_published(real_page):
    assert '<th scope="row">Sparse VD 2017</th><td>280×</td><td>0.75\xa0%</td>' in real_page
    assert '<td>no\xa0drop</td>' in real_page
    assert 'Frontier: LeNet-5 on mnist' in real_page
    assert 'runs/9-1: nan' in real_page


@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium to look at pages with')
def test_a_browser_shows_them(page, real_page, comparison, run_page, tmp_path):
    paths = [tmp_path / f'{number}.html' for number in range(4)]
    for path, text in zip(paths, (page, real_page, comparison, run_page), strict=True):
        path.write_text(text)
    backgrounds = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        for scheme, width in (('light', 1280), ('dark', 390)):
            context = browser.new_context(
                color_scheme=scheme, viewport={'width': width, 'height': 800}, offline=True
            )
            for path in paths:
                shown, complaints = context.new_page(), []
                shown.on('console', lambda message, to=complaints: to.append(message.text))
                shown.on('pageerror', lambda error, to=complaints: to.append(str(error)))
                shown.on('requestfailed', lambda request, to=complaints: to.append(request.url))
                shown.goto(path.as_uri())
                assert complaints == []
                assert shown.evaluate('[...document.images].every(i => i.naturalWidth > 0)')
                # Nothing but tables and lines is wider than the window.
                assert shown.evaluate('document.documentElement.scrollWidth') <= width
                shown.keyboard.press('Tab')
                assert shown.evaluate('document.activeElement.className') == 'scroll'
                if width == 1280 and path != paths[0]:  # whose table is wider than any window
                    tables = '[...document.querySelectorAll("div.scroll")]'
                    assert shown.evaluate(f'{tables}.every(t => t.scrollWidth <= t.clientWidth)')
                assert Axe().run(shown).response['violations'] == []
                backgrounds.add(shown.evaluate('getComputedStyle(document.body).backgroundColor'))
        browser.close()
    assert len(backgrounds) == 2
