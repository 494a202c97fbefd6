"""Named datasets on miniature copies of their official layouts, with real encodings."""

import json
import pathlib

import chex
import layouts
import numpy as np
import pytest
from clocks import FPS, RATE, audio_time, video_time

import data_pipelines
from data_pipelines import media, prepare
from data_pipelines.datasets import named
from data_pipelines.errors import DataError
from data_pipelines.storage.records import Prepared, Split

SMALL = dict(fps=FPS, size=32, rate=RATE, quiet=True, processes=1)
LABEL = {
    'youcook2': 'recipe',
    'msrvtt': 'category',
    'msrvtt_full': 'category',
    'howto100m': 'category',
}
# Name -> (records of each split, or of each fold's; class names; classes of the segments of each
# record in the last split, sorted by id).
WANT = {
    'ucf101': ([{'train': 4, 'test': 2}] * 3, ['Archery', 'YoYo'], [[0], [1]]),
    'hmdb51': (
        [{'train': 2, 'test': 2}, {'train': 2, 'test': 2}, {'train': 2}],
        ['brush_hair', 'wave'],
        [[0], [1]],
    ),
    'esc50': ([{'train': 8, 'test': 2}] * 5, ['dog', 'rooster'], [[0], [1]]),
    'audioset': ({'train': 1, 'test': 2}, ['Speech', 'Dog, bark'], [[[0, 1]], [[1, 0]]]),
    **{
        f'kinetics{k}': (
            {'train': 2, 'validation': 1, 'test': 1},
            ['abseiling', 'riding a bike'],
            [[-1]],
        )
        for k in (400, 600, 700)
    },
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
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return layouts.encodings(tmp_path_factory.mktemp('encoded') / 'files')


@pytest.fixture(scope='module')
def place(files, tmp_path_factory):
    """name -> folder with its layout, written once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            layouts.write(made[name], layouts.LAYOUTS[name](files))
        return made[name]

    return of


@pytest.fixture(scope='module')
def made(place, tmp_path_factory):
    """name -> (prepared folder, result), prepared once."""
    done = {}

    def of(name):
        if name not in done:
            out = tmp_path_factory.mktemp('out') / name
            shares = {'validation': 0.0, 'test': 0.0} if name == 'howto100m' else {}
            done[name] = (
                out,
                prepare.prepare(
                    dataset=name, manual_dir=str(place(name)), out=str(out), **SMALL, **shares
                ),
            )
        return done[name]

    return of


def test_every_dataset_has_a_layout_here():
    assert set(WANT) == set(layouts.LAYOUTS) == set(named.DATASETS)


@pytest.mark.parametrize('name', WANT)
def test_prepared_from_the_official_layout(made, name):
    out, result = made(name)
    splits, classes, last = WANT[name]
    label = LABEL.get(name, 'class')
    assert result['labels'] == {label: classes}
    if isinstance(splits, list):
        assert result['folds'] == splits and [
            dict.fromkeys(Prepared(out, k + 1).splits) for k in range(len(splits))
        ] == [dict.fromkeys([*s, 'clips']) for s in splits]
        part = Split(Prepared(out), 'test')
    else:
        assert {k: v['records'] for k, v in result['splits'].items()} == splits
        part = Split(Prepared(out), list(splits)[-1])
    t = part.index
    order = np.argsort(list(t.id))
    got = [t.labels[label][t.segment_offset[i] : t.segment_offset[i + 1]].tolist() for i in order]
    assert got == last
    raw, reasons = part.read(np.arange(len(part)))
    assert not any(reasons) and all(raw)


def test_folds_are_the_official_lists(made, place):
    for name in ('ucf101', 'hmdb51'):
        for fold in (1, 2, 3):
            for split in ('train', 'test'):
                if name == 'ucf101':
                    text = (place(name) / f'ucfTrainTestlist/{split}list0{fold}.txt').read_text()
                    want = {'UCF-101/' + line.split()[0] for line in text.splitlines()}
                else:
                    mark = {'train': '1', 'test': '2'}[split]
                    want = {
                        f'{p.name.split("_test")[0]}/{line.strip().rpartition(" ")[0]}'
                        for p in place(name).glob(f'*/*_test_split{fold}.txt')
                        for line in p.read_text().splitlines()
                        if line.strip()[-1] == mark
                    }
                prepared = Prepared(made(name)[0], fold)
                got = set(Split(prepared, split).index.id) if split in prepared.splits else set()
                assert got == want, (name, fold, split)
    with pytest.raises(DataError, match='has no fold 4; it has the folds 1 to 3'):
        Prepared(made('ucf101')[0], 4)
    with pytest.raises(DataError, match='has no fold 1; it has none'):
        Prepared(made('vggsound')[0], 1)


def test_folds_in_a_run(made):
    """Training and evaluation read the records of the fold that the config names."""
    from configs.default import get_config

    c = get_config()
    path = str(made('ucf101')[0])
    c.data.train = {'ucf': {'path': path, 'fold': 2}}
    c.data.eval = {'path': path, 'fold': 2}
    c.model.inputs.video.update(frames=4, size=32, fps=float(FPS))
    c.model.inputs.audio.update(samples=3200, rate=RATE)
    data = data_pipelines.open(c)
    assert data.size('train') == 4 and data.size('test') == 2
    assert {t['id'][-11:-8] for t in data.texts('test')} == {'g02'} and {
        t['id'][-11:-8] for t in data.texts('train')
    } == {'g01', 'g03'}
    batch = next(it := data.train(0, 4))
    it.close()
    chex.assert_shape(batch['video']['data'], (4, 4, 32, 48, 3))
    assert batch['valid'].all() and set(batch['labels']['class']) == {0, 1}
    # all clips at once, and where each is in every fold
    every = next(data.one_pass('clips', 8))
    group = {'g01': [], 'g02': [], 'g03': []}
    for text, *where in zip(data.texts('clips'), *(every['labels'][f'fold{k}'] for k in (1, 2, 3))):
        group[text['id'][-11:-8]].append([data.info['labels']['fold1'][w] for w in where])
    assert all(w == ['train', 'test', 'train'] for w in group['g02']) and len(group['g02']) == 2, (
        group
    )
    assert [t['id'].split('/')[1] for t in data.texts('train', 'records')] == [
        ['Archery', 'YoYo'][k]
        for k in next(data.one_pass('train', 4, by='records'))['labels']['class']
    ]
    data.close()


def contents(out, split):
    """id -> (frames [T H W 3], audio [S]) of a prepared split."""
    import io

    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    part = Split(Prepared(out), split)
    found = {}
    for raw in part.read(np.arange(len(part)))[0]:
        f = tf_example_pb2.Example.FromString(raw).features.feature
        frames = [np.asarray(Image.open(io.BytesIO(b))) for b in f['frames'].bytes_list.value]
        found[f['id'].bytes_list.value[0].decode()] = (
            np.stack(frames) if frames else None,
            np.frombuffer(f['audio'].bytes_list.value[0], '<i2'),
        )
    return found


def test_a_clip_is_cut_out_of_the_whole_video(made):
    frames, audio = contents(made('audioset')[0], 'train')['clips/--whole_one.webm@1-3']
    np.testing.assert_allclose(video_time(frames), 1 + np.arange(20) / FPS, atol=0.06)
    np.testing.assert_allclose(
        audio_time(audio)[2:-2], 1 + (np.arange(50)[2:-2] + 0.5) * 0.04, atol=0.06
    )
    # A file that is as long as the clip was cut before, whatever the list says of its place in the
    # whole.
    frames, _ = contents(made('kinetics400')[0], 'test')['test/ttt.mp4@5-6']
    np.testing.assert_allclose(video_time(frames), np.arange(10) / FPS, atol=0.06)
    sounds = contents(made('audioset')[0], 'test')
    for id in ('clips/Ysound_wav_30.000.wav', 'clips/sound_ogg_0_10000.ogg'):
        assert sounds[id][0] is None
        np.testing.assert_allclose(
            audio_time(sounds[id][1])[2:-2], (np.arange(25)[2:-2] + 0.5) * 0.04, atol=0.06
        )


@pytest.mark.parametrize('suffix', ['avi', 'mp4', 'webm', 'wav', 'ogg'])
def test_a_part_is_that_of_the_whole(files, suffix, tmp_path):
    """Cut while reading = read whole and cut, for every container.

    What is behind a seek is positioned by its time.
    """
    path = tmp_path / f'long.{suffix}'
    frames, audio = layouts.clock(3.4, 32, 48, rate=16000 if suffix == 'avi' else RATE)
    frames, audio = np.tile(frames, (2, 1, 1, 1)), np.tile(audio, 2)
    if suffix == 'wav':
        layouts.write_wav(path, audio)
    elif suffix == 'mp4':
        media.write_mp4(path, frames, FPS, audio, RATE)
    else:
        video, sound, rate = {
            'avi': ('mpeg4', 'libmp3lame', 16000),
            'webm': ('libvpx', 'libopus', 48000),
            'ogg': ('', 'libopus', 48000),
        }[suffix]
        layouts.encode(
            path,
            frames if video else None,
            audio,
            video,
            sound,
            rate=rate,
            source_rate=16000 if suffix == 'avi' else RATE,
        )
    whole, part = media.read(path, FPS, 32, RATE), media.read(path, FPS, 32, RATE, part=(2.2, 4.7))
    if whole.frames is not None:
        np.testing.assert_allclose(
            video_time(np.stack(list(part.frames))),
            video_time(np.stack(list(whole.frames))[22:47]),
            atol=0.03,
        )
    assert len(part.audio) == 2.5 * RATE
    heard = audio_time(part.audio)
    expected = audio_time(whole.audio[round(2.2 * RATE) :][: len(part.audio)])
    # One may differ: the piece in which the second half begins.
    assert (np.abs(heard - expected)[3:] > 0.08).sum() <= 1


def test_captions_and_segments(made):
    def index(name, split):
        return Split(Prepared(made(name)[0]), split).index

    t = index('youcook2', 'train')
    assert list(t.sentence_text) == list(t.segment_caption) == [
        'add the bacon',
        'flip it',
    ] and t.segment_end.tolist() == [2, 5]
    assert list(index('youcook2', 'validation').segment_caption) == ['whisk the eggs']
    t = index('msrvtt', 'test')
    assert list(t.segment_caption) == ['a woman, cooking'] == list(t.sentence_text) and list(
        t.id
    ) == ['TestVideo/video3.mp4']
    assert sorted(index('msrvtt', 'train').sentence_text) == sorted(
        f'sentence {k} about {i}' for k in range(3) for i in range(3)
    )
    # Of three sentences one has no words; one ends before it starts.
    t = index('howto100m', 'train')
    assert list(t.sentence_text) == ['put onions', 'stir soup'] and t.sentence_end.tolist() == [
        1.5,
        2.0,
    ]
    t = index('ave', 'train')
    assert (
        t.segment_start.tolist() == [1, 4]
        and t.segment_end.tolist() == [3, 5]
        and t.labels['class'].tolist() == [0, 1]
    )
    parents = [json.loads(g) for g in index('audioset', 'test').ground_truth]
    assert {'parents': ['Animal']} in parents and {'parents': []} in parents


def test_an_image_is_a_clip_of_one_frame_that_repeats(made):
    from configs.default import get_config

    c = get_config()
    c.data.train = {'images': {'path': str(made('imagenet')[0])}}
    c.model.inputs.video.update(frames=4, size=32, fps=float(FPS))
    c.model.inputs.audio.update(samples=3200, rate=RATE)
    data = data_pipelines.open(c)
    batch = next(data.one_pass('validation', 1))
    data.close()
    chex.assert_shape(batch['video']['data'], (1, 4, 32, 48, 3))
    assert not batch['audio']['valid'].any()
    assert (np.abs(batch['video']['data'].astype(int) - 99) < 3).all()


def test_missing_clips_are_listed_and_unlisted_files_not_used(made):
    assert made('audioset')[1]['skipped'] == {'-gone_000000_000010': 'missing: no such file'}
    out, result = made('howto100m')
    assert (
        result['skipped']
        == {'gone': 'missing: no such file'}
        == json.loads((out / 'skipped.json').read_text())
    )
    assert 'videos/unlisted.mp4' not in Split(Prepared(out), 'train').index.id


def test_one_file_in_two_splits_is_in_the_later(place, files, tmp_path):
    layouts.write(tmp_path, layouts.vggsound(files))
    with open(tmp_path / 'vggsound.csv', 'a') as f:
        f.write('b,12,dog barking,test\n')
    got = named.read('vggsound', str(tmp_path))
    assert (
        got.splits['video/b_000012_000022.mp4'] == 'test'
        and 'two splits: train and test' in got.skipped['video/b_000012_000022.mp4 (again)']
    )


def test_other_forms_of_the_annotations(files, tmp_path):
    """What the pages offer besides the usual files says the same."""

    def both(name, change):
        layout = layouts.LAYOUTS[name](files)
        layouts.write(tmp_path / name / 'usual', layout)
        layouts.write(tmp_path / name / 'other', change(dict(layout)))
        return [named.read(name, str(tmp_path / name / x)) for x in ('usual', 'other')]

    def per_video(layout):
        captions = layout.pop('caption.json')
        rows = ('start,end,text', '0.5,1.5,put onions', '2.0,1.0,stir soup', '3.0,4.0,', '')
        return {
            **layout,
            'howto100m_captions/nAmFnsR7g6A.csv': '\n'.join(rows),
            'howto100m_captions/second.json': captions['gone'],
        }

    usual, other = both('howto100m', per_video)
    assert usual.sentences == other.sentences and other.sentences['videos/nAmFnsR7g6A.webm'][1] == {
        'text': 'stir soup',
        'start': 2.0,
        'end': 2.0,
    }

    def together(layout):
        first, second = (
            layout.pop('train_val_videodatainfo.json'),
            layout.pop('test_videodatainfo.json'),
        )
        return {
            **layout,
            'MSRVTT_data.json': {k: first[k] + second[k] for k in ('videos', 'sentences')},
        }

    usual, other = both('msrvtt_full', together)
    assert (usual.sentences, usual.annotations, usual.splits) == (
        other.sentences,
        other.annotations,
        other.splits,
    )

    usual, other = both(
        'audioset',
        lambda layout: {k: v for k, v in layout.items() if k != 'class_labels_indices.csv'},
    )
    assert other.classes == {'class': ['Dog', 'Speech']}

    def class_names(catalog):
        names = {}
        for file_id, annotation in catalog.annotations.items():
            numbers = annotation['segments'][0]['labels']['class']
            names[file_id] = sorted(catalog.classes['class'][i][:3] for i in numbers)
        return names

    assert class_names(usual) == class_names(other)

    def sorted_into_folders(layout):
        return {
            k.replace('val/', 'val/n01443537/'): v
            for k, v in layout.items()
            if k != 'LOC_val_solution.csv'
        }

    usual, other = both('imagenet', sorted_into_folders)
    assert [m['segments'] for m in usual.annotations.values()] == [
        m['segments'] for m in other.annotations.values()
    ]


# file that is broken -> what it says then (None: it is removed)
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


@pytest.mark.parametrize('name, path, text, say', BROKEN)
def test_broken_annotations_are_one_sentence(files, tmp_path, capsys, name, path, text, say):
    layouts.write(tmp_path, layouts.LAYOUTS[name](files))
    pathlib.Path(tmp_path, path).unlink()
    if text is not None:
        layouts.write(tmp_path, {path: text})
    assert (
        prepare.main(
            [
                f'--dataset={name}',
                f'--manual_dir={tmp_path}',
                f'--out={tmp_path / "out"}',
                '--quiet',
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert say in error, error


def test_other_mistakes_are_one_sentence(place, files, tmp_path):
    def call(**changes):
        usual = {'dataset': 'ucf101', 'manual_dir': str(place('ucf101'))}
        return prepare.prepare(**{'out': str(tmp_path / 'out'), **usual, **SMALL, **changes})

    with pytest.raises(DataError, match='--dataset=ufc is unknown; datasets are ucf101'):
        call(dataset='ufc')
    with pytest.raises(DataError, match='is not a folder; it holds the files of ucf101'):
        call(manual_dir='nowhere')
    with pytest.raises(DataError, match='brings its own captions'):
        call(captions='c.csv')
    (tmp_path / 'hmdb51_org.rar').write_text('')
    with pytest.raises(DataError, match='no media file .* unpack hmdb51_org.rar first'):
        call(manual_dir=str(tmp_path))
    layouts.write(
        tmp_path,
        {
            'other/x.avi': files['avi'],
            **{k: v for k, v in layouts.ucf101(files).items() if isinstance(v, str)},
        },
    )
    with pytest.raises(DataError, match='none of the 6 clips of its annotation files is below'):
        call(manual_dir=str(tmp_path))


def test_second_run_does_nothing_and_a_changed_list_is_noticed(
    place, files, made, tmp_path, monkeypatch
):
    layouts.write(tmp_path / 'in', layouts.vggsound(files))

    def call():
        return prepare.prepare(
            dataset='vggsound', manual_dir=str(tmp_path / 'in'), out=str(tmp_path / 'out'), **SMALL
        )

    assert call()['fresh'] and not call()['fresh']
    with open(tmp_path / 'in/vggsound.csv', 'a') as f:
        f.write('d,0,dog barking,train\n')
    with pytest.raises(DataError, match='already prepared with other annotations'):
        call()


def test_pages(capsys):
    docs = pathlib.Path(named.__file__).parents[2] / 'docs' / 'datasets.md'
    assert docs.read_text(encoding='utf-8') == named.pages()
    with pytest.raises(SystemExit):
        prepare.main(['--dataset=hmdb51', '--help'])
    page = capsys.readouterr().out
    assert 'testTrainMulti_7030_splits/CLASS_test_split1.txt' in page
    # Both ways to write a flag's value.
    with pytest.raises(SystemExit):
        prepare.main(['--dataset', 'hmdb51', '--help'])
    assert capsys.readouterr().out == page


def test_tfds_builder(place, tmp_path):
    import tensorflow_datasets as tfds

    from data_pipelines.datasets import builders

    assert builders.OurUcf101.name == 'our_ucf101'
    builder = tfds.builder('our_hmdb51', data_dir=str(tmp_path), **SMALL)
    with pytest.raises(DataError, match='--manual_dir is not given'):
        builder.download_and_prepare()
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(place('hmdb51')))
    )
    again = tfds.builder('our_hmdb51', data_dir=str(tmp_path))
    for b in (builder, again):
        assert b.info.splits['clips'].num_examples == 4
        for e in b.as_data_source('clips'):
            assert e['segment_labels']['class'] == [int(e['id'].startswith(b'wave'))]
            assert len(json.loads(e['ground_truth'])['folds']) == 3
    assert Prepared(builder.data_dir, 3).splits == ('train', 'clips')
