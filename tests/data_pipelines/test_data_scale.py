"""Preparing needs no more memory for more videos, and no kill changes what comes out."""

import filecmp
import gc
import json
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from test_data_prepare import SMALL, write_silences

from data_pipelines import prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from data_pipelines.storage import columns
from data_pipelines.storage.records import Prepared, Split

ROOT = pathlib.Path(__file__).parents[2]
NUM_SENTENCES = 30


# ---- memory


def write_staged_videos(root, count):
    """Videos that count as decoded already, and their captions: the arguments of `prepare`."""
    videos, out = root / 'videos', root / 'out'
    videos.mkdir(parents=True)
    settings = decoded_files.Settings(fps=10.0, size=32, rate=8000, quality=90, min_seconds=0.5)
    header = {'height': 32, 'width': 32, 'samples': 0, 'lengths': [50], 'duration': 100.0}
    lines = ['video,start,end,text']
    for number in range(count):
        path = videos / f'v{number}.mp4'
        path.touch()
        status = path.stat()
        file = decoded_files.File(path.name, str(path), status.st_size, status.st_mtime_ns)
        target = decoded_files.staged_path(out / '.staging', file, settings)
        decoded_files.write(str(target), {'id': file.id, **header}, [bytes(50)])
        for second in range(NUM_SENTENCES):
            lines.append(f'{path.name},{second},{second + 1},word{second} of a video')
    captions = root / 'captions.csv'
    captions.write_text('\n'.join(lines) + '\n')
    return str(videos), str(captions), str(out)


def peak_bytes(root, count):
    """The most that Python holds while so many videos are prepared."""
    videos, captions, out = write_staged_videos(root, count)
    arguments = {'fps': 10, 'size': 32, 'rate': 8000, 'min_seconds': 0.5, 'processes': 1}
    gc.collect()
    tracemalloc.start()
    try:
        result = prepare.prepare(videos, captions, out, **arguments, quiet=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(split['sentences'] for split in result['splits'].values()) == count * NUM_SENTENCES
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_videos(tmp_path, monkeypatch):
    # Columns of the index are written when so much has been collected.
    monkeypatch.setattr(columns, '_BUFFER', 1 << 10)
    peak_bytes(tmp_path / 'first', 5)  # imports
    few, many = peak_bytes(tmp_path / 'few', 40), peak_bytes(tmp_path / 'many', 160)
    # The sentences of one video alone take several times as much.
    assert (many - few) / 120 < 3000


# ---- order


class Made:
    """Examples of different lengths, as `datasets.folder` takes them."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def keys(self):
        for i in range(self.count):
            yield f'folder/video{i}.mp4'

    def example(self, i):
        return self.made(i, [bytes([i % 256]) * (100 + i)] * 3)

    def outline(self, i):
        return self.made(i, [bytes(100 + i)] * 3)

    def made(self, i, frames):
        example = {'id': f'folder/video{i}.mp4', 'fps': 1.0, 'height': 2, 'width': 3, 'rate': 4}
        captions = {'caption_text': ['a', 'b'][: i % 3]}
        for field in ('start', 'end'):
            captions[f'caption_{field}'] = [0.5, 1.5][: i % 3]
        segments = {'segment_start': [], 'segment_end': [], 'segment_caption': []}
        segments['segment_labels'] = {'class': []}
        contents = {'frames': frames, 'audio': b'x' * i, 'ground_truth': '{}'}
        return {**example, **captions, **segments, **contents}


@pytest.mark.parametrize('max_memory', [1 << 30, 1000])
def test_order_and_division_into_files_are_those_of_tfds(tmp_path, monkeypatch, max_memory):
    """Of its own writer, whether the examples fit into its memory or go through its buckets."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer, naming, shuffle, writer
    from tensorflow_datasets.core.utils import shard_utils
    from tensorflow_datasets.proto import tf_example_pb2

    from data_pipelines.datasets import folder

    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', max_memory)
    config = shard_utils.ShardConfig(num_shards=4)
    monkeypatch.setattr(folder, 'SHARD_CONFIG', config)
    labels = {'class': (5, False)}
    produced = folder.write(str(tmp_path / 'ours'), 'made', labels, {'train': Made(70)})

    (tmp_path / 'theirs').mkdir()
    features = folder.features(labels)
    reference = writer.Writer(
        serializer=example_serializer.ExampleSerializer(features.get_serialized_info()),
        filename_template=naming.ShardedFileTemplate(
            data_dir=tmp_path / 'theirs',
            dataset_name='made',
            split='train',
            filetype_suffix='array_record',
        ),
        hash_salt='train',
        disable_shuffling=False,
        example_writer=writer.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD),
        shard_config=config,
    )
    made = Made(70)
    for i, key in enumerate(made.keys()):
        reference.write(key, features.encode_example(made.example(i)))
    lengths, num_bytes = reference.finalize()

    split = tfds.builder_from_directory(produced).info.splits['train']
    assert len(lengths) == 4
    assert (list(split.shard_lengths), split.num_bytes) == (lengths, num_bytes)
    for file in sorted((tmp_path / 'theirs').iterdir()):
        messages = []
        for path in (file, pathlib.Path(produced, file.name)):
            raw = array_record_module.ArrayRecordReader(str(path)).read_all()
            messages.append([tf_example_pb2.Example.FromString(record) for record in raw])
        assert messages[0] == messages[1]


def test_decoded_files_that_are_shorter_than_they_say(tmp_path, monkeypatch):
    videos = write_silences(tmp_path / 'videos', 'a', 'b')
    content = decoded_files.content

    def shortened(path):
        whole = content(path)
        return whole._replace(pcm=whole.pcm[:-10])

    monkeypatch.setattr(decoded_files, 'content', shortened)
    with pytest.raises(DataError, match='bytes of records .* is the disk sound'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL)


# ---- kills

# Forks, which begin at once and die alone. processes=1: they have no workers to look after.
KILLER = """
import json, os, random, signal, sys, time

from data_pipelines import prepare
from data_pipelines.datasets import folder

whole, arguments, num_kills = json.loads(sys.argv[1])


def fork(arguments):
    child = os.fork()
    if not child:
        os._exit(prepare.main(arguments))
    return child


began = time.monotonic()
assert os.waitpid(fork(whole), 0)[1] == 0
duration = time.monotonic() - began
draw = random.Random(0)
codes = []
for kill in range(num_kills):
    child = fork(arguments)
    # Later and later, so that each phase is met.
    time.sleep(draw.uniform(0, duration * (kill + 1) / num_kills))
    os.kill(child, signal.SIGKILL)
    codes.append(os.waitpid(child, 0)[1])
assert os.waitpid(fork(arguments), 0)[1] == 0
print(json.dumps(codes))
"""


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_kills_at_random_moments_change_no_byte(tmp_path):
    names = [f'v{number}' for number in range(60)]
    videos = write_silences(tmp_path / 'videos', *names)
    captions = tmp_path / 'captions.json'
    captions.write_text(json.dumps({name: [f'this is {name}', 'soup'] for name in names}))
    commands = []
    for out in ('whole', 'killed'):
        commands.append(
            [
                f'--videos={videos}',
                f'--captions={captions}',
                f'--out={tmp_path / out}',
                '--name=set',
                '--rate=8000',
                '--min_seconds=0.5',
                '--processes=1',
                '--quiet',
            ]
        )
    done = subprocess.run(
        [sys.executable, '-c', KILLER, json.dumps([*commands, 10])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 9 in json.loads(done.stdout)  # SIGKILL
    names = files_below(tmp_path / 'whole')
    assert files_below(tmp_path / 'killed') == names
    # It holds the seconds that the command took.
    names.remove('prepare.json')
    _, different, unread = filecmp.cmpfiles(
        tmp_path / 'whole', tmp_path / 'killed', names, shallow=False
    )
    assert (different, unread) == ([], [])
    split = Split(Prepared(tmp_path / 'killed'), 'train')
    _, reasons = split.read(np.arange(len(split)))
    assert not any(reasons)


@pytest.mark.slow
def test_kills_of_real_videos_and_worker_processes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    import prepare_scale

    result = prepare_scale.measure_kills(num_videos=200, num_kills=6, processes=4, seed=0)
    assert result['different'] == []


def test_an_error_leaves_no_folder_behind(tmp_path):
    videos, out = write_silences(tmp_path / 'videos', 'a'), tmp_path / 'new' / 'out'
    (tmp_path / 'captions.csv').write_text('video,text\nelsewhere,soup\n')
    with pytest.raises(DataError, match='no entry of'):
        prepare.prepare(videos, str(tmp_path / 'captions.csv'), str(out), **SMALL)
    assert not out.exists()
    result = prepare.prepare(videos, '', str(out), **SMALL)
    assert result['fresh']
    assert not (out / '.staging').exists()
