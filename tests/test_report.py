"""The report page of a real tiny run.

It is one well-formed file that loads nothing from elsewhere and executes nothing that a caption
says.
"""

import base64
import html.parser
import io
import json
import re
import shutil
import wave

import chex
import numpy as np
import pytest
from PIL import Image

from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.reporting import data_uris, report
from vatt_jax.reporting.finished_run import FinishedRun

EVIL = '<script>alert("x")</script> & \'a\' "red" stripe</div>'
VOID = {'meta', 'img', 'br', 'hr', 'link', 'input', 'line', 'polyline'}


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
    table = re.search(r'<table><thead>.*?</table>', text, re.S)[0]
    rows = []
    for row in re.findall(r'<tr>(.*?)</tr>', table):
        cells = re.findall(r'<t[hd]>(.*?)</t[hd]>', row)
        rows.append([html.unescape(cell) for cell in cells])
    return rows


def percent(share):
    return f'{100 * share:.1f} %'


def test_the_page_stands_alone(tiny_run):
    folder, _, _ = tiny_run
    text, page = read_page(folder / 'report' / 'index.html')
    assert [path.name for path in (folder / 'report').iterdir()] == ['index.html']
    for loading in ('http', '@import', 'url('):
        assert loading not in text
    assert 'script' not in page.tags
    assert 'link' not in page.tags
    sources = page.values('src') + page.values('href')
    assert sources
    for source in sources:
        assert source.startswith(('data:image/png;base64,', 'data:audio/wav;base64,'))
    handlers = [name for _, name, _ in page.attributes if name.startswith('on')]
    assert handlers == []
    assert page.texts[0] == 'tiny <run>'
    assert ('meta', 'charset', 'utf-8') in page.attributes


def test_sections_and_curves(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    titles = re.findall(r'<h2>(.*?)</h2>', text)
    assert titles == ['Results', 'Curves', 'Retrievals', 'Similarity', 'Confusions']
    captions = set(re.findall(r'<figcaption>(.*?) <', text))
    assert {'loss', 'learning rate', 'gradient norm'} <= captions
    assert '2 steps of 16 clips · seed 0 · objective contrastive' in text


def test_a_higher_loss_is_drawn_higher(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    points = re.search(r'stroke="#2563eb"[^>]*points="(.*?)"', text)[1].split()
    assert len(points) == len(losses) == 2
    first_y, last_y = (float(point.split(',')[1]) for point in points)
    # y grows downwards.
    assert (first_y > last_y) == (losses[0] < losses[1])


def test_the_table_has_trained_random_and_chance(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read_page(folder / 'report' / 'index.html')
    header, *body = results_table(text)
    assert header == ['', 'pretrained', '95 % interval', 'random init', 'chance']
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
    assert f'own clip came at rank {first["rank"]:g}' in text
    assert data.texts('test')[0]['caption'] in page.text()

    assert text.count('<section class="query">') == 16
    assert text.count('class="clip') == 80
    assert page.tags.count('audio') == 8


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
    assert 'script' not in page.tags
    assert '<script' not in text
    assert EVIL in page.text()
    assert any(EVIL in title for title in page.values('title'))
    assert page.tags.count('section') == 16
    assert '<h2>Time</h2>' in text
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
    assert header == ['', 'pretrained', '95 % interval', 'control, seed 7', 'random init', 'chance']
    rows = {row[0]: row for row in body}
    assert rows['sync'][3] == '12.3 %'
    assert rows['probe video'][3] == '–'
    assert 'loss, runs side by side' in text
    assert '— control, seed 7' in page.text()
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

    def captions():
        text, _ = read_page(report.build(copied_run))
        _, _, pictures = text.partition('Similarity</h2>')
        return re.findall(r'<figcaption>([^<]*)</figcaption>', pictures)

    assert captions() == [
        'text → video',
        'audio → video',
        'single simple words: true class by row, predicted by column in the same order',
    ]

    # Several retrievals: each says whose it is.
    entries['retrieval']['change'] = ''
    update_config(copied_run, evals=entries)
    assert captions()[:4] == [
        'search: text → video',
        'search: audio → video',
        'retrieval: text → video',
        'retrieval: audio → video',
    ]


def test_a_run_without_gallery_and_baseline(copied_run):
    (copied_run / 'evals' / 'step_000002' / 'gallery.npz').unlink()
    shutil.rmtree(copied_run / 'evals' / 'random_init')
    text, _ = read_page(report.build(copied_run))
    assert 'Retrievals' not in text
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


def test_a_run_without_evaluation_or_metrics(copied_run):
    shutil.rmtree(copied_run / 'evals')
    (copied_run / 'metrics.jsonl').unlink()
    (copied_run / 'done.json').unlink()
    text, page = read_page(report.build(copied_run))
    assert 'No evaluation yet' in text
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
