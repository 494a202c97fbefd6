"""True boxes of several objects, silent ones too, and the worlds that ask for none of it."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines import DataError
from data_pipelines.datasets import playground
from data_pipelines.datasets.playground import boxes, drawing, world
from data_pipelines.datasets.playground.render import truth, write
from data_pipelines.datasets.playground.world import Config

SMALL = {'train': 3, 'validation': 1, 'test': 1, 'seconds': 3.0, 'episodes': 1, 'size': 48}
# Sums over the first video, of the code before.
PLAIN_SUM, PLAIN_BACKGROUND = 29.13510001503405, -3.341720874445723
BOXES = Config(**SMALL, silent=2, pictures=2, distractors=0, camera_noise=0.0)


@pytest.fixture(scope='module')
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp('boxes')
    (out / 'media' / 'train').mkdir(parents=True)
    for number in range(BOXES.train):
        write(BOXES, out, ('train', number))
    boxes.write(BOXES, out, 'train')
    return out


def test_pictures_and_boxes_are_a_coco_file(rendered):
    found = json.loads((rendered / 'boxes_train.json').read_text())
    assert [category['name'] for category in found['categories']] == list(world.KINDS)
    assert len(found['images']) == 3 * 2
    assert {a['image_id'] for a in found['annotations']} <= {i['id'] for i in found['images']}
    for image in found['images']:
        assert set(image) == {'id', 'file_name', 'width', 'height', 'video', 'frame', 'time'}
        assert image['time'] == image['frame'] / BOXES.fps
        pixels = np.asarray(Image.open(rendered / 'images' / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (48, 48, 3)
    for annotation in found['annotations']:
        x, y, width, height = annotation['bbox']
        assert min(x, y) >= 0 < min(width, height)
        assert max(x + width, y + height) <= 48.001
        np.testing.assert_allclose(annotation['area'], width * height, atol=1e-3)
        assert annotation['iscrowd'] == 0
    assert len({annotation['id'] for annotation in found['annotations']}) == len(
        found['annotations']
    )


def test_boxes_hold_the_silent_objects(rendered):
    """The pixels that a silent object changes lie in its box, where nothing is in front of it."""
    (episode,) = world.video(BOXES, 'train', 0)
    thing = episode.bystanders[0]
    alone = dataclasses.replace(episode, subject=_hidden(episode.subject), bystanders=[thing])
    empty = dataclasses.replace(alone, bystanders=[])
    changed = np.abs(drawing.scene(48, alone) - drawing.scene(48, empty)).max(-1) > 24
    for mask, tight in zip(changed, drawing.boxes(BOXES, [alone]), strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / 48
        assert np.abs(found - tight[1]).max() < 2.2 / 48


def _hidden(thing):
    return dataclasses.replace(thing, radius=np.zeros_like(thing.radius))


def test_only_the_subject_sounds_and_only_around_its_events():
    (episode,) = world.video(BOXES, 'train', 0)
    episode = dataclasses.replace(
        episode,
        begin=0.0,
        end=3.0,
        sounds=[(1.0, 'impact', 1.0)],
        times=np.array([0.0, 0.49, 0.51, 1.2, 1.8, 1.83, 2.5]),
    )
    num_silent = len(episode.bystanders)
    assert num_silent
    # An impact is heard for 0.32 seconds.
    expected = [False, False, True, True, True, False, False]
    assert boxes.sounding([episode]) == [[heard, *[False] * num_silent] for heard in expected]


def test_mute_kinds_are_seen_and_never_heard():
    config = Config(**{**SMALL, 'train': 16}, mute='disc, pole')
    heard = set()
    for number in range(16):
        (episode,) = world.video(config, 'train', number)
        assert bool(episode.sounds) == (episode.subject.kind not in ('disc', 'pole'))
        ground_truth = truth(config, [episode])['ground_truth']
        heard |= {event['object'] for event in ground_truth['events']}
        assert len(ground_truth['sounds']) == len(ground_truth['boxes']) == 24
    assert heard == {'ring', 'plank'}


def test_worlds_that_ask_for_none_of_it_stay_what_they_were(tmp_path):
    plain = Config(**SMALL)
    (episode,) = world.video(plain, 'train', 0)
    assert not episode.bystanders
    # Of the world before there were silent objects.
    np.testing.assert_allclose(episode.subject.center.sum(), PLAIN_SUM, rtol=1e-12)
    np.testing.assert_allclose(episode.background.sum(), PLAIN_BACKGROUND, rtol=1e-12)
    assert set(truth(plain, [episode])['ground_truth']) == {'events', 'objects', 'boxes'}
    # The note of a playground that was made then.
    fields = dataclasses.asdict(plain)
    for name in ('silent', 'mute', 'pictures'):
        del fields[name]
    (tmp_path / 'playground.json').write_text(json.dumps(fields))
    playground.claim_folder(tmp_path, plain)
    with pytest.raises(DataError, match=r'holds a playground with silent=0, got 1'):
        playground.claim_folder(tmp_path, dataclasses.replace(plain, silent=1))


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'silent': -1}, 'playground silent: expected 0 or more, got -1'),
        ({'pictures': -2}, 'playground pictures: expected 0 or more, got -2'),
        ({'mute': 'cube'}, 'playground mute: expected some of disc, ring, plank, pole'),
        ({'mute': 'disc,ring,plank,pole'}, 'playground mute: expected some of'),
    ],
)
def test_mistakes_are_sentences(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
