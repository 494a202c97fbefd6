"""The report page as a browser shows it: wide and narrow, light and dark, by keyboard alone."""

import json
import re

import pytest

from tests.browser import CHROMIUM, Browser
from tests.report_runs import write_run
from vatt_jax.reporting import charts, report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium, which is not installed')

EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)> "a" \'b\' </style></svg>'


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp('browser'))
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The page of a run with 16 classes."""
    return report.build(write_run(tmp_path_factory.mktemp('run') / 'run', queries=3))


@pytest.fixture(scope='module')
def large_page(tmp_path_factory):
    """The page of a run with 400 classes and 250 clips."""
    folder = tmp_path_factory.mktemp('large') / 'run'
    return report.build(write_run(folder, classes=400, queries=20, frames=3, clips=400))


def open_quietly(browser, page, width=1280):
    """Opens a page and checks that it complains of nothing and asks for nothing else."""
    browser.messages.clear()
    browser.requests.clear()
    browser.open(page, width)
    assert_quiet(browser, page)


def assert_quiet(browser, page):
    assert browser.messages == []
    assert set(browser.requests) == {page.resolve().as_uri()}


@pytest.mark.parametrize('name', ['page', 'large_page'])
@pytest.mark.parametrize('width', [1280, 400])
def test_no_errors_no_requests_and_nothing_beyond_the_screen(browser, request, name, width):
    page = request.getfixturevalue(name)
    open_quietly(browser, page, width)
    # Unfolded, as a reader may have it.
    browser.run('document.querySelectorAll("details").forEach((part) => { part.open = true; })')
    content, screen = browser.run(
        '[document.documentElement.scrollWidth, document.documentElement.clientWidth]'
    )
    assert content <= screen
    assert_quiet(browser, page)


def test_many_clips_and_classes_stay_within_the_limit(large_page):
    assert large_page.stat().st_size <= report.MOST_BYTES
    assert num_films(large_page) > 250


@pytest.mark.parametrize('limit', [700_000, 3_000_000])
def test_a_lower_limit_is_kept_too(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(report, 'MOST_BYTES', limit)
    page = report.build(write_run(tmp_path / 'run', queries=4, clips=40))
    assert 0.5 * limit < page.stat().st_size <= limit
    assert page.read_text().count('<image id="still-') >= 80
    # With room for a few kilobytes each, clips play.
    assert (num_films(page) > 80) == (limit > 10**6)


def num_films(page):
    return len(json.loads(re.search(r'id="films">(.*?)</script>', page.read_text())[1]))


def test_dark_where_the_system_is_dark(browser, page):
    backgrounds = {}
    for scheme in ('light', 'dark'):
        browser.color_scheme(scheme)
        open_quietly(browser, page)
        color = browser.run('getComputedStyle(document.body).backgroundColor')
        backgrounds[scheme] = sum(map(int, re.findall(r'\d+', color)[:3]))
    assert backgrounds['light'] > 700
    assert backgrounds['dark'] < 150


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out_from_its_background(browser, page, scheme):
    """WCAG's contrast of normal text, 4.5, by its formula."""
    browser.color_scheme(scheme)
    open_quietly(browser, page)
    pairs = browser.run(
        """[...document.querySelectorAll('h1, p, .hint, a, .verdict, .warning, td, mark')]
        .filter((element) => element.offsetParent && !element.closest('.confusion'))
        .map((element) => {
          const color = (node, name) => getComputedStyle(node)[name].match(/[\\d.]+/g).map(Number);
          let behind = element;
          const isClear = (node) => color(node, 'backgroundColor')[3] === 0;
          while (behind !== document.body && isClear(behind)) behind = behind.parentElement;
          return [color(element, 'color'), color(behind, 'backgroundColor')];
        })"""
    )
    assert len(pairs) > 50
    for text, background in pairs:
        first, second = luminance(text), luminance(background)
        contrast = (max(first, second) + 0.05) / (min(first, second) + 0.05)
        assert contrast >= 4.5, (text, background)


def luminance(color):
    """Relative luminance of sRGB values from 0 to 255."""
    linear = []
    for value in color[:3]:
        share = value / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def cells(browser, column):
    """Texts of a column of the table of results, from the top."""
    return browser.run(
        f'[...document.querySelector(".results").tBodies[0].rows]'
        f'.map((row) => row.cells[{column}].textContent)'
    )


def heading(column):
    return f'document.querySelector(".results").tHead.rows[0].cells[{column}]'


def test_a_heading_sorts_its_table(browser, page):
    open_quietly(browser, page)
    before = cells(browser, 1)
    browser.run(f'{heading(1)}.querySelector("button").click()')
    assert browser.run(f'{heading(1)}.getAttribute("aria-sort")') == 'descending'
    values = [float(cell.split()[0]) for cell in cells(browser, 1)]
    assert values == sorted(values, reverse=True)
    assert sorted(cells(browser, 1)) == sorted(before)
    browser.run(f'{heading(1)}.querySelector("button").click()')
    assert browser.run(f'{heading(1)}.getAttribute("aria-sort")') == 'ascending'
    values = [float(cell.split()[0]) for cell in cells(browser, 1)]
    assert values == sorted(values)
    # Rows without a value come last in either order.
    for _ in range(2):
        browser.run(f'{heading(3)}.querySelector("button").click()')
        column = cells(browser, 3)
        assert column[-1] == '–'
        assert column[0] != '–'
    assert browser.run(f'{heading(1)}.getAttribute("aria-sort")') == 'none'
    browser.run(f'{heading(0)}.querySelector("button").click()')
    names = cells(browser, 0)
    assert names[0].startswith('clusters')
    assert_quiet(browser, page)


def test_the_keyboard_alone_sorts_reads_and_plays(browser, page):
    open_quietly(browser, page)
    browser.press('Tab', 9)
    assert browser.run('document.activeElement.textContent') == 'Skip to the results'
    # Everything that acts can be reached by the tab key, and shows that it is there.
    for selector in ('.results thead button', '[data-chart]', '[data-clip]', '[data-row]'):
        browser.run(f'document.querySelector({selector!r}).focus()')
        assert browser.run(f'document.activeElement.matches({selector!r})')
        assert browser.run('document.activeElement.tabIndex') == 0

    browser.run('document.querySelector(".results thead button").focus()')
    browser.press('Enter', 13, '\r')
    assert browser.run(f'{heading(0)}.getAttribute("aria-sort")') == 'ascending'

    browser.run('document.querySelector("[data-chart]").focus()')
    browser.press('Home', 36)
    output = 'document.querySelector("[data-chart]").nextElementSibling.textContent'
    first = browser.run(output)
    assert first.startswith('step 1: loss 5')
    browser.press('ArrowRight', 39)
    assert browser.run(output) != first
    browser.press('End', 35)
    assert browser.run(output).startswith('step 1000: loss 1')
    chart = 'document.querySelector("[data-chart]")'
    assert browser.run(f'{chart}.getAttribute("aria-valuetext")') == browser.run(output)

    browser.run('document.querySelector("[data-clip]").focus()')
    browser.press('Enter', 13, '\r')
    assert browser.run('document.activeElement.getAttribute("aria-pressed")') == 'true'
    browser.wait_for('document.querySelector("[data-clip] video").currentTime > 0')
    browser.press('Escape', 27)
    assert browser.run('document.querySelectorAll("video").length') == 0
    assert_quiet(browser, page)


def test_the_pointer_reads_a_curve(browser, page):
    open_quietly(browser, page)
    middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    browser.move_to('[data-chart]', middle / charts.WIDTH, 0.5)
    text = browser.run('document.querySelector("[data-chart]").nextElementSibling.textContent')
    step = int(re.match(r'step (\d+): loss [\d.]+, va [\d.]+$', text)[1])
    assert abs(step - 500) <= 5
    assert_quiet(browser, page)


def test_clips_play_in_a_loop_one_after_the_other(browser, page):
    open_quietly(browser, page)
    buttons = 'document.querySelectorAll("[data-clip]")'
    browser.run(f'{buttons}[0].click()')
    browser.wait_for(f'{buttons}[0].querySelector("video").currentTime > 0')
    video = f'{buttons}[0].querySelector("video")'
    assert browser.run(f'[{video}.loop, {video}.muted]') == [True, False]
    assert browser.run(f'{video}.duration') == pytest.approx(2, abs=0.3)
    # Sound is in it, too.
    browser.wait_for(f'{video}.webkitAudioDecodedByteCount > 0')
    browser.run(f'{buttons}[1].click()')
    assert browser.run('document.querySelectorAll("video").length') == 1
    browser.run(f'{buttons}[1].click()')
    assert browser.run('document.querySelectorAll("video").length') == 0

    browser.run('document.querySelector("[data-row]").click()')
    shown = browser.run('document.querySelector(".query").querySelectorAll("[data-clip]").length')
    assert browser.run('document.querySelectorAll("video").length') == shown
    assert browser.run('[...document.querySelectorAll("video")].every((video) => video.muted)')
    browser.run('document.querySelector("[data-row]").click()')
    assert browser.run('document.querySelectorAll("video").length') == 0

    browser.run('document.querySelector("[data-sound]").click()')
    pressed = 'document.querySelector("[data-sound]").getAttribute("aria-pressed")'
    assert browser.run(pressed) == 'true'
    browser.run('document.querySelector("[data-sound]").click()')
    assert browser.run(pressed) == 'false'
    assert_quiet(browser, page)


def test_four_hundred_classes_can_be_found_and_read(browser, large_page):
    open_quietly(browser, large_page)
    rows = '[...document.querySelectorAll("#confusions ~ .pair tbody")[0].rows]'
    assert browser.run(f'{rows}.length') == 400
    browser.run(
        """(() => {
          const field = document.querySelector('#confusions ~ .pair [data-filter]');
          field.value = 'bounces 399';
          field.dispatchEvent(new Event('input'));
        })()"""
    )
    # The class, and one that is taken for it.
    shown = browser.run(f'{rows}.filter((row) => !row.hidden).map((row) => row.textContent)')
    assert 1 <= len(shown) <= 5
    assert all('bounces 399' in row for row in shown)
    browser.move_to('[data-matrix]', 10.5 / 400, 10.5 / 400)
    text = browser.run('document.querySelector("[data-matrix]").nextElementSibling.textContent')
    assert re.fullmatch(r'a red ring bounces 10 recognised: \d+ clips', text)
    clusters = browser.run('document.querySelectorAll("#clusters ~ .tall tbody tr").length')
    assert clusters == 400
    assert_quiet(browser, large_page)


def test_hostile_words_stay_text(browser, tmp_path):
    page = report.build(write_run(tmp_path / 'run', queries=2, words=EVIL))
    open_quietly(browser, page)
    assert browser.run('document.querySelector("h1").textContent') == EVIL
    assert browser.run('document.querySelectorAll("script").length') == 2
    assert browser.run('document.querySelectorAll("img[onerror]").length') == 0
    label = browser.run('document.querySelector("[data-clip]").getAttribute("aria-label")')
    assert label.startswith(f'Play: {EVIL}')
    # Scripts run to their end, so the data in the page were read as data.
    browser.run('document.querySelector("[data-clip]").click()')
    browser.wait_for('document.querySelector("[data-clip] video").currentTime > 0')
    assert_quiet(browser, page)


def test_a_script_that_slipped_in_would_not_run(browser, page, tmp_path):
    """The second lock: the page's policy."""
    changed = tmp_path / 'page.html'
    text = page.read_text().replace('<main>', '<main><script>window.ran = 1;</script>')
    changed.write_text(text)
    browser.open(changed)
    assert browser.run('window.ran') is None
    assert any('Content Security Policy' in message for message in browser.messages)


def test_every_picture_and_control_has_a_name(browser, page):
    open_quietly(browser, page)
    nameless = browser.run(
        """[...document.querySelectorAll('button, input, img, svg:not([aria-hidden]), [tabindex]')]
        .filter((element) => !(element.getAttribute('aria-label') || element.alt ||
          element.textContent.trim() || element.closest('label')))
        .map((element) => element.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    scopes = browser.run('[...document.querySelectorAll("th")].every((cell) => cell.scope)')
    assert scopes
