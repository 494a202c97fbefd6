"""Pictures with boxes: what a batch holds, in which order, and where the boxes are in it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from configs import default
from data_pipelines import DataError
from data_pipelines.datasets import shapes
from data_pipelines.loading.coco_source import crop_boxes
from vatt_jax.config import ConfigError
from vatt_jax.detection import coco
from vatt_jax.inputs import preprocess
from vatt_jax.rng import Rng

SIZE = 32


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """11 pictures to train on and 5 to test on."""
    path = tmp_path_factory.mktemp('shapes')
    shapes.make(path, {'train': 11, 'test': 5}, size=48, seed=3)
    return path


def config(path, **fields):
    c = default.get_config()
    c.data.source = 'coco'
    c.data.train = {'shapes': {'path': str(path)}}
    c.model.inputs.video.update({'frames': 2, 'size': SIZE, 'fps': 1.0})
    c.data.update(fields)
    return c


def test_a_batch(folder):
    data = data_pipelines.open(config(folder))
    assert (data.size('train'), data.size('test'), data.size('validation')) == (11, 5, 0)
    assert data.info['labels'] == {'object': list(shapes.CLASSES)}
    batch = next(data.one_pass('test', 4))
    # Crops of 0.6 of the area have as many pixels as the model sees.
    assert batch['video']['data'].shape == (4, 2, 42, 42, 3)
    document = coco.read(folder / 'test.json')
    for row, annotations in enumerate(coco.by_image(document)[:4]):
        boxes = {name: value[row] for name, value in batch['boxes'].items()}
        assert boxes['valid'].sum() == len(annotations) and not boxes['ignored'].any()
        for place, annotation in enumerate(annotations):
            x, y, width, height = np.array(annotation['bbox']) / 48
            expected = [x, y, x + width, y + height]
            np.testing.assert_allclose(boxes['corners'][place], expected, atol=1e-6)
            assert boxes['class'][place] == annotation['category_id'] - 1
        shown = {annotation['category_id'] - 1 for annotation in annotations}
        assert set(np.flatnonzero(batch['labels']['object'][row])) == shown
    # The last row of the second batch is padding.
    *_, last = data.one_pass('test', 4)
    assert last['valid'].tolist() == [True, False, False, False]
    assert not last['boxes']['valid'][1:].any() and not last['boxes']['corners'][1:].any()


def rows_of(iterator, count):
    """The first batches of an iterator, which is closed."""
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def test_order_and_crops_are_those_of_the_position(folder):
    """Resumed in the middle, and read by two processes, batches are the same."""
    data = data_pipelines.open(config(folder))
    whole = rows_of(data.train(0, 4), 4)
    resumed = rows_of(data.train(8, 4), 2)
    parts = [rows_of(data.train(8, 4, process=(i, 2)), 2) for i in range(2)]
    for number in range(2):
        for name in ('corners', 'class', 'valid', 'ignored'):
            expected = whole[2 + number]['boxes'][name]
            np.testing.assert_array_equal(resumed[number]['boxes'][name], expected)
            joined = np.concatenate([part[number]['boxes'][name] for part in parts])
            np.testing.assert_array_equal(joined, expected)
        np.testing.assert_array_equal(
            resumed[number]['video']['data'], whole[2 + number]['video']['data']
        )
    indices = np.concatenate([batch['index'] for batch in whole])
    # An epoch has every picture once.
    assert sorted(indices[:11]) == list(range(11))


def test_boxes_lie_where_the_device_stage_puts_the_pixels(tmp_path):
    """White rectangles on black: their edges after crop, resize and flip are the boxes."""
    import PIL.Image

    (tmp_path / 'images').mkdir()
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for number in range(8):
        picture = np.zeros((60, 90, 3), np.uint8)
        x, y = rng.integers(10, 40), rng.integers(5, 25)
        picture[y : y + 24, x : x + 40] = 255
        PIL.Image.fromarray(picture).save(tmp_path / 'images' / f'{number}.png')
        images.append(coco.make_image(number, f'{number}.png', 90, 60))
        annotations.append(coco.make_annotation(number + 1, number, 7, [x, y, 40, 24]))
    document = {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 7, 'name': 'white'}],
    }
    coco.write(tmp_path / 'train.json', document)
    c = config(tmp_path)
    data = data_pipelines.open(c)
    batch = rows_of(data.train(0, 16), 1)[0]
    assert 0 < batch['video']['flip'].sum() < 16
    stream = jax.tree.map(jnp.asarray, batch['video'])
    rng = Rng.create(0, 0, np.arange(16, dtype=np.uint32))
    pixels = preprocess.video(stream, c.model.inputs.video, c.augment, rng, augment=False)
    pixels = np.asarray(pixels)
    for row in range(16):
        is_white = pixels[row, 0].mean(axis=-1) > 0.5
        rows, columns = np.flatnonzero(is_white.any(axis=1)), np.flatnonzero(is_white.any(axis=0))
        edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / SIZE
        np.testing.assert_allclose(batch['boxes']['corners'][row, 0], edges, atol=1.6 / SIZE)


def test_what_a_crop_shows_little_of_is_ignored():
    corners = np.array([[0.1, 0.1, 0.3, 0.3], [0.4, 0.4, 0.9, 0.6], [0.8, 0.8, 0.9, 0.9]])
    shown, share = crop_boxes(corners, np.array([0.2, 0.2, 0.7, 0.7]), True)
    np.testing.assert_allclose(share, [0.25, 0.6, 0])
    np.testing.assert_allclose(shown[0], [0.8, 0, 1, 0.2])
    np.testing.assert_allclose(shown[1], [0, 0.4, 0.6, 0.8])


def test_crowds_are_ignored_and_a_damaged_picture_has_no_boxes(folder, tmp_path):
    document = coco.read(folder / 'train.json')
    document['annotations'][0]['iscrowd'] = 1
    coco.write(tmp_path / 'mine.json', document)
    (tmp_path / 'images').mkdir()
    for file in (folder / 'images').iterdir():
        (tmp_path / 'images' / file.name).write_bytes(file.read_bytes())
    (tmp_path / 'images' / 'train_00001.png').write_bytes(b'no picture')
    data = data_pipelines.open(config(tmp_path / 'mine.json', max_corrupt=0.5))
    batch = next(data.one_pass('train', 4, by='records'))
    assert batch['boxes']['ignored'][0].tolist()[:2] == [True, False]
    assert batch['valid'].tolist() == [True, False, True, True]
    assert not batch['boxes']['valid'][1].any() and not batch['video']['data'][1].any()
    assert data.problems()['corrupt'] == 1


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda d: d.pop('categories'), "expected a list 'categories'"),
        (lambda d: d['images'][0].pop('width'), "images[0] lacks the field 'width'"),
        (lambda d: d['annotations'][0].update(bbox=[0, 0, -1, 2]), 'annotations[0].bbox'),
        (lambda d: d['annotations'][0].update(image_id='x'), "image_id='x' is no image"),
        (lambda d: d['annotations'][0].update(category_id=9), 'category_id=9 is no category'),
    ],
)
def test_files_that_are_no_coco(change, words, folder, tmp_path):
    document = json.loads((folder / 'test.json').read_text())
    change(document)
    (tmp_path / 'train.json').write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        data_pipelines.open(config(tmp_path))
    assert words in str(caught.value)
    with pytest.raises(ConfigError):
        coco.read(tmp_path / 'none.json')


def test_sources_of_other_classes(folder, tmp_path):
    document = json.loads((folder / 'train.json').read_text())
    document['categories'][0]['name'] = 'ring'
    (tmp_path / 'train.json').write_text(json.dumps(document))
    c = config(folder)
    c.data.train = {'a': {'path': str(folder)}, 'b': {'path': str(tmp_path)}}
    with pytest.raises(DataError, match='config.data.train.b has other categories than a'):
        data_pipelines.open(c)
    # To be measured by other classes is what clusters are.
    c.data.train = {'b': {'path': str(tmp_path)}}
    c.data.eval.path = str(folder)
    batch = next(data_pipelines.open(c).one_pass('test', 4))
    assert batch['boxes']['valid'].any() and not batch['labels']['object'].any()
