"""The report page of a real tiny run: one file, well-formed, nothing loaded from elsewhere, nothing a caption says is executed."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.reporting import data_uris, report
from vatt_jax.reporting.finished_run import FinishedRun

EVIL = '<script>alert("x")</script> & \'a\' "red" stripe</div>'
VOID = {'meta', 'img', 'br', 'hr', 'link', 'input', 'line', 'polyline'}


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; raises AssertionError where tags do not close in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, name):
        return [v for _, n, v in self.attributes if n == name]


def copy_of(tiny_run, tmp_path, name='run'):
    return shutil.copytree(tiny_run[0], tmp_path / name)


def read(path):
    text = path.read_text(encoding='utf-8')
    return text, Page(text)


def cells(text):
    """The results table: rows of unescaped cells, header first."""
    table = re.search(r'<table><thead>.*?</table>', text, re.S)[0]
    return [
        [html.unescape(c) for c in re.findall(r'<t[hd]>(.*?)</t[hd]>', row)]
        for row in re.findall(r'<tr>(.*?)</tr>', table)
    ]


def test_the_page_stands_alone(tiny_run):
    text, page = read(tiny_run[0] / 'report' / 'index.html')
    assert sorted(p.name for p in (tiny_run[0] / 'report').iterdir()) == ['index.html']
    assert (
        'http' not in text
        and '@import' not in text
        and 'url(' not in text
        and 'script' not in page.tags
        and 'link' not in page.tags
    )
    sources = page.values('src') + page.values('href')
    assert sources and all(
        s.startswith(('data:image/png;base64,', 'data:audio/wav;base64,')) for s in sources
    )
    assert not [n for _, n, _ in page.attributes if n.startswith('on')]
    assert page.texts[0] == 'tiny <run>' and ('meta', 'charset', 'utf-8') in page.attributes


def test_sections_and_curves(tiny_run):
    text, page = read(tiny_run[0] / 'report' / 'index.html')
    titles = re.findall(r'<h2>(.*?)</h2>', text)
    assert titles == ['Results', 'Curves', 'Retrievals', 'Similarity', 'Confusions']
    drawn = re.findall(r'<figcaption>([^<]*?) .*?points="(.*?)"', text)
    names = [n.strip() for n, _ in drawn]
    assert {'loss', 'learning rate', 'gradient norm'} <= set(names) | set(
        re.findall(r'<figcaption>(.*?) <', text)
    )
    losses = [
        json.loads(line)['loss']
        for line in (tiny_run[0] / 'metrics.jsonl').read_text().splitlines()
        if '"loss"' in line
    ]
    points = re.search(r'stroke="#2563eb"[^>]*points="(.*?)"', text)[1].split()
    assert len(points) == len(losses) == 2
    (_, y0), (_, y1) = (map(float, p.split(',')) for p in points)
    assert (y0 > y1) == (losses[0] < losses[1])  # higher is up
    assert '2 steps of 16 clips · seed 0 · objective contrastive' in text


def test_the_table_has_trained_random_and_chance(tiny_run):
    folder, _, _ = tiny_run
    text, _ = read(folder / 'report' / 'index.html')
    header, *body = cells(text)
    assert header == ['', 'pretrained', '95 % interval', 'random init', 'chance']
    rows = {r[0]: r[1:] for r in body}
    trained, random = (
        evals.load(folder / 'evals' / 'step_000002'),
        evals.load(folder / 'evals' / 'random_init'),
    )
    percent = lambda x: f'{100 * x:.1f} %'
    key = 'text_to_video/R@10'
    low, high = trained['retrieval'].artifacts[f'{key}/interval']
    assert rows['retrieval text → video R@10'] == [
        percent(trained['retrieval'].scalars[key]),
        f'{percent(low)} … {percent(high)}',
        percent(random['retrieval'].scalars[key]),
        percent(10 / 29),
    ]
    assert rows['retrieval audio → video median rank'][-1] == '15.0'
    assert (
        rows['sync'][-1] == '50.0 %' and rows['simple probe spectrum'][2] == '–'
    )  # a control needs no random initialisation
    assert len(rows) == len(body)
    for line in (
        l for l in report.table(folder, width=160).splitlines() if 'median rank' in l or 'sync' in l
    ):
        name = next(r for r in rows if line.strip().startswith(r + ' '))
        assert [c for c in re.split(r'\s{2,}', line.strip())][1:] == rows[name]


def test_the_gallery_shows_the_clips_found(tiny_run):
    folder, _, data = tiny_run
    text, page = read(folder / 'report' / 'index.html')
    with np.load(folder / 'evals' / 'step_000002' / 'gallery.npz') as stored:
        document = json.loads(str(stored['entries']))
        shown = {k for k in stored.files if k.startswith('frames/')}
        own = document['entries'][0]
        batch = next(iter(data.one_pass('test', 16, limit=16)))
        np.testing.assert_array_equal(stored['frames/0'], batch['video']['data'][0])
    assert (
        {e['query'] for e in document['entries']} == {'text', 'audio'}
        and len(document['entries']) == 16
        and own['index'] == 0
    )
    result = evals.load(folder / 'evals' / 'step_000002')['retrieval'].artifacts
    assert (
        own['top'] == result['text_to_video/top'][0].tolist()
        and own['rank'] == result['text_to_video/rank'][0]
    )
    assert {f'frames/{i}' for e in document['entries'] for i in (e['index'], *e['top'])} == shown
    assert (
        text.count('<section class="query">') == 16
        and text.count('class="clip') == 80
        and page.tags.count('audio') == 8
    )
    assert f'own clip came at rank {own["rank"]:g}' in text and data.texts('test')[0][
        'caption'
    ] in ''.join(page.texts)


def test_captions_are_escaped(tiny_run, tmp_path):
    """Wherever a user's words come in: captions, sentences, ids, class names, the run's name, an evaluator's name."""
    folder = copy_of(tiny_run, tmp_path)
    step = folder / 'evals' / 'step_000002'
    with np.load(step / 'gallery.npz') as stored:
        arrays = {k: stored[k] for k in stored.files}
    document = json.loads(str(arrays.pop('entries')))
    for i, clip in enumerate(document['clips'].values()):
        clip.update({'caption': EVIL if i % 2 else '', 'sentences': [EVIL], 'id': EVIL})
    np.savez(step / 'gallery.npz', entries=np.array(json.dumps(document)), **arrays)
    results = json.loads((step / 'results.json').read_text())
    results['probe_video']['artifacts']['classes'] = [EVIL] * 16
    results[EVIL] = {
        'scalars': {'accuracy': 0.5},
        'artifacts': {'accuracy/interval': [0, 1], 'accuracy/chance': 0.1},
    }
    (step / 'results.json').write_text(json.dumps(results))
    config = json.loads((folder / 'config.json').read_text())
    config['name'] = EVIL
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'timings.json').write_text(json.dumps({EVIL: 90}))
    text, page = read(report.build(folder, [folder]))
    assert 'script' not in page.tags and '<script' not in text and EVIL in ''.join(page.texts)
    assert any(EVIL in v for v in page.values('title'))
    assert page.tags.count('section') == 16 and '<h2>Time</h2>' in text and '1.5 min' in page.texts
    assert EVIL in report.table(folder, width=400)


def test_the_newest_evaluation_is_that_of_the_largest_step(tiny_run, tmp_path):
    """As numbers: a million comes after 999 999, and a user's own copies are no evaluations."""
    evaluations = copy_of(tiny_run, tmp_path) / 'evals'
    for name in ('step_999999', 'step_1000000', 'step_999999_old', 'step_7'):
        shutil.copytree(evaluations / 'step_000002', evaluations / name)
    (evaluations / 'step_2000000').mkdir()
    run = FinishedRun(tmp_path / 'run')
    assert run.evaluation_folder == evaluations / 'step_1000000'
    assert run.results and run.baseline


def test_another_run_beside_it(tiny_run, tmp_path):
    folder, other = copy_of(tiny_run, tmp_path), copy_of(tiny_run, tmp_path, 'other')
    config = json.loads((other / 'config.json').read_text())
    config['name'], config['seed'] = 'control', 7
    (other / 'config.json').write_text(json.dumps(config))
    results = json.loads((other / 'evals' / 'step_000002' / 'results.json').read_text())
    results['sync']['scalars']['accuracy'] = 0.123
    del results['probe_video']['scalars']['accuracy']  # it was scored otherwise there
    (other / 'evals' / 'step_000002' / 'results.json').write_text(json.dumps(results))
    text, page = read(report.build(folder, [other]))
    header, *body = cells(text)
    assert header == ['', 'pretrained', '95 % interval', 'control, seed 7', 'random init', 'chance']
    rows = {r[0]: r for r in body}
    assert rows['sync'][3] == '12.3 %' and rows['probe video'][3] == '–'
    assert 'loss, runs side by side' in text and '— control, seed 7' in ''.join(page.texts)
    assert 'control, seed 7' in report.table(folder, [other], width=200)


def test_pictures_go_by_the_type_of_an_evaluator_not_by_its_name(tiny_run, tmp_path):
    folder = copy_of(tiny_run, tmp_path)
    names = {
        'retrieval': 'search',
        'single_frame_retrieval': 'retrieval',
        'probe_video': 'single_simple_words',
        'simple_probe_spectrum': 'probe_spectrum',
    }
    step = folder / 'evals' / 'step_000002'
    results = evals.load(step)
    evals.save({names.get(name, name): result for name, result in results.items()}, step)
    config = json.loads((folder / 'config.json').read_text())
    config['evals'] = {names.get(name, name): entry for name, entry in config['evals'].items()}
    (folder / 'config.json').write_text(json.dumps(config))

    def captions():
        text, _ = read(report.build(folder))
        return re.findall(r'<figcaption>([^<]*)</figcaption>', text.partition('Similarity</h2>')[2])

    assert captions() == [
        'text → video',
        'audio → video',
        'single simple words: true class by row, predicted by column in the same order',
    ]

    # Several retrievals: each says whose it is.
    config['evals']['retrieval']['change'] = ''
    (folder / 'config.json').write_text(json.dumps(config))
    assert captions()[:4] == [
        'search: text → video',
        'search: audio → video',
        'retrieval: text → video',
        'retrieval: audio → video',
    ]


def test_a_run_without_gallery_evaluation_or_metrics(tiny_run, tmp_path):
    folder = copy_of(tiny_run, tmp_path)
    (folder / 'evals' / 'step_000002' / 'gallery.npz').unlink()
    shutil.rmtree(folder / 'evals' / 'random_init')
    text, _ = read(report.build(folder))
    assert 'Retrievals' not in text and all(r[3] == '–' for r in cells(text)[1:])
    with (folder / 'metrics.jsonl').open('a') as f:
        f.write(
            '{"step": 3, "loss": NaN}\n{"step": 4, "lo'
        )  # a step that was not finite, and a line that a kill cut short
    assert 'nan' not in ' '.join(re.findall(r'points="(.*?)"', read(report.build(folder))[0]))
    shutil.rmtree(folder / 'evals')
    for name in ('metrics.jsonl', 'done.json'):
        (folder / name).unlink()
    text, page = read(report.build(folder))
    assert 'No evaluation yet' in text and 'polyline' not in page.tags
    assert not [l for l in report.table(folder).splitlines() if '%' in l.replace('95 %', '')]
    with pytest.raises(ConfigError, match=r'holds no run \(no config.json\); train first'):
        report.build(tmp_path / 'nowhere')
    assert not (tmp_path / 'nowhere').exists()
    (tmp_path / 'config.json').write_text('{"name": ')
    with pytest.raises(ConfigError, match='config.json cannot be read'):
        report.build(tmp_path)


def test_pictures_and_sounds_survive_the_page():
    """PNG and WAV bytes decoded by other libraries give the arrays back."""
    import base64
    import io
    import wave

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    raw = base64.b64decode(data_uris.png(image).partition('base64,')[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(raw))), image)
    sound = np.array([0, 1, -1, 32767, -32768], np.int16)
    with wave.open(
        io.BytesIO(base64.b64decode(data_uris.wav(sound, 8000).partition('base64,')[2]))
    ) as f:
        assert (f.getframerate(), f.getnchannels(), f.getsampwidth()) == (8000, 1, 2)
        np.testing.assert_array_equal(np.frombuffer(f.readframes(9), '<i2'), sound)
