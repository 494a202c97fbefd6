"""The playground keeps its promises: what is seen, heard and said belongs together, and the truth beside it is true."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from data_pipelines import DataError
from data_pipelines.datasets import playground
from data_pipelines.datasets.playground import __main__ as command
from data_pipelines.datasets.playground import drawing, narration, render, sound, world
from data_pipelines.datasets.playground.render import content, path_of, truth
from data_pipelines.datasets.playground.world import (
    CLASSES,
    COLORS,
    EVENTS,
    FLOOR,
    KINDS,
    LEFT,
    RIGHT,
    SPLITS,
    Config,
)

FINE = Config(
    train=48, validation=16, test=48, fps=200.0, camera_noise=0.0, sound_noise=0.0
)  # the same world, looked at closely
SMALL = {
    'train': 3,
    'validation': 2,
    'test': 2,
    'seconds': 4.5,
    'episodes': 2,
    'size': 48,
    'seed': 3,
}


@pytest.fixture(scope='module')
def worlds():
    """[(split, number, episodes)] at 200 pictures a second."""
    return [(s, n, world.video(FINE, s, n)) for s in SPLITS for n in range(getattr(FINE, s))]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp('playground') / 'small'
    return path, playground.make(path, processes=1, quiet=True, **SMALL)


# ---- the world


def test_everything_follows_from_the_seed():
    config = Config(**SMALL)
    frames, audio = content(config, 'train', 1)
    again = content(Config(**SMALL), 'train', 1)
    assert (
        frames.dtype == np.uint8
        and frames.shape == (36, 48, 48, 3)
        and audio.dtype == np.int16
        and audio.shape == (36000,)
    )
    np.testing.assert_array_equal(frames, again[0])
    np.testing.assert_array_equal(audio, again[1])
    say = lambda c, *at: narration.narrate(world.rng_of(c, *at, 3), world.video(c, *at))
    assert say(config, 'train', 1) == say(config, 'train', 1)
    for c, at in (
        (dataclasses.replace(config, seed=4), ('train', 1)),
        (config, ('train', 2)),
        (config, ('test', 1)),
    ):
        other = content(c, *at)
        assert (
            not np.array_equal(other[0], frames)
            and not np.array_equal(other[1], audio)
            and say(c, *at) != say(config, 'train', 1)
        )
    more = dataclasses.replace(config, train=50, test=9)  # a larger set begins with the smaller one
    np.testing.assert_array_equal(content(more, 'train', 1)[0], frames)


def test_classes_are_every_event_of_every_object_in_balance(worlds):
    assert len(CLASSES) == len(EVENTS) * len(KINDS) >= 12 and set(CLASSES) == {
        f'{e} {k}' for e in EVENTS for k in KINDS
    }
    for split in SPLITS:
        labels = [e.label for s, _, es in worlds if s == split for e in es]
        counts = np.array([labels.count(c) for c in CLASSES])
        assert counts.sum() == getattr(FINE, split) * FINE.episodes and np.ptp(counts) <= 1, split


def test_held_out_pairs_are_in_the_test_split_alone(worlds):
    held = world.held_out_pairs(FINE)
    assert len(held) == round(FINE.held_out * len(COLORS) * len(KINDS)) > 0
    for color in COLORS:
        assert sum((color, k) in held for k in KINDS) < len(KINDS)
    for kind in KINDS:
        assert sum((c, kind) in held for c in COLORS) < len(COLORS)
    shown = lambda split: [
        (x.color, x.kind)
        for s, _, es in worlds
        if s == split
        for e in es
        for x in (e.subject, *e.distractors)
    ]
    assert not held & set(shown('train')) and not held & set(shown('validation'))
    subjects = [(e.subject.color, e.subject.kind) for s, _, es in worlds if s == 'test' for e in es]
    share = np.mean([p in held for p in subjects])
    assert 0.4 * FINE.held_out < share < 2 * FINE.held_out  # seen and unseen pairs side by side
    assert not world.held_out_pairs(dataclasses.replace(FINE, held_out=0.0))
    assert world.held_out_pairs(dataclasses.replace(FINE, seed=1)) != held
    most = world.held_out_pairs(dataclasses.replace(FINE, held_out=0.5))
    assert len(most) == len(COLORS) * len(KINDS) // 2 and all(
        sum((c, k) in most for c in COLORS) < len(COLORS) for k in KINDS
    )


def test_scenes_fill_the_video_and_events_lie_inside_their_scene(worlds):
    for _, _, episodes in worlds:
        assert episodes[0].begin == 0 and episodes[-1].end == FINE.seconds
        assert all(a.end == b.begin and b.end - b.begin > 1 for a, b in zip(episodes, episodes[1:]))
        assert sum(len(e.times) for e in episodes) == round(FINE.seconds * FINE.fps)
        events = truth(
            dataclasses.replace(FINE, fps=4.0),
            [dataclasses.replace(e, times=e.times[:1]) for e in episodes],
        )['ground_truth']['events']
        assert all(0 <= event['time'] < FINE.seconds for event in events)
        assert all(e.sounds and all(t < e.end for t, _, _ in e.sounds) for e in episodes)
        want = [
            (max(t, e.begin), what, e.subject.kind) for e in episodes for t, what, _ in e.sounds
        ]
        assert [(v['sound'], v['object']) for v in events] == [w[1:] for w in want]
        np.testing.assert_allclose([v['time'] for v in events], [w[0] for w in want], atol=1e-4)


def test_impacts_are_heard_when_they_are_seen(worlds):
    """At each impact the thing is at the floor or a post and turns round; and each turn there has its impact."""
    checked = 0
    for _, _, episodes in worlds:
        for e in episodes:
            if e.event not in ('bounce', 'collide'):
                continue
            s, t = e.subject, e.times
            way = s.center[:, 0] if e.event == 'bounce' else s.center[:, 1]
            high, wide = s.radius[0] * np.array(world.REACH[s.kind])
            edges = [FLOOR - high] if e.event == 'bounce' else [LEFT + wide, RIGHT - wide]
            assert all(what == 'impact' for _, what, _ in e.sounds)
            speed = np.diff(way)
            for time, _, _ in e.sounds:
                i = np.searchsorted(t, time)
                if not 3 <= i < len(t) - 3:
                    continue
                assert min(abs(way[i] - edge) for edge in edges) < 0.02, (e.label, time)
                assert speed[i - 3] * speed[i + 1] < 0, (e.label, time)
                checked += 1
            near = np.min([np.abs(way - edge) for edge in edges], 0) < 0.01
            turns = [
                t[i + 1] for i in range(1, len(speed)) if speed[i - 1] * speed[i] < 0 and near[i]
            ]
            for turn in turns:
                assert min(abs(turn - time) for time, _, _ in e.sounds) < 0.02, (e.label, turn)
    assert checked > 100


def test_appearing_and_vanishing_are_heard_when_they_are_seen(worlds):
    """From its sound on, a thing grows from nothing (appear) or shrinks from its full size (vanish), and between sounds it stays."""
    checked = 0
    for _, _, episodes in worlds:
        for e in episodes:
            if e.event not in ('appear', 'vanish'):
                continue
            r, t = e.subject.radius, e.times
            for time, what, _ in e.sounds:
                i, later = np.searchsorted(t, time), np.searchsorted(t, time + 0.5 * world.GLIDE)
                assert what == e.event
                if i < 1 or later >= len(t) or t[i - 1] < e.begin:
                    continue
                change = r[later] - r[i]
                assert change > 0.3 * r.max() if what == 'appear' else change < -0.3 * r.max(), (
                    e.label,
                    time,
                )
                checked += 1
            moving = np.sign(np.diff(r)) == (1 if e.event == 'appear' else -1)
            begins = [t[i] for i in range(1, len(moving)) if moving[i] and not moving[i - 1]]
            for begin in begins:
                assert (
                    min(abs(begin - time) for time, _, _ in e.sounds) < 0.03 or begin > e.end - 0.15
                ), (e.label, begin)
    assert checked > 100


# ---- sound


def loudness(wave, rate, begin, end):
    piece = wave[max(0, round(begin * rate)) : max(0, round(end * rate))].astype(np.float64) / 32768
    return np.sqrt((piece**2).mean()) if len(piece) else 0.0


def test_sounds_are_audible_at_their_instants(worlds):
    """Energy rises at events and falls between them, scene by scene; a scene is silent before its first sound and outside its time."""
    rate, at_events, between = FINE.rate, [], []
    for split, n, episodes in worlds[:40]:
        for e in episodes:
            wave = sound.waveform(FINE, [e], world.rng_of(FINE, split, n, 2))
            assert len(wave) == round(FINE.seconds * rate) and wave.dtype == np.int16
            assert not wave[: round(e.begin * rate)].any() and not wave[round(e.end * rate) :].any()
            times = sorted(max(t, e.begin) for t, _, _ in e.sounds if e.end - t > 0.15)
            if times:
                assert not wave[round(e.begin * rate) : max(0, round(times[0] * rate) - 1)].any()
                assert loudness(wave, rate, times[0], times[0] + 0.15) > 0.03
            rise = lambda t: (
                loudness(wave, rate, t, t + 0.1) / max(1e-4, loudness(wave, rate, t - 0.1, t))
            )  # noqa: B023
            at_events += [rise(t) for t in times]
            between += [rise((a + b) / 2) for a, b in zip(times, times[1:]) if b - a > 0.3]
    assert np.mean(np.array(at_events) > 1.3) > 0.95 and np.mean(np.array(between) > 1.3) < 0.3


def test_each_kind_has_its_timbre_and_each_event_its_sound():
    """Same pitch and phases, other kind: the same four tones, equally strong over a note, but others at a time. Appearing bends upwards,
    vanishing downwards, an impact not at all and is over sooner."""
    rate, pitch = 8000, 280.0
    note = lambda kind, what: sound.note(rate, kind, what, pitch, np.random.default_rng(0))

    def strength(wave, frequency):
        """Of one tone in a wave, by a sliding product with it: [S / step]."""
        n = 320
        t = np.arange(n) / rate
        probe = np.exp(-2j * np.pi * frequency * t) * np.hanning(n)
        return np.abs([wave[i : i + n] @ probe for i in range(0, len(wave) - n + 1, 80)]) / (
            np.hanning(n).sum() / 2
        )

    together = {}
    for kind in KINDS:
        heard = np.stack([strength(note(kind, 'impact'), pitch * tone) for tone in sound.TONES])
        np.testing.assert_allclose(heard.mean(1), 0.5, atol=0.13)
        together[kind] = np.corrcoef(heard) > 0.5
    for i, a in enumerate(KINDS):
        for b in KINDS[i + 1 :]:
            assert (together[a] != together[b]).any(), (a, b)
    for kind in KINDS:
        assert len(note(kind, 'impact')) < len(note(kind, 'appear')) == len(note(kind, 'vanish'))
        for what, way in (('appear', 1), ('vanish', -1)):
            spectrum = np.abs(np.fft.rfft(note(kind, what)[-1600:]))[
                : 80 if way > 0 else 60
            ]  # the last fifth of a second, the lowest tone alone
            assert way * (np.argmax(spectrum) * rate / 1600 - pitch) > 20, (kind, what)


# ---- pictures


def test_boxes_hold_the_object_and_are_tight():
    """The pixels that the subject changes, in scenes with and without it: inside its box, and touching all four sides."""
    config = Config(train=30, fps=4.0, size=96, camera_noise=0.0, distractors=0)
    checked = set()
    for n in range(16):
        for e in world.video(config, 'train', n):
            gone = dataclasses.replace(
                e, subject=dataclasses.replace(e.subject, radius=np.zeros_like(e.subject.radius))
            )
            changed = np.abs(drawing.scene(96, e) - drawing.scene(96, gone)).max(-1) > 24
            for mask, ((y0, x0, y1, x1), *_) in zip(changed, drawing.boxes(config, [e])):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                if not len(rows) or (y1 - y0) * 96 < 8:
                    continue
                found = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / 96
                assert np.abs(found - [y0, x0, y1, x1]).max() < 2.2 / 96, (
                    e.label,
                    found,
                    (y0, x0, y1, x1),
                )
                checked.add(e.label)
    assert len(checked) == len(CLASSES)


def test_boxes_of_all_objects_in_every_frame(worlds):
    config = Config(fps=8.0)
    for n in range(6):
        episodes = world.video(config, 'test', n)
        known = truth(config, episodes)['ground_truth']
        assert len(known['boxes']) == round(config.seconds * config.fps) and len(
            known['objects']
        ) == len(episodes)
        counts = [len(o) for o, e in zip(known['objects'], episodes) for _ in e.times]
        assert [len(row) for row in known['boxes']] == counts
        for row in known['boxes']:
            for y0, x0, y1, x1 in row:
                assert 0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1


def test_a_scene_moves_over_its_background_with_distractors(worlds):
    assert max(len(e.distractors) for _, _, es in worlds for e in es) == FINE.distractors
    assert all(x.kind != e.subject.kind for _, _, es in worlds for e in es for x in e.distractors)
    e = worlds[0][2][0]
    few = dataclasses.replace(e, times=e.times[::50])
    back = drawing.backdrop(48, few)
    assert back.shape == (len(few.times), 48, 48, 3) and np.abs(np.diff(back, axis=0)).mean() > 0.05


def test_sine_of_sum_is_its_definition():
    rows, columns = (np.random.default_rng(0).uniform(-9, 9, (3, n)) for n in (5, 7))
    got = drawing.sine_of_sum(rows, columns)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.sin(rows[:, :, None] + columns[:, None, :]), atol=1e-6)


# ---- words


def test_narrations_are_partly_about_now():
    """Several sentences a video, in order of time. Of the three nearest to a clip of two seconds about half tell of what it shows, some of
    another scene of its video, and some of nothing."""
    from data_pipelines.loading import sentence_windows

    config = Config(train=150)
    nouns = {word: kind for kind in KINDS for word in narration.NOUNS[kind]}
    about = []
    for n in range(config.train):
        episodes = world.video(config, 'train', n)
        said = narration.narrate(world.rng_of(config, 'train', n, 3), episodes)
        assert len(said) >= len(episodes) + 1 and [s['start'] for s in said] == sorted(
            s['start'] for s in said
        )
        for s in said:
            assert (
                0 <= s['start'] < s['end']
                and s['text'] == s['text'].lower()
                and s['text'].replace(' ', '').isalpha()
            )
        begin, end = (np.array([s[k] for s in said]) for k in ('start', 'end'))
        for e in episodes:
            for i in sentence_windows.candidates(begin, end, (e.begin + e.end) / 2 - 1, 2.0, 3):
                told = {
                    kind for noun, kind in nouns.items() if f' {noun} ' in f' {said[i]["text"]} '
                }
                if said[i]['text'] in narration.CHATTER:
                    about.append('nothing')
                elif told == {e.subject.kind}:
                    about.append('this')
                elif told:
                    about.append('another')
                    assert told <= {
                        x.subject.kind for x in episodes
                    }  # of the same video all the same
    share = {what: about.count(what) / len(about) for what in ('this', 'another', 'nothing')}
    assert (
        0.42 < share['this'] < 0.75
        and 0.1 < share['another'] < 0.35
        and 0.1 < share['nothing'] < 0.4
    ), share


def test_captions_name_what_is_to_be_seen(worlds):
    captions = {}
    for _, _, episodes in worlds:
        for e in episodes:
            text = narration.caption(e)
            assert (
                narration.NOUNS[e.subject.kind][0] in text
                and e.subject.color in text
                and narration.VERBS[e.event][0] in text
            )
            captions.setdefault(text, set()).add(
                (e.label, e.subject.color, e.subject.texture, e.subject.size)
            )
    assert all(len(looks) == 1 for looks in captions.values())  # one caption, one meaning


# ---- files


def test_mp4_files_are_h264_and_aac(made):
    import av

    path, _ = made
    files = sorted(
        p.relative_to(path / 'media').as_posix() for p in (path / 'media').rglob('*') if p.is_file()
    )
    assert files == [
        f'{s}/{n:06d}.mp4' for s in ('test', 'train', 'validation') for n in range(SMALL[s])
    ]
    with av.open(str(path / 'media' / files[0])) as file:
        picture, heard = file.streams.video[0], file.streams.audio[0]
        assert (picture.codec_context.name, heard.codec_context.name) == ('h264', 'aac')
        assert (picture.width, picture.height, float(picture.average_rate), heard.rate) == (
            48,
            48,
            8.0,
            8000,
        )
        assert abs(file.duration / 1e6 - SMALL['seconds']) < 0.2


def records_of(records, split):
    import tensorflow_datasets as tfds

    return {
        r['id'].decode(): r for r in tfds.builder_from_directory(str(records)).as_data_source(split)
    }


def test_records_hold_pictures_sound_words_and_truth(made):
    """What tfds alone reads back: the rendered frames and sound within what JPEG, H.264 and AAC lose, and the truth unchanged."""
    import io

    from PIL import Image

    path, records = made
    config = Config(**SMALL)
    captions = json.loads((path / 'captions.json').read_text())
    for split in SPLITS:
        found = records_of(records, split)
        assert sorted(found) == [f'{split}/{n:06d}.mp4' for n in range(SMALL[split])]
        for n in range(SMALL[split]):
            name, episodes = f'{split}/{n:06d}.mp4', world.video(config, split, n)
            r, known = found[name], truth(config, episodes)
            assert json.loads(r['ground_truth']) == json.loads(json.dumps(known['ground_truth']))
            np.testing.assert_allclose(
                r['segment_start'], [s['start'] for s in known['segments']], atol=1e-3
            )
            assert [t.decode() for t in r['segment_caption']] == [
                narration.caption(e) for e in episodes
            ]
            names = {
                'class': CLASSES,
                'event': EVENTS,
                'object': KINDS,
                'color': list(COLORS),
                'size': list(world.SIZES),
            }
            told = {
                label: [values[i] for i in r['segment_labels'][label]]
                for label, values in names.items()
            }
            looks = [e.subject for e in episodes]
            assert told == {
                'class': [f'{e.event} {e.subject.kind}' for e in episodes],
                'event': [e.event for e in episodes],
                'object': [x.kind for x in looks],
                'color': [x.color for x in looks],
                'size': [x.size for x in looks],
            }
            assert [t.decode() for t in r['caption_text']] == [
                s['text'] for s in captions[name] if s['start'] < SMALL['seconds']
            ]
    frames, audio = content(config, 'test', 1)
    r = records_of(records, 'test')['test/000001.mp4']
    seen = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in r['frames']]).astype(float)
    assert seen.shape == frames.shape and np.abs(seen - frames).mean() < 8
    heard = np.frombuffer(r['audio'], '<i2').astype(float)
    assert len(heard) == len(audio) and np.corrcoef(heard, audio)[0, 1] > 0.9


def test_the_pipeline_reads_it(made):
    import data_pipelines
    from configs import demo

    config = demo.get_config()
    config.data.train.playground.path = str(made[1])
    config.model.inputs.video.size = 24
    data = data_pipelines.open(config)
    batch = next(iter(data.one_pass('test', 4)))
    assert (
        data.info['labels']['class'] == list(CLASSES)
        and data.size('test', 'segments') == SMALL['test'] * SMALL['episodes']
    )
    assert batch['valid'].all() and all(
        batch[s]['valid'].all() for s in ('video', 'audio', 'text', 'text.caption')
    )
    assert batch['labels']['class'].tolist() == [
        CLASSES.index(e.label) for n in range(2) for e in world.video(Config(**SMALL), 'test', n)
    ]
    data.close()


def test_rendering_goes_on_where_it_was_stopped(tmp_path):
    """One file gone, another half-written under its temporary name: the rest is untouched, and all bytes are as in one go."""
    fields = {**SMALL, 'train': 2, 'validation': 1, 'test': 1, 'size': 32}
    config, out = Config(**fields), tmp_path / 'p'
    render(config, out, processes=1, quiet=True)
    files = sorted((out / 'media').rglob('*.mp4'))
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}
    words = (out / 'captions.json').read_bytes(), (out / 'annotations.json').read_bytes()
    gone = path_of(out, 'train', 1)
    gone.with_suffix('.tmp.mp4').write_bytes(before[gone][0][:100])
    gone.unlink()
    (out / 'captions.json').unlink()
    render(config, out, processes=1, quiet=True)
    assert sorted((out / 'media').rglob('*.mp4')) == files and all(
        f.read_bytes() == before[f][0] for f in files
    )
    assert [f for f in files if f.stat().st_mtime_ns != before[f][1]] == [gone]
    assert words == ((out / 'captions.json').read_bytes(), (out / 'annotations.json').read_bytes())


def test_what_is_there_is_kept_and_another_world_refused(made):
    path, records = made
    before = {p: p.stat().st_mtime_ns for p in path.rglob('*')}
    assert playground.make(path, processes=1, quiet=True, **SMALL) == records
    with pytest.raises(
        DataError, match=r'holds a playground with seed=3, got 4; name another path'
    ):
        playground.make(path, processes=1, quiet=True, **{**SMALL, 'seed': 4})
    assert {p: p.stat().st_mtime_ns for p in path.rglob('*')} == before


def test_killed_just_before_the_records_were_finished(made, tmp_path):
    """Everything is there but the file that says so, which is written last: the same call finishes it."""
    shutil.copytree(made[0], tmp_path / 'small')
    done = tmp_path / 'small' / 'records' / 'prepare.json'
    done.unlink()
    (done.parent / '.staging').mkdir()
    assert playground.make(tmp_path / 'small', processes=1, quiet=True, **SMALL) == done.parent
    assert done.exists()


@pytest.mark.parametrize(
    'fields, sentence',
    [
        (
            {'lenght': 3},
            r"the playground has no field 'lenght' \(=3\); it has camera_noise, distractors",
        ),
        ({'train': 0}, 'playground train: expected a positive number, got 0'),
        ({'fps': 0.0}, 'playground fps: expected a positive number, got 0.0'),
        ({'fps': 1.0}, 'fewer than 4 pictures'),
        ({'rate': -8000}, 'playground rate: expected a positive number, got -8000'),
        ({'size': 63}, 'playground size: expected an even number, as H.264 needs one, got 63'),
        ({'size': 64.0}, 'playground size: expected int, such as 64, got 64.0'),
        ({'seconds': 'long'}, "playground seconds: expected float, such as 8.0, got 'long'"),
        (
            {'seconds': 4.0},
            r'3 episodes in seconds=4.0 leave less than 1.5 s each; try seconds=4.5',
        ),
        ({'held_out': 0.7}, 'playground held_out: expected a share from 0 to 0.5'),
        ({'distractors': -1}, 'playground distractors: expected 0 or more, got -1'),
        ({'camera_noise': -0.1}, 'playground camera_noise: expected 0 or more, got -0.1'),
    ],
)
def test_config_mistakes_are_sentences(tmp_path, fields, sentence):
    with pytest.raises(DataError, match=sentence):
        playground.make(tmp_path / 'p', **fields)
    assert not (tmp_path / 'p').exists()


def test_the_command(made, monkeypatch, capsys):
    path, records = made
    words = [
        'playground',
        f'--out={path}',
        '--processes=1',
        '--quiet',
        *(f'--{k}={v}' for k, v in SMALL.items()),
    ]
    monkeypatch.setattr(sys, 'argv', words)
    assert command.main() == 0 and capsys.readouterr().out.strip() == str(records)
    monkeypatch.setattr(sys, 'argv', [*words, '--size=31'])
    assert command.main() == 2
    assert (
        capsys.readouterr().err
        == 'error: playground size: expected an even number, as H.264 needs one, got 31\n'
    )
