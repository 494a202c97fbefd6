"""What is seen, heard and said in a playground belongs together; the truth beside it is true."""

import dataclasses
import io
import json
import shutil
import sys

import chex
import numpy as np
import pytest
from batches import assert_contract
from PIL import Image

import data_pipelines
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
from data_pipelines.loading import sentence_windows
from tests import typecheck

# The same world, looked at closely.
FINE = Config(train=48, validation=16, test=48, fps=200.0, camera_noise=0.0, sound_noise=0.0)
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
def videos():
    """{(split, number): episodes} at 200 pictures a second."""
    episodes = {}
    for split in SPLITS:
        for number in range(getattr(FINE, split)):
            episodes[split, number] = world.video(FINE, split, number)
    return episodes


def episodes_of(videos, *splits):
    """All episodes of the videos of these splits (of every split if none is given)."""
    found = []
    for (split, _), episodes in videos.items():
        if not splits or split in splits:
            found += episodes
    return found


@pytest.fixture(scope='module')
def small_playground(tmp_path_factory):
    """(folder, folder of its records)."""
    path = tmp_path_factory.mktemp('playground') / 'small'
    return path, playground.make(path, processes=1, quiet=True, **SMALL)


# ---- the world


def narration_of(config, split, number):
    """The timed sentences of one video."""
    rng = world.rng_of(config, split, number, 3)
    return narration.narrate(rng, world.video(config, split, number))


def test_everything_follows_from_the_seed():
    config = Config(**SMALL)
    frames, audio = content(config, 'train', 1)
    chex.assert_shape(frames, (36, 48, 48, 3))
    chex.assert_shape(audio, (36000,))
    chex.assert_type([frames, audio], [np.uint8, np.int16])
    chex.assert_trees_all_equal(content(Config(**SMALL), 'train', 1), (frames, audio))
    said = narration_of(config, 'train', 1)
    assert narration_of(config, 'train', 1) == said

    another_seed = dataclasses.replace(config, seed=4)
    for other in ((another_seed, 'train', 1), (config, 'train', 2), (config, 'test', 1)):
        other_frames, other_audio = content(*other)
        assert not np.array_equal(other_frames, frames)
        assert not np.array_equal(other_audio, audio)
        assert narration_of(*other) != said


def test_a_larger_set_begins_with_the_smaller_one():
    config = Config(**SMALL)
    larger = dataclasses.replace(config, train=50, test=9)
    chex.assert_trees_all_equal(content(larger, 'train', 1), content(config, 'train', 1))


def test_classes_are_every_event_of_every_object_in_balance(videos):
    expected = set()
    for event in EVENTS:
        expected |= {f'{event} {kind}' for kind in KINDS}
    assert set(CLASSES) == expected
    assert len(CLASSES) == len(EVENTS) * len(KINDS) >= 12
    for split in SPLITS:
        labels = [episode.label for episode in episodes_of(videos, split)]
        counts = np.array([labels.count(name) for name in CLASSES])
        assert counts.sum() == getattr(FINE, split) * FINE.episodes, split
        assert np.ptp(counts) <= 1, split


def assert_nothing_is_held_out_whole(pairs):
    """Every colour and every kind is left in some pair."""
    for color in COLORS:
        assert sum((color, kind) in pairs for kind in KINDS) < len(KINDS)
    for kind in KINDS:
        assert sum((color, kind) in pairs for color in COLORS) < len(COLORS)


def test_held_out_pairs_are_in_the_test_split_alone(videos):
    held_out = world.held_out_pairs(FINE)
    assert len(held_out) == round(FINE.held_out * len(COLORS) * len(KINDS)) > 0
    assert_nothing_is_held_out_whole(held_out)
    shown = set()
    for episode in episodes_of(videos, 'train', 'validation'):
        for thing in (episode.subject, *episode.distractors):
            shown.add((thing.color, thing.kind))
    assert not held_out & shown

    # Seen and unseen pairs side by side.
    subjects = [episode.subject for episode in episodes_of(videos, 'test')]
    share = np.mean([(thing.color, thing.kind) in held_out for thing in subjects])
    assert 0.4 * FINE.held_out < share < 2 * FINE.held_out


def test_the_share_and_the_seed_choose_the_held_out_pairs():
    assert not world.held_out_pairs(dataclasses.replace(FINE, held_out=0.0))
    another_seed = dataclasses.replace(FINE, seed=1)
    assert world.held_out_pairs(another_seed) != world.held_out_pairs(FINE)
    half = world.held_out_pairs(dataclasses.replace(FINE, held_out=0.5))
    assert len(half) == len(COLORS) * len(KINDS) // 2
    assert_nothing_is_held_out_whole(half)


def test_scenes_fill_the_video_and_events_lie_inside_their_scene(videos):
    for episodes in videos.values():
        assert episodes[0].begin == 0
        assert episodes[-1].end == FINE.seconds
        for episode, following in zip(episodes, episodes[1:]):
            assert episode.end == following.begin
            assert following.end - following.begin > 1
        num_frames = sum(len(episode.times) for episode in episodes)
        assert num_frames == round(FINE.seconds * FINE.fps)

        expected = []
        for episode in episodes:
            assert episode.sounds
            for time, name, _ in episode.sounds:
                assert time < episode.end
                expected.append((max(time, episode.begin), name, episode.subject.kind))
        events = truth(FINE, episodes)['ground_truth']['events']
        assert all(0 <= event['time'] < FINE.seconds for event in events)
        assert [(event['sound'], event['object']) for event in events] == [
            (name, kind) for _, name, kind in expected
        ]
        np.testing.assert_allclose(
            [event['time'] for event in events], [time for time, _, _ in expected], atol=1e-4
        )


def test_impacts_are_heard_when_they_are_seen(videos):
    """At each impact the thing is at an edge and turns round; and each turn there has its impact.

    The edge is the floor for what bounces, and a post for what collides.
    """
    num_checked = 0
    for episode in episodes_of(videos):
        if episode.event not in ('bounce', 'collide'):
            continue
        subject, times = episode.subject, episode.times
        reach_y, reach_x = subject.radius[0] * np.array(world.REACH[subject.kind])
        if episode.event == 'bounce':
            position = subject.center[:, 0]
            edges = [FLOOR - reach_y]
        else:
            position = subject.center[:, 1]
            edges = [LEFT + reach_x, RIGHT - reach_x]
        distance = np.min([np.abs(position - edge) for edge in edges], axis=0)  # [T]
        speed = np.diff(position)
        impacts = []
        for time, name, _ in episode.sounds:
            assert name == 'impact'
            impacts.append(time)
        for time in impacts:
            i = np.searchsorted(times, time)
            if not 3 <= i < len(times) - 3:
                continue
            assert distance[i] < 0.02, (episode.label, time)
            assert speed[i - 3] * speed[i + 1] < 0, (episode.label, time)
            num_checked += 1
        for i in range(1, len(speed)):
            turns = speed[i - 1] * speed[i] < 0
            if turns and distance[i] < 0.01:
                delay = np.abs(times[i + 1] - np.array(impacts)).min()
                assert delay < 0.02, (episode.label, times[i + 1])
    assert num_checked > 100


def test_appearing_and_vanishing_are_heard_when_they_are_seen(videos):
    """From its sound on, a thing grows from nothing or shrinks from its full size.

    The one appears, the other vanishes. Between sounds it stays.
    """
    num_checked = 0
    for episode in episodes_of(videos):
        if episode.event not in ('appear', 'vanish'):
            continue
        direction = 1 if episode.event == 'appear' else -1
        radius, times = episode.subject.radius, episode.times
        for time, name, _ in episode.sounds:
            assert name == episode.event
            i = np.searchsorted(times, time)
            later = np.searchsorted(times, time + 0.5 * world.GLIDE)
            if i < 1 or later >= len(times) or times[i - 1] < episode.begin:
                continue
            change = radius[later] - radius[i]
            assert direction * change > 0.3 * radius.max(), (episode.label, time)
            num_checked += 1
        is_moving = np.sign(np.diff(radius)) == direction
        sound_times = np.array([time for time, _, _ in episode.sounds])
        for i in range(1, len(is_moving)):
            begins = is_moving[i] and not is_moving[i - 1]
            # What begins at the very end of a scene is cut off before it is heard.
            if begins and times[i] <= episode.end - 0.15:
                assert np.abs(times[i] - sound_times).min() < 0.03, (episode.label, times[i])
    assert num_checked > 100


# ---- sound


def loudness(wave, rate, begin, end):
    """Root mean square of a part of a wave given in seconds; 0 where there is none."""
    part = wave[max(0, round(begin * rate)) : max(0, round(end * rate))].astype(np.float64)
    if not len(part):
        return 0.0
    return np.sqrt(((part / 32768) ** 2).mean())


def rise(wave, rate, time):
    """How many times louder a wave is just after this time than just before it."""
    before = loudness(wave, rate, time - 0.1, time)
    return loudness(wave, rate, time, time + 0.1) / max(1e-4, before)


def test_sounds_are_audible_at_their_instants(videos):
    """Energy rises at events and falls between them, scene by scene.

    A scene is silent before its first sound and outside its time.
    """
    rate = FINE.rate
    rises_at_events, rises_between = [], []
    for (split, number), episodes in list(videos.items())[:40]:
        for episode in episodes:
            wave = sound.waveform(FINE, [episode], world.rng_of(FINE, split, number, 2))
            chex.assert_shape(wave, (round(FINE.seconds * rate),))
            chex.assert_type(wave, np.int16)
            first_sample = round(episode.begin * rate)
            assert not wave[:first_sample].any()
            assert not wave[round(episode.end * rate) :].any()

            times = []
            for time, _, _ in episode.sounds:
                if episode.end - time > 0.15:
                    times.append(max(time, episode.begin))
            times.sort()
            if times:
                first_sound = max(0, round(times[0] * rate) - 1)
                assert not wave[first_sample:first_sound].any()
                assert loudness(wave, rate, times[0], times[0] + 0.15) > 0.03
            for time in times:
                rises_at_events.append(rise(wave, rate, time))
            for time, following in zip(times, times[1:]):
                if following - time > 0.3:
                    rises_between.append(rise(wave, rate, (time + following) / 2))
    assert np.mean(np.array(rises_at_events) > 1.3) > 0.95
    assert np.mean(np.array(rises_between) > 1.3) < 0.3


NOTE_RATE, PITCH = 8000, 280.0


def note(kind, event):
    """The sound of one event, always of the same pitch and phases."""
    return sound.note(NOTE_RATE, kind, event, PITCH, np.random.default_rng(0))


def tone_strength(wave, frequency, length=320, step=80):
    """[S / step]: amplitude of one tone in a wave, by a sliding product with it."""
    times = np.arange(length) / NOTE_RATE
    window = np.hanning(length)
    probe = np.exp(-2j * np.pi * frequency * times) * window
    products = []
    for begin in range(0, len(wave) - length + 1, step):
        products.append(wave[begin : begin + length] @ probe)
    return np.abs(products) / (window.sum() / 2)


def test_each_kind_has_its_timbre():
    """The same four tones, equally strong over a note, but others at a time."""
    heard_together = {}
    for kind in KINDS:
        wave = note(kind, 'impact')
        strengths = np.stack([tone_strength(wave, PITCH * tone) for tone in sound.TONES])
        np.testing.assert_allclose(strengths.mean(1), 0.5, atol=0.13)
        heard_together[kind] = np.corrcoef(strengths) > 0.5
    for i, kind in enumerate(KINDS):
        for other in KINDS[i + 1 :]:
            assert (heard_together[kind] != heard_together[other]).any(), (kind, other)


@pytest.mark.parametrize('kind', KINDS)
def test_each_event_has_its_sound(kind):
    """Appearing bends upwards, vanishing downwards; an impact is over sooner."""
    assert len(note(kind, 'impact')) < len(note(kind, 'appear')) == len(note(kind, 'vanish'))
    # In the last fifth of a second, among the bins around the lowest tone alone.
    for event, direction, num_bins in (('appear', 1, 80), ('vanish', -1, 60)):
        spectrum = np.abs(np.fft.rfft(note(kind, event)[-1600:]))[:num_bins]
        strongest = np.argmax(spectrum) * NOTE_RATE / 1600
        assert direction * (strongest - PITCH) > 20, event


# ---- pictures


def test_boxes_hold_the_object_and_are_tight():
    """The pixels that the subject changes lie inside its box and touch all four sides."""
    size = 96
    config = Config(train=30, fps=4.0, size=size, camera_noise=0.0, distractors=0)
    checked = set()
    for number in range(16):
        for episode in world.video(config, 'train', number):
            no_radius = np.zeros_like(episode.subject.radius)
            invisible = dataclasses.replace(episode.subject, radius=no_radius)
            empty = dataclasses.replace(episode, subject=invisible)
            difference = np.abs(drawing.scene(size, episode) - drawing.scene(size, empty))
            is_changed = difference.max(-1) > 24  # [T H W]
            boxes = drawing.boxes(config, [episode])
            for mask, (box, *_) in zip(is_changed, boxes):
                y0, _, y1, _ = box
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                if not len(rows) or (y1 - y0) * size < 8:
                    continue
                found = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / size
                error = np.abs(found - box).max()
                assert error < 2.2 / size, (episode.label, found, box)
                checked.add(episode.label)
    assert len(checked) == len(CLASSES)


def test_boxes_of_all_objects_in_every_frame():
    config = Config(fps=8.0)
    for number in range(6):
        episodes = world.video(config, 'test', number)
        ground_truth = truth(config, episodes)['ground_truth']
        assert len(ground_truth['objects']) == len(episodes)
        expected_counts = []
        for objects, episode in zip(ground_truth['objects'], episodes):
            expected_counts += [len(objects)] * len(episode.times)
        boxes_by_frame = ground_truth['boxes']
        assert len(boxes_by_frame) == round(config.seconds * config.fps)
        assert [len(boxes) for boxes in boxes_by_frame] == expected_counts
        boxes = np.concatenate(boxes_by_frame)
        chex.assert_shape(boxes, (sum(expected_counts), 4))
        assert (boxes >= 0).all()
        assert (boxes <= 1).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_in_a_long_scene_things_may_leave_the_frame():
    """Half a minute: more than one object drifts off by more than the margin around the frame."""
    config = Config(train=12, seconds=30.0, episodes=1, fps=2.0, camera_noise=0.0)
    num_gone = 0
    for number in range(12):
        (episode,) = world.video(config, 'train', number)
        subject, size = episode.subject, config.size
        pixels = drawing.scene(size, episode)
        without = drawing.scene(size, dataclasses.replace(episode, subject=hidden(subject)))
        is_seen = (pixels != without).any((1, 2, 3))
        boxes = [box for box, *_ in drawing.boxes(config, [episode])]
        # No shape goes further than this from its centre.
        reach = drawing.FURTHEST * subject.radius[:, None]
        is_outside = ((subject.center < -reach) | (subject.center > 1 + reach)).any(1)
        assert not is_seen[is_outside].any()
        assert not np.array(boxes)[is_outside].any()
        num_gone += (
            (subject.center < -drawing.MARGIN) | (subject.center > 1 + drawing.MARGIN)
        ).any()
    assert num_gone > 1


def hidden(thing):
    """The thing, too small to be shown."""
    return dataclasses.replace(thing, radius=np.zeros_like(thing.radius))


def test_a_scene_has_distractors_of_other_kinds(videos):
    counts = []
    for episode in episodes_of(videos):
        counts.append(len(episode.distractors))
        assert all(thing.kind != episode.subject.kind for thing in episode.distractors)
    assert max(counts) == FINE.distractors


def test_a_scene_moves_over_its_background(videos):
    episode = videos['train', 0][0]
    few_frames = dataclasses.replace(episode, times=episode.times[::50])
    backdrop = drawing.backdrop(48, few_frames)
    chex.assert_shape(backdrop, (len(few_frames.times), 48, 48, 3))
    assert np.abs(np.diff(backdrop, axis=0)).mean() > 0.05


def test_sine_of_sum_is_its_definition():
    """sin(a_i + b_j) for every pair (i, j)."""
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(-9, 9, (3, 5)), rng.uniform(-9, 9, (3, 7))
    got = drawing.sine_of_sum(rows, columns)
    chex.assert_type(got, np.float32)
    expected = np.sin(rows[:, :, None] + columns[:, None, :])
    chex.assert_equal_shape([got, expected])
    np.testing.assert_allclose(got, expected, atol=1e-6)


# ---- words


def kinds_named(text):
    """The kinds of which a sentence says a noun."""
    kinds = set()
    for kind in KINDS:
        if any(f' {noun} ' in f' {text} ' for noun in narration.NOUNS[kind]):
            kinds.add(kind)
    return kinds


def test_narrations_are_partly_about_now():
    """Several sentences a video, in order of time.

    Of the three nearest to a clip of two seconds about half are about what it shows, some about
    another scene of its video, and some about nothing.
    """
    config = Config(train=150)
    about = []
    for number in range(config.train):
        episodes = world.video(config, 'train', number)
        sentences = narration_of(config, 'train', number)
        assert len(sentences) >= len(episodes) + 1
        begin = np.array([sentence['start'] for sentence in sentences])
        end = np.array([sentence['end'] for sentence in sentences])
        assert (np.diff(begin) >= 0).all()
        assert (begin >= 0).all()
        assert (begin < end).all()
        for sentence in sentences:
            assert sentence['text'] == sentence['text'].lower()
            assert sentence['text'].replace(' ', '').isalpha()

        kinds_in_video = {episode.subject.kind for episode in episodes}
        for episode in episodes:
            clip_begin = (episode.begin + episode.end) / 2 - 1
            for i in sentence_windows.candidates(begin, end, clip_begin, 2.0, 3):
                text = sentences[i]['text']
                kinds = kinds_named(text)
                if text in narration.CHATTER:
                    about.append('nothing')
                elif kinds == {episode.subject.kind}:
                    about.append('this')
                elif kinds:
                    about.append('another')
                    assert kinds <= kinds_in_video
    share = {subject: about.count(subject) / len(about) for subject in set(about)}
    assert 0.42 < share['this'] < 0.75, share
    assert 0.1 < share['another'] < 0.35, share
    assert 0.1 < share['nothing'] < 0.4, share


def test_captions_name_what_is_to_be_seen(videos):
    looks_of_caption = {}
    for episode in episodes_of(videos):
        subject = episode.subject
        caption = narration.caption(episode)
        assert narration.NOUNS[subject.kind][0] in caption
        assert subject.color in caption
        assert narration.VERBS[episode.event][0] in caption
        look = (episode.label, subject.color, subject.texture, subject.size)
        looks_of_caption.setdefault(caption, set()).add(look)
    # One caption, one meaning.
    assert all(len(looks) == 1 for looks in looks_of_caption.values())


# ---- files


def test_mp4_files_are_h264_and_aac(small_playground):
    import av

    media_folder = small_playground[0] / 'media'
    files = [path for path in media_folder.rglob('*') if path.is_file()]
    expected = []
    for split in SPLITS:
        expected += [media_folder / split / f'{n:06d}.mp4' for n in range(SMALL[split])]
    assert sorted(files) == sorted(expected)
    with av.open(str(media_folder / 'test' / '000000.mp4')) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert video.codec_context.name == 'h264'
        assert audio.codec_context.name == 'aac'
        assert (video.width, video.height) == (48, 48)
        assert float(video.average_rate) == 8.0
        assert audio.rate == 8000
        assert abs(file.duration / 1e6 - SMALL['seconds']) < 0.2


def records_of(records, split):
    """{id: record} of a split, as tfds alone reads them."""
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(records)).as_data_source(split)
    return {record['id'].decode(): record for record in source}


def check_truth(record, known, episodes, captions):
    """A record holds the truth and the captions of its video unchanged."""
    assert json.loads(record['ground_truth']) == json.loads(json.dumps(known['ground_truth']))
    starts = [segment['start'] for segment in known['segments']]
    np.testing.assert_allclose(record['segment_start'], starts, atol=1e-3)
    segment_captions = [text.decode() for text in record['segment_caption']]
    assert segment_captions == [narration.caption(episode) for episode in episodes]
    sentences = [text.decode() for text in record['caption_text']]
    assert sentences == [said['text'] for said in captions if said['start'] < SMALL['seconds']]

    class_names = {
        'class': CLASSES,
        'event': EVENTS,
        'object': KINDS,
        'color': list(COLORS),
        'size': list(world.SIZES),
    }
    labels = {}
    for label, names in class_names.items():
        labels[label] = [names[i] for i in record['segment_labels'][label]]
    subjects = [episode.subject for episode in episodes]
    assert labels == {
        'class': [f'{episode.event} {episode.subject.kind}' for episode in episodes],
        'event': [episode.event for episode in episodes],
        'object': [subject.kind for subject in subjects],
        'color': [subject.color for subject in subjects],
        'size': [subject.size for subject in subjects],
    }


@pytest.mark.parametrize('split', SPLITS)
def test_records_hold_words_and_truth(small_playground, split):
    path, records = small_playground
    config = Config(**SMALL)
    captions = json.loads((path / 'captions.json').read_text())
    found = records_of(records, split)
    names = [f'{split}/{number:06d}.mp4' for number in range(SMALL[split])]
    assert sorted(found) == names
    for number, name in enumerate(names):
        episodes = world.video(config, split, number)
        check_truth(found[name], truth(config, episodes), episodes, captions[name])


def test_records_hold_pictures_and_sound(small_playground):
    """The rendered frames and sound, within what JPEG, H.264 and AAC lose."""
    _, records = small_playground
    frames, audio = content(Config(**SMALL), 'test', 1)
    record = records_of(records, 'test')['test/000001.mp4']
    seen = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in record['frames']])
    chex.assert_equal_shape([seen, frames])
    assert np.abs(seen.astype(float) - frames).mean() < 8
    heard = np.frombuffer(record['audio'], '<i2').astype(float)
    chex.assert_equal_shape([heard, audio])
    assert np.corrcoef(heard, audio)[0, 1] > 0.9


def test_the_pipeline_reads_it(small_playground):
    from configs import demo

    config = demo.get_config()
    config.data.train.playground.path = str(small_playground[1])
    config.model.inputs.video.size = 24
    data = data_pipelines.open(config)
    batch = next(iter(data.one_pass('test', 4)))
    assert data.info['labels']['class'] == list(CLASSES)
    assert data.size('test', 'segments') == SMALL['test'] * SMALL['episodes']
    label_classes = dict.fromkeys(data.info['labels'])
    # The device crops and resizes: on the host frames are as large as they are stored.
    assert_contract(batch, config, 4, ['text.caption'], label_classes, frame_size=48)
    assert batch['valid'].all()
    for stream in ('video', 'audio', 'text', 'text.caption'):
        assert batch[stream]['valid'].all(), stream
    expected = []
    for number in range(2):
        for episode in world.video(Config(**SMALL), 'test', number):
            expected.append(CLASSES.index(episode.label))
    assert batch['labels']['class'].tolist() == expected
    data.close()


def test_rendering_goes_on_where_it_was_stopped(tmp_path):
    """One file gone, another half-written under its temporary name.

    The rest is untouched, and all bytes are as in one go.
    """
    fields = {**SMALL, 'train': 2, 'validation': 1, 'test': 1, 'size': 32}
    config, out = Config(**fields), tmp_path / 'p'
    render(config, out, processes=1, quiet=True)
    files = sorted((out / 'media').rglob('*.mp4'))
    bytes_before = {file: file.read_bytes() for file in files}
    times_before = {file: file.stat().st_mtime_ns for file in files}
    words = ['captions.json', 'annotations.json']
    words_before = [(out / name).read_bytes() for name in words]

    gone = path_of(out, 'train', 1)
    gone.with_suffix('.tmp.mp4').write_bytes(bytes_before[gone][:100])
    gone.unlink()
    (out / 'captions.json').unlink()
    render(config, out, processes=1, quiet=True)
    assert sorted((out / 'media').rglob('*.mp4')) == files
    assert {file: file.read_bytes() for file in files} == bytes_before
    rewritten = [file for file in files if file.stat().st_mtime_ns != times_before[file]]
    assert rewritten == [gone]
    assert [(out / name).read_bytes() for name in words] == words_before


def test_what_is_there_stays_and_another_world_is_refused(small_playground):
    path, records = small_playground
    before = {file: file.stat().st_mtime_ns for file in path.rglob('*')}
    assert playground.make(path, processes=1, quiet=True, **SMALL) == records
    message = r'holds a playground with seed=3, got 4; name another path'
    with pytest.raises(DataError, match=message):
        playground.make(path, processes=1, quiet=True, **{**SMALL, 'seed': 4})
    assert {file: file.stat().st_mtime_ns for file in path.rglob('*')} == before


def test_optical_flow_is_prepared_where_it_is_asked_for(small_playground, tmp_path):
    def features_of(records):
        return set(json.loads((records / 'features.json').read_text())['featuresDict']['features'])

    fields = {**SMALL, 'train': 1, 'validation': 1, 'test': 1, 'flow': 'dis'}
    with_flow = playground.make(tmp_path / 'f', processes=1, quiet=True, **fields)
    assert features_of(with_flow) - features_of(small_playground[1]) == {'flow'}


def test_killed_just_before_the_records_were_finished(small_playground, tmp_path):
    """Everything is there but the file that says so, which is written last."""
    shutil.copytree(small_playground[0], tmp_path / 'small')
    records = tmp_path / 'small' / 'records'
    (records / 'prepare.json').unlink()
    (records / '.staging').mkdir()
    assert playground.make(tmp_path / 'small', processes=1, quiet=True, **SMALL) == records
    assert (records / 'prepare.json').exists()


@pytest.mark.parametrize(
    'fields, message',
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
        ({'flow': 'disc'}, r"flow='disc': choose one of dis, tvl1"),
    ],
)
def test_config_mistakes_are_sentences(tmp_path, fields, message):
    with typecheck.off(), pytest.raises(DataError, match=message):
        playground.make(tmp_path / 'p', **fields)
    assert not (tmp_path / 'p').exists()


def test_the_command(small_playground, monkeypatch, capsys):
    path, records = small_playground
    fields = [f'--{name}={value}' for name, value in SMALL.items()]
    arguments = ['playground', f'--out={path}', '--processes=1', '--quiet', *fields]
    monkeypatch.setattr(sys, 'argv', arguments)
    assert command.main() == 0
    assert capsys.readouterr().out.strip() == str(records)
    monkeypatch.setattr(sys, 'argv', [*arguments, '--size=31'])
    assert command.main() == 2
    message = 'playground size: expected an even number, as H.264 needs one, got 31'
    assert capsys.readouterr().err == f'error: {message}\n'
