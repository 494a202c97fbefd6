"""Trackers: what each service is given; none is needed until it is used, none can end a run."""

import json
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.evals.base import Result
from vatt_jax.training import loop, tracked_evaluation, trackers
from vatt_jax.training.metrics import Writer

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def config(*names):
    return ConfigDict({'name': 'a run', 'steps': 3, 'trackers': names})


def say_nothing(line):
    raise AssertionError(line)


def events(folder):
    """[(step, tag, kind)] of a folder's event files, by tensorboardX's own protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob('events*')):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], 'little')
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.append((event.step, value.tag, value.WhichOneof('value')))
            if event.session_log.status:
                found.append((event.step, 'session', event.session_log.status))
            data = data[12 + size + 4 :]
    return found


def test_tensorboard_gets_numbers_texts_and_pictures(tmp_path):
    opened = trackers.Trackers(config('tensorboard'), tmp_path, 7, say_nothing)
    opened.scalars(8, {'loss': 1.5, 'lr': float('nan')})
    opened.image(8, 'gallery', PICTURE)
    opened.close()
    assert events(tmp_path / 'tensorboard') == [
        (8, 'session', 1),  # START: later steps of earlier starts are dropped
        (7, 'config/text_summary', 'tensor'),
        (8, 'loss', 'simple_value'),
        (8, 'lr', 'simple_value'),
        (8, 'gallery', 'image'),
    ]


class Recorder(types.ModuleType):
    """Stands in for a library that is not installed here: records every call."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.__spec__ = types.SimpleNamespace(name=name)

    def record(self, name):
        def called(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return types.SimpleNamespace(log=self.record('log'), finish=self.record('finish'))

        return called


def test_weights_and_biases_continues_the_same_run(tmp_path, monkeypatch):
    wandb = Recorder('wandb')
    wandb.init, wandb.Image = wandb.record('init'), lambda image: ('Image', image.shape)
    wandb.Html = lambda text: ('Html', text)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    ids = []
    for step in (0, 5):
        opened = trackers.Trackers(config('wandb'), tmp_path, step, say_nothing)
        opened.scalars(step + 1, {'loss': 1.5})
        opened.image(step + 1, 'gallery', PICTURE)
        opened.close()
        name, _, fields = wandb.calls[0]
        assert name == 'init' and fields['name'] == 'a run' and fields['resume'] == 'allow'
        assert fields['config']['steps'] == 3 and fields['dir'] == str(tmp_path)
        ids.append(fields['id'])
        logged = [(args[0], kwargs) for name, args, kwargs in wandb.calls if name == 'log']
        assert logged[1:] == [
            ({'loss': 1.5}, {'step': step + 1}),
            ({'gallery': ('Image', (4, 4, 3))}, {'step': step + 1}),
        ]
        assert wandb.calls[-1][0] == 'finish'
        wandb.calls.clear()
    assert ids[0] == ids[1] and len(ids[0]) == 16


def test_clu_writers_get_what_they_take(tmp_path, monkeypatch):
    calls = []

    class MetricWriter:
        def __getattr__(self, name):
            return lambda *args: calls.append((name, args))

    clu = Recorder('clu')
    clu.metric_writers = types.SimpleNamespace(
        create_default_writer=lambda folder: calls.append(('create', (folder,))) or MetricWriter()
    )
    monkeypatch.setitem(sys.modules, 'clu', clu)
    opened = trackers.Trackers(config('clu'), tmp_path, 0, say_nothing)
    opened.scalars(1, {'loss': 1.5})
    opened.image(1, 'gallery', PICTURE)
    opened.close()
    assert calls[0] == ('create', (str(tmp_path / 'clu'),))
    assert calls[1][0] == 'write_texts' and '"steps": 3' in calls[1][1][1]['config']
    assert calls[2] == ('write_scalars', (1, {'loss': 1.5}))
    assert calls[3][0] == 'write_images' and calls[3][1][1]['gallery'].shape == (1, 4, 4, 3)
    assert [name for name, _ in calls[4:]] == ['flush', 'close']


def test_none_is_imported_until_it_is_asked_for(tmp_path):
    writer = Writer(tmp_path, 0, True, trackers.Trackers(config(), tmp_path, 0, say_nothing))
    writer.write(1, {'loss': 1.0})
    writer.close()
    assert not {'wandb', 'clu'} & set(sys.modules)
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


@pytest.mark.parametrize(
    'names, message',
    [
        (('tensorbord',), "config.trackers='tensorbord': choose one of tensorboard, wandb, clu"),
        (('wandb',), "config.trackers has 'wandb', whose library wandb is not installed; pip inst"),
        (('clu',), 'pip install clu'),
    ],
)
def test_mistakes_are_found_before_anything_is_built(names, message):
    with pytest.raises(ConfigError, match=message):
        loop.check(tiny.config(trackers=names))


class Failing(trackers.Tracker):
    def __init__(self, config, workdir, step):
        pass

    def scalars(self, step, values):
        raise OSError(28, 'No space left on device')


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, 'failing', trackers.Entry(Failing, 'json', 'json'))
    said = []
    opened = trackers.Trackers(config('failing', 'tensorboard'), tmp_path, 0, said.append)
    writer = Writer(tmp_path, 0, True, opened)
    for step in (1, 2):
        writer.write(step, {'loss': 1.5, 'lr': float('nan'), 'order': 'ab'})
    writer.close()
    assert len(said) == 1 and 'tracker failing failed (OSError' in said[0]
    assert (2, 'loss', 'simple_value') in events(tmp_path / 'tensorboard')
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2]
    assert lines[0]['lr'] is None and lines[0]['order'] == 'ab'
    assert lines[0]['time'].endswith('+00:00')


class Recording(trackers.Trackers):
    def __init__(self):
        self.open = {'any': trackers.Tracker()}
        self.texts, self.images = {}, {}

    def text(self, step, name, text):
        self.texts[name] = text

    def image(self, step, name, image):
        self.images[name] = image


def test_an_evaluation_becomes_a_table_and_pictures(tiny_run):
    folder, _, _ = tiny_run
    from vatt_jax import evals

    results = evals.load(folder / 'evals' / 'step_000002')
    seen = Recording()
    tracked_evaluation.report(seen, 2, results, folder / 'evals' / 'step_000002')
    value = results['retrieval'].scalars['text_to_video/R@10']
    row = f'| retrieval | text_to_video/R@10 | {value:.4g} | '
    assert row in seen.texts['evaluation']
    assert set(seen.images) >= {
        'retrieval/text_to_video/similarity',
        'gallery/text_to_video',
        'gallery/audio_to_video',
    }
    # Eight queries, each with its own clip and five that came first, 16 pixels and a frame of 3.
    assert seen.images['gallery/text_to_video'].shape == (8 * 22, 6 * 22, 3)
    assert (seen.images['gallery/text_to_video'][0, 0] == tracked_evaluation.OWN).all()


def test_shades_of_a_similarity_matrix():
    picture = tracked_evaluation.similarity_image(np.array([[1.0, 0.0], [np.nan, 0.5]]))
    assert picture.shape == (512, 512, 3)
    assert [int(picture[y, x, 0]) for y in (0, 511) for x in (0, 511)] == [255, 0, 0, 127]
    assert tracked_evaluation.similarity_image(np.full((3, 3), np.inf)).max() == 0
    table = tracked_evaluation.table({'a': Result({'x': 0.5}, {'x/chance': 0.1})})
    assert table.splitlines()[-1] == '| a | x | 0.5 |  | 0.1 |'
