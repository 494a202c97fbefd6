"""The report page of a real tiny run.

It is one well-formed file that loads nothing from elsewhere and executes nothing that a caption
says. test_report_page.py looks at it in a browser.
"""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shlex
import shutil
import sys
import wave

import av
import chex
import jax
import numpy as np
import pytest
from PIL import Image

from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.reporting import charts, clips, confusions, data_uris, headline, report
from vatt_jax.reporting.finished_run import FinishedRun

EVIL = '<script>alert("x")</script> & \'a\' "red" stripe</div>'
VOID = {'meta', 'img', 'br', 'hr', 'link', 'input', 'line', 'polyline', 'use', 'image'}


class Page(html.parser.HTMLParser):
    """A parsed page.

    Attributes:
        tags: names of all tags, in order.
        attributes: (tag, name, value) of all attributes.
        texts: the texts between tags.

    Raises:
        AssertionError: tags do not close in order.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, attribute):
        """Values of an attribute, of any tag."""
        return [value for _, name, value in self.attributes if name == attribute]

    def text(self):
        return ''.join(self.texts)


def read_page(path):
    """(source, parsed page)."""
    text = path.read_text(encoding='utf-8')
    return text, Page(text)


@pytest.fixture
def copied_run(tiny_run, tmp_path):
    """The folder of the tiny run, to be written to."""
    return shutil.copytree(tiny_run[0], tmp_path / 'run')


def read_json(path):
    return json.loads(path.read_text())


def write_json(path, value):
    path.write_text(json.dumps(value))


def update_config(folder, **fields):
    """Changes fields of the config of a run."""
    config = read_json(folder / 'config.json')
    write_json(folder / 'config.json', {**config, **fields})


def results_table(text):
    """The results table of a page: rows of unescaped cells, header first."""
    table = re.search(r'<table class="sortable results".*?</table>', text, re.S)[0]
    rows = []
    for row in re.findall(r'<tr>(.*?)</tr>', table, re.S):
        cells = re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row)
        # Headings are buttons.
        rows.append([html.unescape(re.sub(r'</?button[^>]*>', '', cell)) for cell in cells])
    return rows


def section(text, name):
    """The source of one section of a page, by the id of its heading; '' where it has none."""
    found = re.search(rf'<section aria-labelledby="{name}">.*?</section>', text, re.S)
    return found[0] if found else ''


def percent(share):
    return f'{100 * share:.1f} %'


def test_the_page_stands_alone(tiny_run):
    folder, _, _ = tiny_run
    text, page = read_page(folder / 'report' / 'index.html')
    assert [path.name for path in (folder / 'report').iterdir()] == ['index.html']
    for loading in ('http:', 'https:', '@import', 'url('):
        assert loading not in text
    # The script of the page, and the films as data; the policy lets the browser run no other.
    assert page.tags.count('script') == 2
    script = re.search(r'<script>(.*?)</script>', text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.values('content')[0]
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert 'link' not in page.tags
    sources = page.values('src')
    assert sources
    for source in sources:
        assert source.startswith('data:image/png;base64,')
    # Sections, pictures of the page, and files of the run folder.
    links = page.values('href')
    assert any(link == '../metrics.jsonl' for link in links)
    for link in links:
        assert link.startswith(('#', 'data:image/jpeg;base64,', '../'))
        if link.startswith('../'):
            assert (folder / 'report' / link).exists()
    handlers = [name for _, name, _ in page.attributes if name.startswith('on')]
    assert handlers == []
    assert 'tiny <run>' in page.texts
    assert ('meta', 'charset', 'utf-8') in page.attributes


def test_sections_and_curves(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    titles = re.findall(r'<h2 id="[a-z]+">(.*?)</h2>', text)
    sections = ['Results', 'Curves', 'Retrievals', 'Similarity', 'Confusions', 'The run']
    assert titles == ['Next', *sections]
    assert re.findall(r'<li><a href="#[a-z]+">(.*?)</a>', text) == sections
    captions = set(re.findall(r'<figcaption>(.*?)</figcaption>', text))
    assert {'Loss', 'Learning rate', 'Gradient norm'} <= captions
    assert '2 of 2 steps, 16 clips each' in text


def test_the_run_says_what_it_was_made_with(tiny_run):
    folder, _, _ = tiny_run
    made = read_json(folder / 'provenance.json')
    assert made['device'] == 'cpu'
    assert made['versions']['jax'] == jax.__version__
    text, _ = read_page(folder / 'report' / 'index.html')
    facts = section(text, 'run')
    assert f'{jax.device_count()} × cpu, 1 process(es), {os.cpu_count()} CPU cores' in facts
    assert made['started'][:10] in facts
    assert '../checkpoints/2' in facts
    # Outside a git checkout there is no commit.
    assert ('<dt>commit</dt>' in facts) == bool(made['commit'])


def test_a_higher_loss_is_drawn_higher(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    points = re.search(r'class="line color-0"[^>]*points="(.*?)"', text)[1].split()
    assert len(points) == len(losses) == 2
    first_y, last_y = (float(point.split(',')[1]) for point in points)
    # y grows downwards.
    assert (first_y > last_y) == (losses[0] < losses[1])


def test_the_table_has_trained_random_and_chance(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    header, *body = results_table(text)
    assert header == ['measure', 'pretrained', '95 % interval', 'random init', 'chance']
    rows = {name: cells for name, *cells in body}
    assert len(rows) == len(body)
    trained = evals.load(folder / 'evals' / 'step_000002')['retrieval']
    random = evals.load(folder / 'evals' / 'random_init')['retrieval']
    key = 'text_to_video/R@10'
    low, high = trained.artifacts[f'{key}/interval']
    assert rows['retrieval text → video R@10'] == [
        percent(trained.scalars[key]),
        f'{percent(low)} … {percent(high)}',
        percent(random.scalars[key]),
        percent(10 / 29),
    ]
    assert rows['retrieval audio → video median rank'][-1] == '15.0'
    assert rows['sync'][-1] == '50.0 %'
    assert rows['simple probe spectrum'][2] == '–'  # a control needs no random initialisation


def test_the_printed_table_has_the_cells_of_the_page(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    rows = {name: cells for name, *cells in results_table(text)[1:]}
    printed = {}
    for line in report.table(folder, width=160).splitlines():
        if 'median rank' in line or 'sync' in line:
            name, *cells = re.split(r'\s{2,}', line.strip())
            printed[name] = cells
    assert 'sync' in printed
    for name, cells in printed.items():
        assert cells == rows[name]


def test_the_gallery_shows_the_clips_found(tiny_run):
    folder, _, data = tiny_run
    text, page = read_page(folder / 'report' / 'index.html')
    batch = next(iter(data.one_pass('test', 16, limit=16)))
    with np.load(folder / 'evals' / 'step_000002' / 'gallery.npz') as stored:
        entries = json.loads(str(stored['entries']))['entries']
        stills = {name for name in stored.files if name.startswith('frames/')}
        chex.assert_trees_all_equal(stored['frames/0'], batch['video']['data'][0], strict=True)
    assert {entry['query'] for entry in entries} == {'text', 'audio'}
    assert len(entries) == 16
    expected_stills = set()
    for entry in entries:
        expected_stills |= {f'frames/{i}' for i in (entry['index'], *entry['top'])}
    assert stills == expected_stills

    first = entries[0]
    result = evals.load(folder / 'evals' / 'step_000002')['retrieval'].artifacts
    assert first['index'] == 0
    assert first['top'] == result['text_to_video/top'][0].tolist()
    assert first['rank'] == result['text_to_video/rank'][0]
    assert f'own clip at rank {first["rank"]:g}' in text
    assert data.texts('test')[0]['caption'] in page.text()

    assert text.count('<article class="query">') == 16
    # Five clips each, and the own clip where it is not among them.
    far_off = [entry for entry in entries if entry['index'] not in entry['top']]
    assert text.count('<figure class="clip') == 80 + len(far_off)
    assert text.count('<mark>own clip</mark>') == 16
    assert text.count('data-sound=') == 8


def test_each_clip_is_in_the_page_once_and_plays_as_it_was(tiny_run):
    folder, config, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    films = json.loads(re.search(r'id="films">(.*?)</script>', text)[1])
    with np.load(folder / 'evals' / 'step_000002' / 'gallery.npz') as stored:
        shown = {name.split('/')[1] for name in stored.files if name.startswith('frames/')}
        heard = {name.split('/')[1] for name in stored.files if name.startswith('audio/')}
        frames = stored['frames/0']
    assert set(films) == {f'retrieval-{index}' for index in shown}
    assert heard == shown
    assert text.count('<image id=') == len(shown)
    assert len(set(re.findall(r'href="(data:[^"]*)"', text))) <= len(shown)
    with av.open(io.BytesIO(decoded(films['retrieval-0']))) as film:
        assert film.streams.video[0].average_rate == config.model.inputs.video.fps
        assert len(film.streams.audio) == 1
        decoded_frames = [frame.to_ndarray(format='rgb24') for frame in film.decode(video=0)]
    assert len(decoded_frames) == len(frames)
    # 16 pixels are shown as 192, each as a square.
    larger = np.repeat(np.repeat(frames, 12, 1), 12, 2).astype(float)
    assert np.abs(np.array(decoded_frames) - larger).mean() < 8


def test_captions_are_escaped(copied_run):
    """Wherever a user's words come in: names, captions, sentences, ids, classes, stages."""
    step = copied_run / 'evals' / 'step_000002'
    with np.load(step / 'gallery.npz') as stored:
        arrays = {name: stored[name] for name in stored.files}
    document = json.loads(str(arrays.pop('entries')))
    for i, clip in enumerate(document['clips'].values()):
        # Every other clip has sentences alone.
        clip.update({'caption': EVIL if i % 2 else '', 'sentences': [EVIL], 'id': EVIL})
    np.savez(step / 'gallery.npz', entries=np.array(json.dumps(document)), **arrays)

    results = read_json(step / 'results.json')
    results['probe_video']['artifacts']['classes'] = [EVIL] * 16
    results[EVIL] = {
        'scalars': {'accuracy': 0.5},
        'artifacts': {'accuracy/interval': [0, 1], 'accuracy/chance': 0.1},
    }
    write_json(step / 'results.json', results)
    update_config(copied_run, name=EVIL)
    write_json(copied_run / 'timings.json', {EVIL: 90})

    text, page = read_page(report.build(copied_run, [copied_run]))
    assert page.tags.count('script') == 2
    assert '<script>alert' not in text
    assert EVIL in page.text()
    assert any(EVIL in title for title in page.values('title'))
    assert any(EVIL in label for label in page.values('aria-label'))
    assert page.tags.count('article') == 16
    assert '1.5 min' in page.texts
    assert EVIL in report.table(copied_run, width=400)


def test_the_newest_evaluation_is_that_of_the_largest_step(copied_run):
    """As numbers: a million comes after 999 999, and a user's own copies are no evaluations."""
    evaluations = copied_run / 'evals'
    for name in ('step_999999', 'step_1000000', 'step_999999_old', 'step_7'):
        shutil.copytree(evaluations / 'step_000002', evaluations / name)
    (evaluations / 'step_2000000').mkdir()
    run = FinishedRun(copied_run)
    assert run.evaluation_folder == evaluations / 'step_1000000'
    assert run.results
    assert run.baseline


def test_another_run_beside_it(tiny_run, copied_run, tmp_path):
    other = shutil.copytree(tiny_run[0], tmp_path / 'other')
    update_config(other, name='control', seed=7)
    results_file = other / 'evals' / 'step_000002' / 'results.json'
    results = read_json(results_file)
    results['sync']['scalars']['accuracy'] = 0.123
    del results['probe_video']['scalars']['accuracy']  # it was scored otherwise there
    write_json(results_file, results)

    text, page = read_page(report.build(copied_run, [other]))
    header, *body = results_table(text)
    expected = ['pretrained', '95 % interval', 'control, seed 7', 'random init', 'chance']
    assert header == ['measure', *expected]
    rows = {row[0]: row for row in body}
    assert rows['sync'][3] == '12.3 %'
    assert rows['probe video'][3] == '–'
    assert 'Loss, runs side by side' in text
    assert page.text().count('control, seed 7') >= 2
    assert 'control, seed 7' in report.table(copied_run, [other], width=200)


def test_pictures_go_by_the_type_of_an_evaluator_not_by_its_name(copied_run):
    names = {
        'retrieval': 'search',
        'single_frame_retrieval': 'retrieval',
        'probe_video': 'single_simple_words',
        'simple_probe_spectrum': 'probe_spectrum',
    }
    step = copied_run / 'evals' / 'step_000002'
    results = evals.load(step)
    evals.save({names.get(name, name): result for name, result in results.items()}, step)
    entries = read_json(copied_run / 'config.json')['evals']
    entries = {names.get(name, name): entry for name, entry in entries.items()}
    update_config(copied_run, evals=entries)

    def captions(name, tag):
        text, _ = read_page(report.build(copied_run))
        return re.findall(rf'<{tag}>(.*?)</{tag}>', section(text, name))

    assert captions('similarity', 'figcaption') == ['text → video', 'audio → video']
    assert captions('confusions', 'h3') == ['single simple words']

    # Several retrievals: each says whose it is.
    entries['retrieval']['change'] = ''
    update_config(copied_run, evals=entries)
    assert captions('similarity', 'figcaption') == [
        'search: text → video',
        'search: audio → video',
        'retrieval: text → video',
        'retrieval: audio → video',
    ]


def test_a_run_without_gallery_and_baseline(copied_run):
    (copied_run / 'evals' / 'step_000002' / 'gallery.npz').unlink()
    shutil.rmtree(copied_run / 'evals' / 'random_init')
    text, _ = read_page(report.build(copied_run))
    assert not section(text, 'retrievals')
    header, *body = results_table(text)
    assert body
    for row in body:
        assert row[header.index('random init')] == '–'


def test_metrics_that_are_not_finite_or_cut_short_are_left_out(copied_run):
    with (copied_run / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 3, "loss": NaN}\n')
        # What a killed run may leave.
        file.write('{"step": 4, "lo')
    text, _ = read_page(report.build(copied_run))
    points = re.findall(r'points="(.*?)"', text)
    assert points
    assert 'nan' not in ' '.join(points)
    assert 'NaN' not in section(text, 'curves')


def test_a_run_without_evaluation_or_metrics(copied_run):
    shutil.rmtree(copied_run / 'evals')
    (copied_run / 'metrics.jsonl').unlink()
    (copied_run / 'done.json').unlink()
    text, page = read_page(report.build(copied_run))
    assert 'No evaluation yet' in text
    assert 'Training is at step 0 of 2; the same command continues it.' in text
    assert 'polyline' not in page.tags
    # The header of the column of intervals has a percent sign of its own.
    assert '%' not in report.table(copied_run).replace('95 %', '')


def test_folders_without_a_run_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match=r'holds no run \(no config.json\); train first'):
        report.build(tmp_path / 'nowhere')
    assert not (tmp_path / 'nowhere').exists()
    (tmp_path / 'config.json').write_text('{"name": ')
    with pytest.raises(ConfigError, match='config.json cannot be read'):
        report.build(tmp_path)


def decoded(data_uri):
    """The bytes of a data URI."""
    return base64.b64decode(data_uri.partition('base64,')[2])


def test_png_bytes_give_the_picture_back():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    read_back = np.asarray(Image.open(io.BytesIO(decoded(data_uris.png(picture)))))
    chex.assert_trees_all_equal(read_back, picture, strict=True)


def test_wav_bytes_give_the_sound_back():
    sound = np.array([0, 1, -1, 32767, -32768], np.int16)
    with wave.open(io.BytesIO(decoded(data_uris.wav(sound, 8000)))) as file:
        assert file.getframerate() == 8000
        assert file.getnchannels() == 1
        assert file.getsampwidth() == 2
        read_back = np.frombuffer(file.readframes(9), '<i2')
    chex.assert_trees_all_equal(read_back, sound, strict=True)


def test_a_jpeg_is_nearly_the_picture():
    y, x = np.mgrid[:40, :60]
    picture = np.stack([x * 4, y * 6, x + y], -1).astype(np.uint8)
    read_back = np.asarray(Image.open(io.BytesIO(decoded(data_uris.jpeg(picture, 90)))))
    assert np.abs(read_back.astype(int) - picture).mean() < 4


@pytest.mark.parametrize(
    'low, high, expected',
    [
        (4.7, 5.42, ['4.6', '4.8', '5.0', '5.2', '5.4', '5.6']),
        (0, 1e-3, ['0.0000', '0.0002', '0.0004', '0.0006', '0.0008', '0.0010']),
        (0, 2e-5, ['0', '5e-06', '1e-05', '1.5e-05', '2e-05']),
        (0, 1_000_000, ['0', '200k', '400k', '600k', '800k', '1M']),
        (-3, 7, ['-4', '-2', '0', '2', '4', '6', '8']),
        (99, 100.5, ['99.0', '99.5', '100.0', '100.5']),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert charts.labels(charts.ticks(low, high, 5)) == expected


def test_axes_have_no_values_that_cannot_be():
    """A learning rate is not below 0, and there is no half a step."""
    chart = charts.line_chart('rate', [('rate', [(1, 0.0), (2, 0.001)])])
    assert [tick.label for tick in chart.x_ticks] == ['0', '1', '2']
    assert chart.y_ticks[0].label == '0.0000'


@pytest.mark.parametrize(
    'values', [[2.5, 2.5], [0.0], [-1e99, 1e99], [1, 1 + 2e-16], [1e-310, 2e-310], [np.float64(3)]]
)
def test_charts_of_odd_values(values):
    chart = charts.line_chart('x', [('x', list(enumerate(values)))])
    assert len(chart.y_ticks) >= 2
    for point in chart.lines[0].path.split():
        across, down = map(float, point.split(','))
        assert 0 <= across <= charts.WIDTH
        assert 0 <= down <= charts.HEIGHT


def test_a_long_curve_is_thinned_out_with_its_extremes():
    points = [(step, 5 - step / 1e5) for step in range(100_000)]
    points[70_001] = (70_001, 99.0)
    chart = charts.line_chart('loss', [('loss', points)])
    (line,) = chart.data['lines']
    assert len(line['steps']) <= charts.MOST_POINTS
    assert 99.0 in line['values']
    assert line['steps'] == sorted(line['steps'])
    assert (line['steps'][0], line['steps'][-1]) == (0, 99_999)


def test_more_lines_than_colours_differ_by_their_dashes():
    chart = charts.line_chart('x', [(f'line {i}', [(0, i), (1, i)]) for i in range(14)])
    assert len({(line.color, line.dash) for line in chart.lines}) == 14


def test_a_clip_takes_no_more_than_its_budget():
    rng = np.random.default_rng(0)
    film = rng.integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    sound = rng.integers(-9000, 9000, 8000).astype(np.int16)
    sizes = []
    for budget in (10**6, 100_000, 30_000, 3_000, 1_500):
        clip = clips.encode(film, 4.0, sound, 8000, budget)
        assert clip.size <= budget
        sizes.append(clip.size)
    assert sizes == sorted(sizes, reverse=True)
    # The last one is a still.
    assert not clip.film
    assert clips.encode(film, 4.0, sound, 8000, 100) is None


@pytest.mark.parametrize('rate', [2000, 8000, 44100, 96000])
@pytest.mark.parametrize('shape', [(1, 2, 2), (3, 17, 31), (2, 300, 100)])
def test_clips_of_any_shape_and_rate(shape, rate):
    film = np.full((*shape, 3), 90, np.uint8)
    clip = clips.encode(film, 12.5, np.zeros(rate // 2, np.int16), rate, 10**6)
    with av.open(io.BytesIO(decoded(clip.film))) as read:
        frames = list(read.decode(video=0))
        assert len(frames) == shape[0]
        assert frames[0].height / frames[0].width == pytest.approx(shape[1] / shape[2], rel=0.1)


def test_without_the_video_extra_clips_are_stills_with_sound(monkeypatch, copied_run):
    monkeypatch.setitem(sys.modules, 'av', None)
    text, _ = read_page(report.build(copied_run))
    assert "pip install 'vatt_jax[video]'" in text
    assert 'data:video' not in text
    films = json.loads(re.search(r'id="films">(.*?)</script>', text)[1])
    assert films
    for film in films.values():
        assert film.startswith('data:audio/wav;base64,')


def test_evaluations_from_before_the_speeds_were_stored(copied_run):
    gallery_file = copied_run / 'evals' / 'step_000002' / 'gallery.npz'
    with np.load(gallery_file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    document = json.loads(str(arrays.pop('entries')))
    del document['fps']
    np.savez(gallery_file, entries=np.array(json.dumps(document)), **arrays)
    (copied_run / 'provenance.json').unlink()
    text, _ = read_page(report.build(copied_run))
    assert text.count('data:video/mp4') > 0
    assert '<dt>trained on</dt>' not in text


def small_counts():
    """Clips by true and predicted class; nothing of the last one."""
    return np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]])


def test_confusions_in_words():
    shown = confusions.confusion('probe', small_counts(), ['dog', 'cat'])
    assert shown.names == ['dog', 'cat', '2']
    assert shown.cells[0][1].title == 'dog taken for cat: 2 (20 %)'
    assert [row.recall for row in shown.classes] == [0.8, 0.8, None]
    assert shown.classes[1].taken_for == 'dog (1)'
    pairs = [(pair.true, pair.predicted, pair.count) for pair in shown.pairs]
    assert pairs == [('dog', 'cat', 2), ('cat', 'dog', 1)]
    assert shown.summary == '3 classes, 15 clips, 80.0 % of them on the diagonal'
    assert confusions.confusion('probe', np.zeros((2, 2), int), []) is None


@pytest.mark.parametrize('classes', [400, 1500])
def test_confusions_of_many_classes_are_a_picture_that_hides_no_cell(classes):
    counts = np.eye(classes, dtype=int) * 50
    counts[classes - 7, 5] = 1
    shown = confusions.confusion('probe', counts, [])
    assert shown.cells == []
    picture = np.asarray(Image.open(io.BytesIO(decoded(shown.picture))))
    side = min(classes, confusions.PICTURE_SIDE)
    assert picture.shape == (side, side, 3)
    lower_left = picture[side // 2 :, : side // 4, 0]
    assert (lower_left < 220).sum() == 1
    # Flat (row, column, count) for the script.
    triples = np.reshape(shown.data['counts'], (-1, 3)).tolist()
    assert [classes - 7, 5, 1] in triples
    assert len(triples) == classes + 1


def test_recalls_that_cannot_be_wrong_are_marked(copied_run):
    """Of three clips, R@5 and R@10 are 100 % whatever the model does."""
    results_file = copied_run / 'evals' / 'step_000002' / 'results.json'
    results = read_json(results_file)
    retrieval = results['retrieval']
    for name in ('text_to_video', 'audio_to_video'):
        retrieval['scalars'][f'{name}/clips'] = 3.0
        for k in (5, 10):
            retrieval['scalars'][f'{name}/R@{k}'] = 1.0
            retrieval['artifacts'][f'{name}/R@{k}/chance'] = 1.0
            retrieval['artifacts'][f'{name}/R@{k}/interval'] = [1.0, 1.0]
    write_json(results_file, results)
    text, page = read_page(report.build(copied_run))
    rows = [row[0] for row in results_table(text)]
    assert 'retrieval text → video R@10 (too few clips to be wrong)' in rows
    assert 'retrieval text → video R@1' in rows
    assert 'too few clips to be wrong' in report.table(copied_run, width=200)
    warning = (
        'only 3 clips were held out (retrieval text → video, retrieval audio → video), so one '
        'clip moves R@1 by 33 percentage points, and R@5 and R@10 are 100 % whatever the model '
        'does. Hold out 100 or more.'
    )
    assert warning in page.text()
    first, *_ = headline.numbers(FinishedRun(copied_run))
    assert (first.verdict, first.is_good) == ('says nothing: too few clips to be wrong', False)


@pytest.mark.parametrize(
    'interval, chance, untrained, verdict, is_good',
    [
        ([0.3, 0.5], 0.1, 0.2, 'above chance and the untrained network', True),
        ([0.3, 0.5], 0.1, None, 'above chance', True),
        ([0.3, 0.5], 0.1, 0.35, 'not surely above the untrained network', False),
        ([0.05, 0.5], 0.1, 0.0, 'not surely above chance', False),
    ],
)
def test_verdicts(copied_run, interval, chance, untrained, verdict, is_good):
    for folder, value in (('step_000002', 0.4), ('random_init', untrained)):
        results_file = copied_run / 'evals' / folder / 'results.json'
        results = read_json(results_file)
        scalars = results['sync']['scalars']
        scalars.pop('accuracy')
        if value is not None:
            scalars['accuracy'] = value
        results['sync']['artifacts'] = {'accuracy/interval': interval, 'accuracy/chance': chance}
        write_json(results_file, results)
    *_, last = headline.numbers(FinishedRun(copied_run))
    assert (last.label, last.value) == ('sync accuracy', '40.0 %')
    assert (last.verdict, last.is_good) == (verdict, is_good)


def test_names_that_are_not_utf8_are_shown_as_far_as_they_can_be(copied_run):
    """A file called b'caf\\xe9.mp4' has the id 'caf\\udce9.mp4'."""
    gallery_file = copied_run / 'evals' / 'step_000002' / 'gallery.npz'
    with np.load(gallery_file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    document = json.loads(str(arrays.pop('entries')))
    for clip in document['clips'].values():
        clip.update({'caption': '', 'sentences': None, 'id': 'caf\udce9.mp4'})
    np.savez(gallery_file, entries=np.array(json.dumps(document)), **arrays)
    _, page = read_page(report.build(copied_run))
    assert 'caf?.mp4' in page.text()


@pytest.mark.parametrize('damage', ['cut short', 'empty', 'other'])
def test_a_damaged_gallery_costs_its_clips_alone(copied_run, damage):
    gallery_file = copied_run / 'evals' / 'step_000002' / 'gallery.npz'
    content = gallery_file.read_bytes()
    if damage == 'other':
        np.savez(gallery_file, something=np.zeros(3))
    else:
        gallery_file.write_bytes(content[: len(content) // 2] if damage == 'cut short' else b'')
    text, page = read_page(report.build(copied_run))
    assert not section(text, 'retrievals')
    assert results_table(text)
    assert 'gallery.npz cannot be read' in page.text()


@pytest.mark.parametrize('name', ['done.json', 'timings.json', 'provenance.json'])
@pytest.mark.parametrize('content', ['{"step":', '[1, 2]'])
def test_damaged_files_are_sentences(copied_run, name, content):
    (copied_run / name).write_text(content)
    with pytest.raises(ConfigError, match=f'{name}: expected (a )?JSON'):
        report.build(copied_run)


def test_a_damaged_evaluation_is_a_sentence(copied_run):
    (copied_run / 'evals' / 'step_000002' / 'arrays.npz').write_bytes(b'PK')
    with pytest.raises(ConfigError, match='step_000002 cannot be read .*--mode=eval'):
        report.build(copied_run)


def test_lines_of_other_programs_in_metrics_are_passed_over(copied_run):
    with (copied_run / 'metrics.jsonl').open('a') as file:
        file.write('[1, 2]\n{"loss": 1}\n7\n{"step": 3, "loss": "high", "lr": true}\n')
    text, _ = read_page(report.build(copied_run))
    assert section(text, 'curves')


def test_a_file_where_the_report_belongs_is_a_sentence(copied_run):
    shutil.rmtree(copied_run / 'report')
    (copied_run / 'report').write_text('a file where the folder belongs')
    with pytest.raises(ConfigError, match='report: expected a folder for the report, got a file'):
        report.build(copied_run)


def test_similarities_that_are_not_numbers(copied_run):
    step = copied_run / 'evals' / 'step_000002'
    results = evals.load(step)
    for key in ('text_to_video/similarity', 'audio_to_video/similarity'):
        matrix = results['retrieval'].artifacts[key]
        results['retrieval'].artifacts[key] = np.full_like(matrix, np.nan)
    gallery_bytes = (step / 'gallery.npz').read_bytes()
    evals.save(results, step, lambda folder: (folder / 'gallery.npz').write_bytes(gallery_bytes))
    text, _ = read_page(report.build(copied_run))
    assert 'mean cosine 0.00' in section(text, 'similarity')


def test_commands_can_be_typed_whatever_the_folder_is_called(copied_run):
    folder = copied_run.rename(copied_run.with_name("it's my run"))
    commands = [step.command for step in headline.next_steps(FinishedRun(folder))]
    *_, last = commands
    assert shlex.split(last)[2] == f'--workdir={folder}'
    assert any(f'load({str(folder)!r})' in command for command in commands)
