"""A detector is trained, continued, evaluated, shown and used; mistakes in its evaluators."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
import vatt_jax
from configs import detector
from data_pipelines.datasets import shapes
from tests import typecheck
from tests.runs import log_lines
from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.detection import coco
from vatt_jax.evals.detection import shown_pictures
from vatt_jax.reporting import report
from vatt_jax.reporting.detections import detections
from vatt_jax.training import loop


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('shapes')
    shapes.make(path, {'train': 24, 'test': 9}, size=40, seed=1)
    return path


def tiny(folder, **fields):
    """A run of four steps on these pictures."""
    c = detector.get_config('boxes')
    c.steps, c.batch_size, c.log_every, c.checkpoint.every = 4, 8, 1, 2
    c.eval_every, c.report = 0, False
    c.compiler_options = ConfigDict()
    c.model.inputs.video.size = 32
    c.model.towers.video.update({'layers': 1, 'width': 16, 'mlp': 16, 'heads': 2, 'head_width': 8})
    c.objective.update({'width': 8, 'convs': 1, 'min_score': 0.001})
    c.optimizer.schedule.warmup = 1
    c.mesh.replica = 1
    c.data.train = {'shapes': {'path': str(folder)}}
    c.update(fields)
    return c


def train(config, workdir):
    return loop.train(config, data_pipelines.open(config), workdir, quiet=True)


@pytest.mark.slow
def test_a_run(folder, tmp_path):
    pytest.importorskip('pycocotools', reason='the extra detection is not installed')
    config = tiny(folder)
    train(config, tmp_path / 'whole')
    whole = log_lines(tmp_path / 'whole')
    assert 'eval/detection/AP50' in whole[-1]
    # Continued in the middle, to the same bits.
    shutil.copytree(tmp_path / 'whole', tmp_path / 'continued')
    shutil.rmtree(tmp_path / 'continued' / 'checkpoints' / '4')
    (tmp_path / 'continued' / 'done.json').unlink()
    shutil.rmtree(tmp_path / 'continued' / 'evals')
    train(tiny(folder), tmp_path / 'continued')
    assert log_lines(tmp_path / 'continued') == whole
    # Eight devices, to rounding.
    eight = tiny(folder)
    eight.mesh.replica = 8
    eight.evals = ConfigDict()
    train(eight, tmp_path / 'eight')
    for a, b in zip(log_lines(tmp_path / 'eight'), whole):
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)

    page = report.build(tmp_path / 'whole').read_text()
    assert 'detection AP50' in page
    assert 'Found boxes in the colour of their class' in page
    model = vatt_jax.load(tmp_path / 'whole')
    file = folder / 'images' / 'test_00000.png'
    found = model.detect(image=file, min_score=0.0)
    assert 0 < len(found['boxes']) <= 50 and (np.diff(found['scores']) <= 0).all()
    image = coco.read(folder / 'test.json')['images'][0]
    assert (found['boxes'] >= 0).all()
    assert (found['boxes'].max(axis=0)[2:] <= [image['width'], image['height']]).all()
    assert found['names'] == [shapes.CLASSES[number] for number in found['classes']]
    import PIL.Image

    pixels = np.asarray(PIL.Image.open(file))
    first, second, third = model.detect(image=[file, pixels, pixels], min_score=0.0)
    for other in (first, second, third):
        np.testing.assert_allclose(other['boxes'], found['boxes'], atol=1e-3)
    with pytest.raises(ConfigError, match='detect'):
        model.detect(image=str(tmp_path / 'none.png'))


def test_evaluators_that_do_not_fit(folder, tmp_path):
    document = json.loads((folder / 'test.json').read_text())
    document['categories'][0]['name'] = 'ring'
    (tmp_path / 'test.json').write_text(json.dumps(document))
    c = tiny(folder)
    c.data.eval.path = str(tmp_path)
    data = data_pipelines.open(c)
    with typecheck.off(), pytest.raises(ConfigError) as caught:
        evals.check(c.evals, data, None)
    assert 'config.evals.detection.naming: the true boxes of split' in str(caught.value)
    c.evals.detection.naming = 'argmax'
    evals.check(c.evals, data, None)
    with pytest.raises(ConfigError, match='naming'):
        evals.build('x', ConfigDict({'type': 'detection', 'naming': 'best'}))
    synthetic = tiny(folder)
    synthetic.data.source = 'synthetic'
    with pytest.raises(ConfigError, match='the data have no boxes'):
        evals.check(c.evals, data_pipelines.open(synthetic), None)


class View:
    """Features of a detector that says what it is told."""

    seed = 0

    def __init__(self, data, predictions):
        self.data, self.predictions = data, predictions

    def features(self, split, limit):
        num_pictures = len(self.data.boxes(split)['images'])
        is_valid = {'video': np.ones(num_pictures, bool)}
        return {'predictions': self.predictions, 'valid': is_valid}


def test_a_detector_of_clusters_is_named_before_it_is_measured(folder):
    """True boxes as detections, in clusters that are the classes by other numbers."""
    pytest.importorskip('pycocotools', reason='the extra detection is not installed')
    data = data_pipelines.open(tiny(folder))
    document = data.boxes('test')
    cluster_of = [2, 0, 1]
    boxes = np.zeros((9, 5, 4), np.float32)
    scores, classes = np.zeros((9, 5), np.float32), np.full((9, 5), -1)
    for row, annotations in enumerate(coco.by_image(document)):
        corners, kinds, _ = coco.boxes_of(annotations, coco.class_numbers(document))
        side = max(document['images'][row]['width'], document['images'][row]['height'])
        boxes[row, : len(kinds)] = corners / side
        scores[row, : len(kinds)] = 0.9
        classes[row, : len(kinds)] = [cluster_of[kind] for kind in kinds]
    view = View(data, {'boxes': boxes, 'scores': scores, 'classes': classes})
    with typecheck.off():
        plain = evals.build('a', ConfigDict({'type': 'detection'})).run(view)
        assert plain.scalars['AP50'] < 0.5
        for entry in (
            {'naming': 'hungarian'},
            {'naming': 'argmax'},
            {'naming': 'few_shot', 'shots': 3},
            # Clusters have the names of the classes of training.
            {
                'naming': 'manual',
                'names': (('triangle', 'disc'), ('disc', 'square'), ('square', 'triangle')),
            },
        ):
            config = ConfigDict({'type': 'detection', **entry})
            result = evals.build('a', config).run(view)
            assert set(result.scalars) == {
                *('AP50', 'AP30', 'AP50:95', 'AP50/any_class'),
                *('found/all', 'found/several'),
            }
            assert list(result.scalars.values()) == pytest.approx([1] * 6, abs=0.02)
            assert result.artifacts['names'] == {
                'triangle': 'disc',
                'disc': 'square',
                'square': 'triangle',
            }
        shown = detections('x', result.artifacts)
        assert shown['names']['disc'] == 'square'
        assert [bar['AP50'] for bar in shown['bars']] == pytest.approx([1, 1, 1], abs=0.02)
        num_boxes = [len(picture['boxes']) for picture in shown['pictures']]
        counts = [len(p['true']) + len(p['found']) for p in result.artifacts['pictures']]
        assert num_boxes == counts and min(counts) >= 2
        pixels = result.artifacts.pop('pixels')
        assert pixels.shape[0] == len(counts)
        json.dumps(result.artifacts)


def test_pictures_of_the_report_come_worst_first(folder):
    document = coco.read(folder / 'test.json')
    right = [{**box, 'score': 0.9} for box in document['annotations'] if box['image_id'] != 4]
    pictures = shown_pictures(document, right, count=4)
    assert [picture['place'] for picture in pictures[:2]] == [4, 0]
    assert [picture['faults'] for picture in pictures] == [1, 0, 0, 0]
    assert pictures[0]['found'] == [] and pictures[1]['found'][0]['score'] == 0.9
    assert jax.tree.map(float, pictures[1]['true'][0]['box'])
