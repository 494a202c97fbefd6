"""Named datasets on miniature copies of their official layouts, with real encodings."""

import io
import json
import pathlib

import chex
import layouts
import numpy as np
import pytest
from clocks import FPS, RATE, audio_time, clock, piece_middles, video_time, write_wav
from PIL import Image

import data_pipelines
from configs.default import get_config
from data_pipelines import media, prepare
from data_pipelines.datasets import named
from data_pipelines.errors import DataError
from data_pipelines.preparation import json_files
from data_pipelines.storage.records import Prepared, Split

SMALL = {'fps': FPS, 'size': 32, 'rate': RATE, 'quiet': True, 'processes': 1}
# Names of the labels that are not called class; None where there are captions and no labels.
LABEL = {
    'youcook2': 'recipe',
    'msrvtt': 'category',
    'msrvtt_full': 'category',
    'howto100m': 'category',
    'coco_captions': None,
    'coco_karpathy': None,
    'flickr30k': None,
    'image_lists': None,
    'webdataset': None,
}
KINETICS = (
    {'train': 2, 'validation': 1, 'test': 1},
    ['abseiling', 'riding a bike'],
    [[-1]],
)
# Name -> (records of each split, or of each fold's; class names; classes of the segments of each
# record in the last split, sorted by id).
EXPECTED = {
    'ucf101': ([{'train': 4, 'test': 2}] * 3, ['Archery', 'YoYo'], [[0], [1]]),
    'hmdb51': (
        [{'train': 2, 'test': 2}, {'train': 2, 'test': 2}, {'train': 2}],
        ['brush_hair', 'wave'],
        [[0], [1]],
    ),
    'esc50': ([{'train': 8, 'test': 2}] * 5, ['dog', 'rooster'], [[0], [1]]),
    'audioset': ({'train': 1, 'test': 2}, ['Speech', 'Dog, bark'], [[[0, 1]], [[1, 0]]]),
    'kinetics400': KINETICS,
    'kinetics600': KINETICS,
    'kinetics700': KINETICS,
    'moments_in_time': ({'train': 2, 'validation': 1}, ['clapping', 'adult+female+singing'], [[0]]),
    'vggsound': ({'train': 2, 'test': 1}, ['dog barking', 'people marching, slowly'], [[1]]),
    'ave': (
        {'train': 1, 'validation': 1, 'test': 1},
        ['Church bell', 'Male speech, man speaking', 'Violin, fiddle'],
        [[2]],
    ),
    'youcook2': ({'train': 1, 'validation': 1, 'test': 1}, ['omelette', 'blt'], [[0]]),
    'msrvtt': ({'train': 3, 'test': 1}, ['music', 'people'], [[1]]),
    'msrvtt_full': ({'train': 1, 'validation': 1, 'test': 2}, ['music', 'people'], [[0], [1]]),
    'howto100m': ({'train': 2}, ['Food and Entertaining', 'Hobbies'], [[0], [1]]),
    'imagenet': (
        {'train': 2, 'validation': 1},
        ['n01440764 tench, Tinca tinca', 'n01443537 goldfish'],
        [[1]],
    ),
    'class_folders': ({'test': 3}, ['n01443537', 'n01484850'], [[0], [0], [1]]),
    'coco_captions': ({'train': 2, 'validation': 1}, [], []),
    'coco_karpathy': ({'train': 2, 'validation': 1, 'test': 1}, [], []),
    'flickr30k': ({'train': 1, 'validation': 1, 'test': 1}, [], []),
    'image_lists': ({'train': 2, 'validation': 1}, [], []),
    'webdataset': ({'train': 3, 'validation': 1}, [], []),
}


@pytest.fixture(scope='module')
def example_files(tmp_path_factory):
    """{suffix: file}."""
    return layouts.encode_examples(tmp_path_factory.mktemp('encoded') / 'files')


@pytest.fixture(scope='module')
def layout_folder(example_files, tmp_path_factory):
    """name -> folder with its layout, written once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            layouts.write_layout(folders[name], layouts.LAYOUTS[name](example_files))
        return folders[name]

    return folder_of


@pytest.fixture(scope='module')
def prepared_named(layout_folder, tmp_path_factory):
    """name -> (prepared folder, result), prepared once."""
    prepared = {}

    def prepared_of(name):
        if name not in prepared:
            out = tmp_path_factory.mktemp('out') / name
            fields = {'dataset': name, 'manual_dir': str(layout_folder(name)), **SMALL}
            if name == 'howto100m':
                fields.update(validation=0.0, test=0.0)
            prepared[name] = (out, prepare.prepare(out=str(out), **fields))
        return prepared[name]

    return prepared_of


def run_config(path, **source):
    """Run config that trains on one source: clips of four frames."""
    config = get_config()
    config.data.train = {'named': {'path': str(path), **source}}
    config.model.inputs.video.update(frames=4, size=32, fps=float(FPS))
    config.model.inputs.audio.update(samples=3200, rate=RATE)
    return config


def test_every_dataset_has_a_layout_here():
    assert set(EXPECTED) == set(layouts.LAYOUTS) == set(named.DATASETS)


@pytest.mark.parametrize('name', EXPECTED)
def test_prepared_from_the_official_layout(prepared_named, name):
    out, result = prepared_named(name)
    splits, classes, classes_of_last = EXPECTED[name]
    label = LABEL.get(name, 'class')
    assert result['labels'] == ({label: classes} if label else {})
    if isinstance(splits, list):
        assert result['folds'] == splits
        for fold, split_sizes in enumerate(splits, start=1):
            assert set(Prepared(out, fold).splits) == {*split_sizes, 'clips'}
        last = Split(Prepared(out), 'test')
    else:
        num_records = {split: counts['records'] for split, counts in result['splits'].items()}
        assert num_records == splits
        last = Split(Prepared(out), list(splits)[-1])

    index = last.index
    found = []
    for i in np.argsort(list(index.id)) if label else ():
        begin, end = index.segment_offset[i : i + 2]
        found.append(index.labels[label][begin:end].tolist())
    assert found == classes_of_last
    raw_records, reasons = last.read(np.arange(len(last)))
    assert not any(reasons)
    assert all(raw_records)


def official_ucf101_ids(folder, fold, split):
    """Ids of the clips that the official list of a fold names."""
    text = (folder / f'ucfTrainTestlist/{split}list0{fold}.txt').read_text()
    return {'UCF-101/' + line.split()[0] for line in text.splitlines()}


def official_hmdb51_ids(folder, fold, split):
    """Ids of the clips with the mark of a split in the official lists of a fold."""
    expected_mark = {'train': '1', 'test': '2'}[split]
    ids = set()
    for path in folder.glob(f'*/*_test_split{fold}.txt'):
        class_name = path.name.split('_test')[0]
        for line in path.read_text().splitlines():
            clip, _, mark = line.strip().rpartition(' ')
            if mark == expected_mark:
                ids.add(f'{class_name}/{clip}')
    return ids


@pytest.mark.parametrize('fold', [1, 2, 3])
@pytest.mark.parametrize(
    'name, official_ids',
    [('ucf101', official_ucf101_ids), ('hmdb51', official_hmdb51_ids)],
)
def test_folds_are_the_official_lists(prepared_named, layout_folder, name, official_ids, fold):
    out, _ = prepared_named(name)
    prepared = Prepared(out, fold)
    for split in ('train', 'test'):
        ids = set()
        if split in prepared.splits:
            ids = set(Split(prepared, split).index.id)
        assert ids == official_ids(layout_folder(name), fold, split), split


def test_a_fold_that_is_not_there_is_named(prepared_named):
    with pytest.raises(DataError, match='has no fold 4; it has the folds 1 to 3'):
        Prepared(prepared_named('ucf101')[0], 4)
    with pytest.raises(DataError, match='has no fold 1; it has none'):
        Prepared(prepared_named('vggsound')[0], 1)


def group_of(clip_id):
    """The group in the name of a clip of UCF101, such as g02."""
    return clip_id[-11:-8]


@pytest.fixture
def ucf101_fold_2(prepared_named):
    """(config, data opened by it): training and evaluation by the second fold."""
    path, _ = prepared_named('ucf101')
    config = run_config(path, fold=2)
    config.data.eval = {'path': str(path), 'fold': 2}
    data = data_pipelines.open(config)
    yield config, data
    data.close()


def test_a_run_reads_the_records_of_its_fold(ucf101_fold_2):
    config, data = ucf101_fold_2
    assert data.size('train') == 4
    assert data.size('test') == 2
    assert {group_of(text['id']) for text in data.texts('test')} == {'g02'}
    assert {group_of(text['id']) for text in data.texts('train')} == {'g01', 'g03'}
    iterator = data.train(0, 4)
    batch = next(iterator)
    iterator.close()
    chex.assert_shape(batch['video']['data'], (4, 4, 32, 48, 3))
    assert batch['valid'].all()
    assert set(batch['labels']['class']) == {0, 1}

    classes = next(data.one_pass('train', 4, by='records'))['labels']['class']
    names = [text['id'].split('/')[1] for text in data.texts('train', 'records')]
    assert names == [['Archery', 'YoYo'][i] for i in classes]


def test_labels_say_where_each_clip_is_in_every_fold(ucf101_fold_2):
    _, data = ucf101_fold_2
    labels = next(data.one_pass('clips', 8))['labels']
    split_names = data.info['labels']['fold1']
    splits_of_group = {}
    for i, text in enumerate(data.texts('clips')):
        splits = [split_names[labels[f'fold{fold}'][i]] for fold in (1, 2, 3)]
        splits_of_group.setdefault(group_of(text['id']), []).append(splits)
    assert set(splits_of_group) == {'g01', 'g02', 'g03'}
    assert splits_of_group['g02'] == [['train', 'test', 'train']] * 2


def contents(out, split):
    """id -> (frames [T H W 3] or None, audio [S]) of a prepared split."""
    from tensorflow_datasets.proto import tf_example_pb2

    records = Split(Prepared(out), split)
    raw_records, _ = records.read(np.arange(len(records)))
    found = {}
    for raw in raw_records:
        feature = tf_example_pb2.Example.FromString(raw).features.feature
        encoded = feature['frames'].bytes_list.value
        frames = None
        if encoded:
            frames = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in encoded])
        audio = np.frombuffer(feature['audio'].bytes_list.value[0], '<i2')
        found[feature['id'].bytes_list.value[0].decode()] = (frames, audio)
    return found


def test_a_clip_is_cut_out_of_the_whole_video(prepared_named):
    out, _ = prepared_named('audioset')
    frames, audio = contents(out, 'train')['clips/--whole_one.webm@1-3']
    np.testing.assert_allclose(video_time(frames), 1 + np.arange(20) / FPS, atol=0.06)
    np.testing.assert_allclose(audio_time(audio)[2:-2], 1 + piece_middles(50)[2:-2], atol=0.06)


def test_a_file_as_long_as_the_clip_was_cut_before(prepared_named):
    """Whatever the list says of its place in the whole."""
    frames, _ = contents(prepared_named('kinetics400')[0], 'test')['test/ttt.mp4@5-6']
    np.testing.assert_allclose(video_time(frames), np.arange(10) / FPS, atol=0.06)
    sounds = contents(prepared_named('audioset')[0], 'test')
    for clip_id in ('clips/Ysound_wav_30.000.wav', 'clips/sound_ogg_0_10000.ogg'):
        frames, audio = sounds[clip_id]
        assert frames is None
        np.testing.assert_allclose(audio_time(audio)[2:-2], piece_middles(25)[2:-2], atol=0.06)


@pytest.mark.parametrize(
    'suffix, video_codec, audio_codec, rate, source_rate',
    [
        ('avi', 'mpeg4', 'libmp3lame', 16000, 16000),
        ('webm', 'libvpx', 'libopus', 48000, RATE),
        ('ogg', None, 'libopus', 48000, RATE),
        ('mp4', None, None, RATE, RATE),
        ('wav', None, None, RATE, RATE),
    ],
)
def test_a_part_is_that_of_the_whole(tmp_path, suffix, video_codec, audio_codec, rate, source_rate):
    """Cut while reading = read whole and cut, for every container.

    What is behind a seek is positioned by its time.
    """
    path = tmp_path / f'long.{suffix}'
    frames, audio = clock(3.4, 32, 48, rate=source_rate)
    frames, audio = np.tile(frames, (2, 1, 1, 1)), np.tile(audio, 2)
    if suffix == 'wav':
        write_wav(path, audio)
    elif suffix == 'mp4':
        media.write_mp4(path, frames, FPS, audio, RATE)
    else:
        layouts.encode(
            path,
            frames if video_codec else None,
            audio,
            video_codec,
            audio_codec,
            rate=rate,
            source_rate=source_rate,
        )
    whole = media.read(path, FPS, 32, RATE)
    part = media.read(path, FPS, 32, RATE, part=(2.2, 4.7))
    if whole.frames is not None:
        shown = video_time(np.stack(list(part.frames)))
        expected = video_time(np.stack(list(whole.frames))[22:47])
        np.testing.assert_allclose(shown, expected, atol=0.03)
    chex.assert_shape(part.audio, (2.5 * RATE,))
    heard = audio_time(part.audio)
    begin = round(2.2 * RATE)
    expected = audio_time(whole.audio[begin : begin + len(part.audio)])
    # One may differ: the piece in which the second half begins.
    assert (np.abs(heard - expected)[3:] > 0.08).sum() <= 1


@pytest.fixture(scope='module')
def index_of(prepared_named):
    """(name, split) -> index of the prepared split."""

    def open_index(name, split):
        out, _ = prepared_named(name)
        return Split(Prepared(out), split).index

    return open_index


def test_steps_of_recipes_are_segments_and_sentences(index_of):
    train = index_of('youcook2', 'train')
    assert list(train.sentence_text) == ['add the bacon', 'flip it']
    assert list(train.segment_caption) == ['add the bacon', 'flip it']
    assert train.segment_end.tolist() == [2, 5]
    assert list(index_of('youcook2', 'validation').segment_caption) == ['whisk the eggs']


def test_descriptions_are_captions(index_of):
    test = index_of('msrvtt', 'test')
    assert list(test.id) == ['TestVideo/video3.mp4']
    assert list(test.segment_caption) == ['a woman, cooking']
    assert list(test.sentence_text) == ['a woman, cooking']
    expected = []
    for video in range(3):
        expected += [f'sentence {k} about {video}' for k in range(3)]
    assert sorted(index_of('msrvtt', 'train').sentence_text) == sorted(expected)


def test_all_sentences_of_a_clip_are_its_captions(prepared_named, index_of):
    """Of the full split; the 1k-A split has one caption a clip, a recipe one a step."""
    index = index_of('msrvtt_full', 'test')
    videos = [2, 3] if 'video2' in index.id[0] else [3, 2]
    expected = [[f'sentence {k} about {video}' for k in range(3)] for video in videos]
    assert [index.captions_of(segment) for segment in range(2)] == expected
    assert index_of('msrvtt', 'test').max_captions == 1
    assert index_of('youcook2', 'train').max_captions == 1

    data = data_pipelines.open(run_config(prepared_named('msrvtt_full')[0]))
    batch = next(data.one_pass('test', 3))
    data.close()
    words = run_config('x').model.inputs.text.words
    chex.assert_shape(batch['text.caption']['data'], (3, 3, words))
    np.testing.assert_array_equal(batch['text.caption']['mask'].sum(1), [3, 3, 0])
    for row in range(2):
        encoded = data.tokenizer.encode(expected[row], words)
        np.testing.assert_array_equal(batch['text.caption']['data'][row], encoded)


def test_missing_descriptions_are_no_captions(example_files, read_layout):
    layout = layouts.msrvtt(example_files)
    layout['test_videodatainfo.json']['sentences'][0]['caption'] = None
    layout['test_videodatainfo.json']['sentences'][1]['caption'] = float('nan')
    sentences = read_layout('msrvtt_full', layout).sentences['TestVideo/video2.mp4']
    assert [sentence['text'] for sentence in sentences] == ['sentence 2 about 2']


def test_lists_of_other_systems(example_files, read_layout):
    """Old Macs' lines, UTF-16, and what macOS leaves on foreign disks."""
    usual = read_layout('msrvtt', layouts.msrvtt(example_files))
    layout = layouts.msrvtt(example_files)
    table = layout['MSRVTT_JSFUSION_test.csv'].replace('\n', '\r').encode('utf-16')
    layout['MSRVTT_JSFUSION_test.csv'] = table
    layout['category.txt'] = layout['category.txt'].replace('\n', '\r\n')
    layout['._category.txt'] = b'\0\5\x16\7'
    other = read_layout('msrvtt', layout)
    assert usual.sentences == other.sentences
    assert usual.classes == other.classes


def test_faults_of_narrations_are_mended(index_of):
    """Of three sentences one has no words; one ends before it starts."""
    train = index_of('howto100m', 'train')
    assert list(train.sentence_text) == ['put onions', 'stir soup']
    assert train.sentence_end.tolist() == [1.5, 2.0]


def test_events_are_segments(index_of):
    train = index_of('ave', 'train')
    assert train.segment_start.tolist() == [1, 4]
    assert train.segment_end.tolist() == [3, 5]
    assert train.labels['class'].tolist() == [0, 1]


def test_parents_of_classes_are_in_the_ground_truth(index_of):
    parents = [json.loads(text) for text in index_of('audioset', 'test').ground_truth]
    assert {'parents': ['Animal']} in parents
    assert {'parents': []} in parents


def test_an_image_is_a_clip_of_one_frame_that_repeats(prepared_named):
    path, _ = prepared_named('imagenet')
    data = data_pipelines.open(run_config(path))
    batch = next(data.one_pass('validation', 1))
    data.close()
    chex.assert_shape(batch['video']['data'], (1, 4, 32, 48, 3))
    assert not batch['audio']['valid'].any()
    assert (np.abs(batch['video']['data'].astype(int) - 99) < 3).all()


def test_missing_clips_are_listed_and_unlisted_files_not_used(prepared_named):
    _, result = prepared_named('audioset')
    assert result['skipped'] == {'-gone_000000_000010': 'missing: no such file'}
    out, result = prepared_named('howto100m')
    assert result['skipped'] == {'gone': 'missing: no such file'}
    assert json.loads((out / 'skipped.json').read_text()) == result['skipped']
    assert 'videos/unlisted.mp4' not in Split(Prepared(out), 'train').index.id


def test_one_file_in_two_splits_is_in_the_later(example_files, tmp_path):
    layouts.write_layout(tmp_path, layouts.vggsound(example_files))
    with open(tmp_path / 'vggsound.csv', 'a') as file:
        file.write('b,12,dog barking,test\n')
    catalog = named.read('vggsound', str(tmp_path))
    name = 'video/b_000012_000022.mp4'
    assert catalog.splits[name] == 'test'
    assert 'two splits: train and test' in catalog.skipped[f'{name} (again)']


# ---- other forms of the annotations: what the pages offer besides the usual files says the same


@pytest.fixture
def read_layout(tmp_path):
    """(name, layout) -> the catalog that is read from it."""

    def read(name, layout):
        folder = tmp_path / f'layout_{len(list(tmp_path.iterdir()))}'
        layouts.write_layout(folder, layout)
        return named.read(name, str(folder))

    return read


def test_howto100m_captions_by_video(example_files, read_layout):
    usual = read_layout('howto100m', layouts.howto100m(example_files))
    layout = layouts.howto100m(example_files)
    captions = layout.pop('caption.json')
    layout['howto100m_captions/nAmFnsR7g6A.csv'] = layouts.lines(
        'start,end,text', '0.5,1.5,put onions', '2.0,1.0,stir soup', '3.0,4.0,'
    )
    layout['howto100m_captions/second.json'] = captions['gone']
    other = read_layout('howto100m', layout)
    assert usual.sentences == other.sentences
    second_sentence = other.sentences['videos/nAmFnsR7g6A.webm'][1]
    assert second_sentence == {'text': 'stir soup', 'start': 2.0, 'end': 2.0}


@pytest.mark.parametrize('name', ['howto100m', 'youcook2', 'msrvtt_full', 'audioset'])
def test_json_that_is_read_member_by_member(name, example_files, tmp_path, monkeypatch):
    layouts.write_layout(tmp_path, layouts.LAYOUTS[name](example_files))
    usual = named.read(name, str(tmp_path))
    monkeypatch.setattr(json_files, '_AT_ONCE', 1)
    monkeypatch.setattr(json_files, '_CHUNK', 10)
    catalog = named.read(name, str(tmp_path))
    assert list(catalog.files) == list(usual.files)
    assert catalog.sentences == usual.sentences
    assert catalog.annotations == usual.annotations
    assert catalog.identity == usual.identity


def test_msrvtt_annotations_in_one_file(example_files, read_layout):
    usual = read_layout('msrvtt_full', layouts.msrvtt(example_files))
    layout = layouts.msrvtt(example_files)
    first = layout.pop('train_val_videodatainfo.json')
    second = layout.pop('test_videodatainfo.json')
    layout['MSRVTT_data.json'] = {
        'videos': first['videos'] + second['videos'],
        'sentences': first['sentences'] + second['sentences'],
    }
    other = read_layout('msrvtt_full', layout)
    assert usual.sentences == other.sentences
    assert usual.annotations == other.annotations
    assert usual.splits == other.splits


def test_audioset_classes_from_the_ontology(example_files, read_layout):
    usual = read_layout('audioset', layouts.audioset(example_files))
    layout = layouts.audioset(example_files)
    del layout['class_labels_indices.csv']
    other = read_layout('audioset', layout)
    assert other.classes == {'class': ['Dog', 'Speech']}

    def class_names(catalog):
        """{file: first letters of its classes}: one is 'Dog, bark' in the usual file."""
        names = {}
        for file_id, annotation in catalog.annotations.items():
            numbers = annotation['segments'][0]['labels']['class']
            names[file_id] = sorted(catalog.classes['class'][i][:3] for i in numbers)
        return names

    assert class_names(usual) == class_names(other)


def test_imagenet_validation_in_class_folders(example_files, read_layout):
    usual = read_layout('imagenet', layouts.imagenet(example_files))
    layout = layouts.imagenet(example_files)
    del layout['LOC_val_solution.csv']
    picture = layout.pop('val/ILSVRC2012_val_00000001.JPEG')
    layout['val/n01443537/ILSVRC2012_val_00000001.JPEG'] = picture
    other = read_layout('imagenet', layout)
    segments_of_usual = [annotation['segments'] for annotation in usual.annotations.values()]
    segments_of_other = [annotation['segments'] for annotation in other.annotations.values()]
    assert segments_of_usual == segments_of_other


# ---- mistakes

# Dataset, annotation file, its contents (None: it is removed), and what is said then.
BROKEN = [
    (
        'ucf101',
        'ucfTrainTestlist/classInd.txt',
        None,
        'ucf101: the annotation file classInd.txt is not in',
    ),
    (
        'ucf101',
        'ucfTrainTestlist/classInd.txt',
        '0 Archery\n',
        'classInd.txt, line 1: expected "1 CLASS", got \'0 Archery\'',
    ),
    (
        'ucf101',
        'ucfTrainTestlist/testlist02.txt',
        'Bowling/v.avi\n',
        r"testlist02.txt, line 1: the class of 'Bowling' is unknown",
    ),
    (
        'hmdb51',
        'testTrainMulti_7030_splits/wave_test_split3.txt',
        'w_wave_0.avi 7\n',
        r"split3.txt, line 1: the mark '7' is unknown; expected 0, 1, 2",
    ),
    (
        'hmdb51',
        'testTrainMulti_7030_splits/wave_test_split3.txt',
        None,
        'the annotation file wave_test_split3.txt is not in',
    ),
    (
        'esc50',
        'meta/esc50.csv',
        'filename,fold\n',
        'esc50.csv: expected the columns filename, fold, target, category, got filename, fold',
    ),
    (
        'esc50',
        'meta/esc50.csv',
        'filename,fold,target,category\na.wav,6,0,dog\n',
        "line 2: fold '6' is unknown",
    ),
    ('audioset', 'eval_segments.csv', 'a, 0, 10\n', 'eval_segments.csv, line 1 has 3 fields'),
    ('audioset', 'eval_segments.csv', 'a, 0, 10, "/m/cat"\n', "line 1: class '/m/cat' is unknown"),
    (
        'kinetics400',
        'annotations/train.csv',
        'label,youtube_id,time_start,time_end\na,b,c,d\n',
        "line 2: 'c' is not a number",
    ),
    (
        'moments_in_time',
        'moments_categories.txt',
        'clapping,0\nsinging,2\n',
        'are not 0 to 1, each once',
    ),
    (
        'vggsound',
        'vggsound.csv',
        'a,0,b,validation\n',
        "split 'validation' is unknown; expected train, test",
    ),
    (
        'ave',
        'AVE_Dataset/valSet.txt',
        'Church bell;x;good;0;1\n',
        'valSet.txt, line 1 has 1 fields',
    ),
    (
        'youcook2',
        'annotations/youcookii_annotations_trainval.json',
        '{"database": {"a": {"subset": "training"}}}',
        'is not {"subset", "recipe_type"',
    ),
    (
        'youcook2',
        'annotations/youcookii_annotations_trainval.json',
        '{',
        'trainval.json is not readable JSON',
    ),
    (
        'msrvtt',
        'MSRVTT_JSFUSION_test.csv',
        None,
        'the annotation file MSRVTT_JSFUSION_test.csv is not in',
    ),
    ('msrvtt', 'test_videodatainfo.json', '{"videos": []}', "has no 'sentences' at its top level"),
    (
        'msrvtt',
        'MSRVTT_JSFUSION_test.csv',
        'key,vid_key,video_id,sentence\nret0,msr3,video3,a woman, cooking\n',
        "test.csv, line 2: expected 4 fields, got 5 ('ret0,msr3,video3,a woman",
    ),
    (
        'msrvtt',
        'MSRVTT_JSFUSION_test.csv',
        'key,vid_key,video_id,sentence\nret0,msr3,video3,"a woman\nret1,msr2,video2,a man\n',
        'is not readable CSV: unexpected end of data, in the row behind line 1; close every',
    ),
    (
        'howto100m',
        'caption.json',
        '{"nAmFnsR7g6A": {"start": [0], "end": [], "text": []}}',
        'expected "start", "end" and "text" of one length',
    ),
    (
        'howto100m',
        'caption.json',
        None,
        'annotation file raw_caption.json or caption.json or howto100m_captions/ID.csv is not in',
    ),
    (
        'imagenet',
        'LOC_val_solution.csv',
        None,
        'is in no class folder and LOC_val_solution.csv does not list it',
    ),
]


@pytest.mark.parametrize('name, path, text, message', BROKEN)
def test_broken_annotations_are_one_sentence(
    example_files, tmp_path, capsys, name, path, text, message
):
    layouts.write_layout(tmp_path, layouts.LAYOUTS[name](example_files))
    pathlib.Path(tmp_path, path).unlink()
    if text is not None:
        layouts.write_layout(tmp_path, {path: text})
    arguments = [f'--dataset={name}', f'--manual_dir={tmp_path}', f'--out={tmp_path / "out"}']
    assert prepare.main([*arguments, '--quiet']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert message in error, error


@pytest.fixture
def prepare_ucf101(layout_folder, tmp_path):
    """Prepares UCF101 with changed arguments."""

    def prepare_with(**changes):
        arguments = {
            'dataset': 'ucf101',
            'manual_dir': str(layout_folder('ucf101')),
            'out': str(tmp_path / 'out'),
            **SMALL,
        }
        arguments.update(changes)
        return prepare.prepare(**arguments)

    return prepare_with


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'dataset': 'ufc'}, '--dataset=ufc is unknown; datasets are ucf101'),
        ({'manual_dir': 'nowhere'}, 'is not a folder; it holds the files of ucf101'),
        ({'captions': 'c.csv'}, 'brings its own captions'),
    ],
)
def test_wrong_arguments_are_one_sentence(prepare_ucf101, changes, message):
    with pytest.raises(DataError, match=message):
        prepare_ucf101(**changes)


def test_wrong_folders_are_one_sentence(prepare_ucf101, example_files, tmp_path):
    folder = tmp_path / 'in'
    layouts.write_layout(folder, {'hmdb51_org.rar': ''})
    with pytest.raises(DataError, match='no media file .* unpack hmdb51_org.rar first'):
        prepare_ucf101(manual_dir=str(folder))
    layouts.write_layout(folder, {'other/x.avi': example_files['avi']})
    for name, content in layouts.ucf101(example_files).items():
        if isinstance(content, str):  # the lists without their clips
            layouts.write_layout(folder, {name: content})
    with pytest.raises(DataError, match='none of the 6 clips of its annotation files is below'):
        prepare_ucf101(manual_dir=str(folder))


def test_second_run_does_nothing_and_a_changed_list_is_noticed(example_files, tmp_path):
    layouts.write_layout(tmp_path / 'in', layouts.vggsound(example_files))
    arguments = {
        'dataset': 'vggsound',
        'manual_dir': str(tmp_path / 'in'),
        'out': str(tmp_path / 'out'),
        **SMALL,
    }
    assert prepare.prepare(**arguments)['fresh']
    assert not prepare.prepare(**arguments)['fresh']
    with open(tmp_path / 'in/vggsound.csv', 'a') as file:
        file.write('d,0,dog barking,train\n')
    with pytest.raises(DataError, match='already prepared with other annotations'):
        prepare.prepare(**arguments)


def test_the_document_is_what_help_prints(capsys):
    document = pathlib.Path(named.__file__).parents[2] / 'docs' / 'datasets.md'
    assert document.read_text(encoding='utf-8') == named.pages()
    with pytest.raises(SystemExit):
        prepare.main(['--dataset=hmdb51', '--help'])
    page = capsys.readouterr().out
    assert 'testTrainMulti_7030_splits/CLASS_test_split1.txt' in page
    # Both ways to write a flag's value.
    with pytest.raises(SystemExit):
        prepare.main(['--dataset', 'hmdb51', '--help'])
    assert capsys.readouterr().out == page


def test_tfds_builder(layout_folder, tmp_path):
    import tensorflow_datasets as tfds

    from data_pipelines.datasets import builders

    assert builders.OurUcf101.name == 'our_ucf101'
    builder = tfds.builder('our_hmdb51', data_dir=str(tmp_path), **SMALL)
    with pytest.raises(DataError, match='--manual_dir is not given'):
        builder.download_and_prepare()
    folder = str(layout_folder('hmdb51'))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    reopened = tfds.builder('our_hmdb51', data_dir=str(tmp_path))
    for each in (builder, reopened):
        assert each.info.splits['clips'].num_examples == 4
        for example in each.as_data_source('clips'):
            is_wave = example['id'].startswith(b'wave')
            assert example['segment_labels']['class'] == [int(is_wave)]
            assert len(json.loads(example['ground_truth'])['folds']) == 3
    assert Prepared(builder.data_dir, 3).splits == ('train', 'clips')
