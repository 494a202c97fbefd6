"""What is made of heat maps: measures against true boxes, boxes in COCO's format, the API."""

import json
import pathlib
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import data_pipelines
import vatt_jax
from tests import typecheck
from tests.test_localisation import config
from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.detection.boxes import find_boxes, upsample
from vatt_jax.detection.true_objects import inside, objects_at
from vatt_jax.modes import pseudo_boxes
from vatt_jax.reporting.heat_maps import covered, heat_maps
from vatt_jax.training import loop

# Two frames a second; the first object sounds around the frames 2 and 3.
TRUTH = {
    'fps': 2.0,
    'boxes': [[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]] * 6,
    'sounds': [[number in (2, 3), False] for number in range(6)],
    'kinds': [['disc', 'pole']] * 6,
}


def peaked(row, column):
    """[1 1 8 8]: a blob of 4 × 4 positions on nothing."""
    heat = np.zeros((1, 1, 8, 8), np.float32)
    heat[0, 0, row : row + 4, column : column + 4] = 1.0
    return heat


@pytest.mark.parametrize('start, heard', [(0.5, True), (1.0, True), (1.5, False), (9.0, False)])
def test_true_boxes_are_those_that_the_sound_holds(start, heard):
    """The sound of a second from `start` on; its middle counts."""
    expected = [[0, 0, 0.5, 0.5]] if heard else np.zeros((0, 4))
    np.testing.assert_allclose(objects_at(TRUTH, start, 1.0).heard().boxes, expected)


def test_boxes_of_a_crop_are_shares_of_it():
    got = inside(np.array([[0.0, 0.25, 0.5, 0.75]]), np.array([0.25, 0.25, 0.75, 0.75], np.float32))
    np.testing.assert_allclose(got, [[0, 0, 0.5, 1]])


def test_the_threshold_is_chosen_on_another_split():
    """A blob of 2 × 2 on a plateau of 4 × 4, which is the object."""
    heat = np.zeros((3, 1, 8, 8), np.float32)
    heat[:, :, :4, :4] = 0.7
    heat[:, :, 1:3, 1:3] = 1.0
    result = evaluated(heat, beta=0.9, beta_split='validation', betas=(0.9, 0.3))
    assert result.scalars['heat/beta'] == 0.3
    assert result.scalars['heat/IoU'] == 1
    assert evaluated(heat, beta=0.9).scalars['heat/IoU'] == 0
    with pytest.raises(ConfigError, match='betas: expected numbers from 0 to 1, got none'):
        evals.build('boxes', ConfigDict({'type': 'localisation', 'betas': ()}))


def fake_view(heat):
    features = {
        'index': np.arange(3),
        'valid': {'video': np.ones(3, bool)},
        'start': {'video': np.array([0.5, 1.0, 2.5], np.float32)},
        'crop': {'video': np.tile(np.array([0, 0, 1, 1], np.float32), (3, 1))},
        'heat_maps': {'heat': heat} if heat is not None else {},
    }
    inputs = ConfigDict({'audio': {'samples': 1000, 'rate': 1000}})
    encoder = types.SimpleNamespace(config=ConfigDict({'model': {'inputs': inputs}}))
    stream = {
        'data': np.random.default_rng(1).integers(0, 255, (3, 1, 20, 20, 3)).astype(np.uint8),
        'box': features['crop']['video'],
        'valid': np.ones(3, bool),
    }
    batch = {'video': stream, 'valid': np.array([True, True, False]), 'position': np.arange(3)}
    data = types.SimpleNamespace(
        texts=lambda split, by: [{'ground_truth': json.dumps(TRUTH)}] * 3,
        one_pass=lambda *args, **kwargs: [batch],
    )
    return types.SimpleNamespace(
        features=lambda *args, **kwargs: features,
        encoder=encoder,
        data=data,
        seed=0,
        batch_size=3,
        process=(0, 1),
    )


def evaluated(heat, **fields):
    evaluator = evals.build('boxes', ConfigDict({'type': 'localisation', **fields}))
    with typecheck.off():
        return evaluator.run(fake_view(heat))


def test_the_evaluator_finds_what_is_there():
    # The third picture has no sound: it does not count.
    heat = np.concatenate([peaked(0, 0), peaked(4, 4), peaked(4, 4)])
    result = evaluated(heat)
    assert result.artifacts['pictures'] == 2
    assert result.scalars['heat/IoU'] == result.scalars['heat/cIoU'] == 0.5
    assert result.scalars['heat/pointing'] == 0.5
    assert result.scalars['centre_box/pointing'] == 0
    # A box of a quarter of the sides' product shares a quarter of itself with the true one.
    assert result.scalars['centre_box/IoU'] == 0
    # IoU 1/7: found at the thresholds 0, 0.05 and 0.1, and half way to 0.15.
    np.testing.assert_allclose(result.scalars['centre_box/AUC'], 0.125)
    assert evaluated(heat, centre=1.0, overlap=0.25).scalars['centre_box/IoU'] == 1
    # The report shows the worst first.
    shown = heat_maps('boxes', result.artifacts)['pictures']
    assert [picture['iou'] for picture in shown] == sorted(picture['iou'] for picture in shown)
    assert [picture['iou'] >= 0.5 for picture in shown] == [False, True]
    assert shown[0]['boxes'][0] == {
        'x': 0.0,
        'y': 0.0,
        'width': 64.0,
        'height': 64.0,
        'is_true': True,
    }
    with pytest.raises(ConfigError, match='makes no heat maps'):
        evaluated(None)


PICTURES = np.random.default_rng(0).integers(0, 255, (3, 1, 24, 32, 3)).astype(np.uint8)


def written(folder, heat, **fields):
    """What `pseudo_boxes.write` makes of three pictures, the last of which has no sound."""
    # The central square is seen.
    crop = np.tile(np.array([0, 0.125, 1, 0.875], np.float32), (3, 1))
    valid = np.ones(3, bool)
    batch = {
        'video': {'data': PICTURES, 'box': crop, 'valid': valid, 'start': np.array([0.5, 1.0, 2])},
        'audio': {'valid': np.array([True, True, False])},
        'position': np.array([5, 6, 7]),
        'index': np.arange(3),
        'valid': valid,
    }
    outputs = {
        'predictions': {'cluster/0': np.eye(4)[[3, 1, 0]]},
        'heat_maps': {'heat': heat},
    }
    inputs = {'audio': {'samples': 1000, 'rate': 1000}}
    run_config = ConfigDict({'batch_size': 3, 'model': {'inputs': inputs}})

    class Encoder:
        config = run_config

        def __call__(self, batch, maps):
            return outputs

    data = types.SimpleNamespace(
        one_pass=lambda *args, **kwargs: [batch],
        texts=lambda split, by: [{'ground_truth': json.dumps(TRUTH)}] * 3,
        info={'labels': {'object': ['ring', 'disc', 'pole']}},
    )
    objective = types.SimpleNamespace(
        config=ConfigDict({'picture': 'video', 'sound': 'audio', 'clusters': 4})
    )
    options = pseudo_boxes.Options(**fields)
    with typecheck.off():
        return pseudo_boxes.write(folder, 'train', Encoder(), objective, data, options)


def test_heat_covers_a_picture_most_where_it_is_hottest():
    grey = np.full((8, 8, 3), 100, np.uint8)
    got = covered(grey, peaked(0, 0)[0, 0])
    np.testing.assert_array_equal(got[7, 7], grey[7, 7])
    # 0.7 of orange, 0.3 of grey.
    np.testing.assert_allclose(got[1, 1], 0.3 * 100 + 0.7 * np.array([255, 60, 0]), atol=0.5)
    np.testing.assert_array_equal(covered(grey, np.ones((8, 8), np.float32)), grey)


def test_pseudo_boxes_are_a_coco_file(tmp_path):
    heat = np.concatenate([0.3 * peaked(0, 0), 0.9 * peaked(2, 4), peaked(0, 0)])
    document = written(tmp_path, heat, score=0.5)
    assert document == json.loads((tmp_path / 'train.json').read_text())
    # The first is not sure enough, the third has no sound.
    (image,) = document['images']
    name = 'train_00000006.png'
    assert image == {'id': 1, 'file_name': name, 'width': 24, 'height': 24, 'example': 6}
    np.testing.assert_array_equal(Image.open(tmp_path / 'images' / name), PICTURES[1, 0, :, 4:28])
    (annotation,) = document['annotations']
    y0, x0, y1, x1 = find_boxes(upsample(heat[1, 0].astype(float), 24, 24), 0.5).boxes[0] * 24
    np.testing.assert_allclose(annotation['bbox'], [x0, y0, x1 - x0, y1 - y0])
    assert annotation['category_id'] == 2 and annotation['image_id'] == 1
    assert annotation['score'] == 0.9 and annotation['iscrowd'] == 0
    assert document['categories'][1] == {'id': 2, 'name': 'cluster 1'}
    with pytest.raises(ConfigError, match='try a lower --score'):
        written(tmp_path / 'none', heat, score=0.95)


def test_true_boxes_and_classes_take_the_place_of_found_ones(tmp_path):
    heat = np.concatenate([0.3 * peaked(0, 0), 0.9 * peaked(2, 4), peaked(0, 0)])
    found = written(tmp_path / 'found', heat)
    classes = written(tmp_path / 'classes', heat, true='classes')
    boxes = written(tmp_path / 'boxes', heat, true='boxes')
    everything = written(tmp_path / 'all', heat, true='all')
    # The first object, a disc, is heard in both pictures.
    for document in (found, classes):
        assert [box['category_id'] for box in document['annotations']] == (
            [4, 2] if document is found else [2, 2]
        )
    np.testing.assert_allclose(
        [box['bbox'] for box in classes['annotations']],
        [box['bbox'] for box in found['annotations']],
    )
    assert [box['category_id'] for box in boxes['annotations']] == [4, 2]
    assert [box['category_id'] for box in everything['annotations']] == [2, 3, 2, 3]
    assert [box['sounds'] for box in everything['annotations']] == [True, False, True, False]
    # The frame's left half, without the eighth that is cut off.
    edge = 24 * (0.5 - 0.125) / 0.75
    np.testing.assert_allclose(boxes['annotations'][0]['bbox'], [0, 0, edge, 12], atol=1e-3)
    np.testing.assert_allclose(everything['annotations'][1]['bbox'], [edge, 12, 12, 12], atol=1e-3)
    assert [entry['name'] for entry in classes['categories']] == ['ring', 'disc', 'pole']


def test_a_box_points_at_its_middle():
    evaluator = evals.build('boxes', ConfigDict({'type': 'localisation'}))
    box, other = np.array([[0.0, 0.0, 0.5, 0.5]]), np.array([[0.5, 0.0, 1.0, 0.5]])
    assert evaluator._box_overlaps(box, box) == (1, 1, True)
    assert evaluator._box_overlaps(box, other) == (0, 0, False)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'beta': 1.0}, '--beta: expected a share from 0 to below 1, got 1'),
        ({'most': 0}, '--boxes: expected a positive number, got 0'),
        ({'score': 2.0}, '--score: expected a cosine from -1 to 1, got 2'),
        ({'true': 'class'}, "--true='class'"),
        ({'splits': ('test', 'test')}, "each once, got 'test,test'"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        pseudo_boxes.Options(**fields)


@pytest.mark.slow
def test_a_run_localises_and_makes_boxes(tmp_path, plain_run):
    c = config()
    loop.train(c, data_pipelines.open(c), tmp_path / 'run', quiet=True)
    model = vatt_jax.load(tmp_path / 'run')
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    sounds = rng.normal(scale=0.1, size=(3, 1024)).astype(np.float32)
    found = model.localise(image=pictures, audio=sounds)
    assert found['heat'].shape == (3, 1, 2, 2)
    np.testing.assert_array_equal(found['score'], found['heat'].max((1, 2, 3)))
    assert np.abs(found['heat']).max() <= 1 + 1e-5
    one = model.localise(image=pictures[1], audio=sounds[1], size=(20, 30))
    assert one['heat'].shape == (1, 20, 30)
    np.testing.assert_allclose(one['score'], found['score'][1], rtol=1e-4)
    for fields, message in (
        ({'image': pictures[0]}, 'expected a picture with sound'),
        ({'image': pictures, 'audio': sounds[:2]}, 'expected a sound for each of 3 pictures'),
        ({'audio': sounds[0]}, 'expected one of video= and image=, got none'),
        ({'image': pictures, 'audio': sounds, 'size': 3}, r'expected \(height, width\)'),
    ):
        with pytest.raises(ConfigError, match=message):
            model.localise(**fields)
    with pytest.raises(ConfigError, match='has no heat maps'):
        vatt_jax.load(plain_run).localise(image=pictures, audio=sounds)

    out = tmp_path / 'boxes'
    run = tmp_path / 'run'
    pseudo_boxes.run(c, run, data_pipelines.open, str(out), pseudo_boxes.Options())
    document = json.loads((out / 'train.json').read_text())
    assert len(document['images']) == len(list((out / 'images').iterdir())) > 0
    with pytest.raises(ConfigError, match='expected a new or empty folder'):
        pseudo_boxes.run(c, run, data_pipelines.open, str(out), pseudo_boxes.Options())
    assert pathlib.Path(out / 'train.json').exists()
