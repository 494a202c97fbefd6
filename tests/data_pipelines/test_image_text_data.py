"""Pictures with captions: tar shards, lists of addresses, COCO, Flickr30k, folders of classes."""

import io
import os
import pathlib
import random
import tarfile

import layouts
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import media, prepare
from data_pipelines.datasets import named
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, tar_shards
from data_pipelines.storage.records import Prepared, Split

SMALL = {'fps': 10, 'size': 32, 'rate': 8000, 'quiet': True, 'processes': 1}


def jpeg(gray, size=(60, 40)):
    """The bytes of a picture of one shade."""
    stream = io.BytesIO()
    Image.new('RGB', size, (gray, gray, gray)).save(stream, 'JPEG')
    return stream.getvalue()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """What layouts link: a JPEG file."""
    path = tmp_path_factory.mktemp('files') / 'file.JPEG'
    path.write_bytes(jpeg(99))
    return {'JPEG': path}


@pytest.fixture
def read(tmp_path):
    """Writes a layout and reads it as a named dataset."""

    def read_layout(name, layout, folder='in'):
        layouts.write_layout(tmp_path / folder, layout)
        return named.read(name, str(tmp_path / folder))

    return read_layout


def captions_of(catalog):
    """{file id: its captions}."""
    return {
        file_id: [sentence['text'] for sentence in sentences]
        for file_id, sentences in catalog.sentences.items()
    }


# ---- tar shards


def test_members_are_what_the_archive_holds(tmp_path):
    """Long names, folders, links: as the standard library unpacks them."""
    long_name = 'folder/' + 'x' * 150 + '.jpg'
    members = [('a.jpg', b'picture'), ('a.txt', b''), (long_name, b'y' * 5000), ('b.jpg', b'z')]
    path = tmp_path / 'shard.tar'
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, 'w', format=form) as archive:
            folder = tarfile.TarInfo('folder')
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            link = tarfile.TarInfo('c.jpg')
            link.type, link.linkname = tarfile.SYMTYPE, 'a.jpg'
            archive.addfile(link)
        problems = {}
        found = []
        for sample in tar_shards.samples(path, problems):
            for member in sample.members.values():
                found.append((member.name, tar_shards.read_member(path, member)))
        assert found == members
        assert problems == {'c.jpg': 'a link or a device: expected a file'}


# Names that group in odd ways: folders, dots, suffixes in capitals, several pictures.
parts = st.sampled_from(['a', 'b', 'd/a', 'a.b'])
suffixes = st.sampled_from(['.jpg', '.JPG', '.png', '.txt', '.json', '.cls', ''])
member_names = st.tuples(parts, suffixes).map(''.join)


@settings(max_examples=60, deadline=None)
@given(st.lists(member_names, max_size=12))
def test_every_member_is_in_a_sample_or_a_problem(tmp_path_factory, written):
    path = tmp_path_factory.mktemp('shards') / 'x.tar'
    path.write_bytes(layouts.tar_of([(name, b'1') for name in written]))
    problems = {}
    in_samples = []
    names = []
    for sample in tar_shards.samples(path, problems):
        names.append(sample.name)
        in_samples += [member.name for member in sample.members.values()]
    assert len(names) == len(set(names))
    # A name that occurs twice is in a sample once, and a problem.
    assert set(in_samples) | set(problems) == set(written)
    assert len(in_samples) == len(set(in_samples))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5119))
def test_an_archive_cut_anywhere_says_so(tmp_path_factory, length):
    whole = layouts.tar_of([('a.jpg', b'1' * 700), ('a.txt', b'2'), ('b.jpg', b'3' * 10)])
    path = tmp_path_factory.mktemp('shards') / 'x.tar'
    path.write_bytes(whole[:length])
    problems = {}
    try:
        found = list(tar_shards.samples(path, problems))
    except DataError as error:
        assert length < 512 and 'expected a tar archive' in str(error)
        return
    for sample in found:
        for member in sample.members.values():
            assert member.offset + member.size <= length
    # Six blocks are headers and contents; one of zeros marks the end.
    assert bool(problems) == (length < 8 * 512)


def shard_with_faults():
    """One sound sample, and one of each fault."""
    members = layouts.shard_sample('00', jpeg(10), 'sound &amp; whole')
    members += [('01.jpg', jpeg(20))]
    members += [('02.txt', b'no picture'), ('02.json', b'{}')]
    members += [('03.jpg', jpeg(30)), ('03.json', b'{"caption": "of the json"}')]
    members += [('04.jpg', jpeg(40)), ('04.txt', b'\xff\xfe\xff'), ('04.cls', b'7')]
    members += [('05.jpg', jpeg(50)), ('05.txt', b'bad json'), ('05.json', b'{"a": ')]
    members += [('06.jpg', b'<html>not found</html>'), ('06.txt', b'a web page')]
    members += [('07.jpg', jpeg(60)), ('07.txt', b'  ')]
    members += [('00.jpg', jpeg(70))]
    return layouts.tar_of(members)


def test_every_sample_of_a_shard_is_accounted_for(tmp_path):
    layout = {'0.tar': shard_with_faults(), '1.tar': b'\x1f\x8b' + b'0' * 600, '2.tar': 'no tar'}
    layout['3.tar'] = shard_with_faults()[:2000]
    layouts.write_layout(tmp_path / 'in', layout)
    result = prepare.prepare(
        dataset='webdataset',
        manual_dir=str(tmp_path / 'in'),
        out=str(tmp_path / 'out'),
        validation=0,
        test=0,
        **SMALL,
    )
    reasons = {name: reason.split(':')[0] for name, reason in result['skipped'].items()}
    assert reasons == {
        '0.tar/01': 'no caption',
        '0.tar/02': 'no picture',
        '0.tar/04': 'no caption',
        '0.tar/05.json': 'left out',
        '0.tar/06.jpg': 'corrupt',
        '0.tar/07': 'no caption',
        '0.tar/00.jpg': 'again',
        '1.tar': 'expected a tar archive, got a compressed one; decompress it first, as its members'
        ' lie anywhere',
        '2.tar': 'expected a tar archive, got another file (truncated header)',
        '3.tar': 'truncated',
        '*.cls': 'not read',
    } | {name: reasons[name] for name in reasons if name.startswith('3.tar/')}
    index = Split(Prepared(tmp_path / 'out'), 'train').index
    captions = dict(zip(index.id, index.segment_caption))
    assert {name: text for name, text in captions.items() if name.startswith('0.')} == {
        '0.tar/00.jpg': 'sound & whole',
        '0.tar/03.jpg': 'of the json',
        '0.tar/05.jpg': 'bad json',
    }


def test_a_member_is_decoded_as_the_file_would_be(tmp_path, files):
    """The record of a picture in a shard is that of the picture in a file of its own."""
    layouts.write_layout(tmp_path, layouts.webdataset(files))
    catalog = named.read('webdataset', str(tmp_path))
    settings = decoded_files.Settings(10.0, 24, 8000, 90, 0.0)
    member = catalog.files.by_id('train/00000.tar/000000003.jpg')
    assert member.offset
    decoded_files.stage_file(member, settings, str(tmp_path / 'staged_member'))
    alone = decoded_files.File('x.JPEG', str(files['JPEG']), 0, 0)
    decoded_files.stage_file(alone, settings, str(tmp_path / 'staged_file'))
    contents = [
        decoded_files.content(pathlib.Path(tmp_path, name))
        for name in ('staged_member', 'staged_file')
    ]
    assert contents[0] == contents[1]
    assert contents[0].frames
    assert catalog.annotations[member.id]['ground_truth'] == {
        'url': 'http://example.org/000000003',
        'key': '000000003',
        'width': 60,
    }


def test_a_shard_that_changes_while_it_is_decoded(tmp_path, files):
    layouts.write_layout(tmp_path, layouts.webdataset(files))
    file = named.read('webdataset', str(tmp_path)).files[0]
    settings = decoded_files.Settings(10.0, 24, 8000, 90, 0.0)
    os.utime(file.path, ns=(0, 0))
    decoded_files.stage_file(file, settings, str(tmp_path / 'staged'))
    assert decoded_files.header(tmp_path / 'staged')['skipped'].startswith('changed')
    # The keys of members of one size differ, and so do those of another state of the archive.
    keys = {file.key(settings) for file in named.read('webdataset', str(tmp_path)).files}
    assert len(keys) == 4
    assert file.key(settings) not in keys


def test_preparing_shards_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Killed behind the first picture; the bytes are those of a run that was not."""
    samples = [layouts.shard_sample(f'{i:02d}', jpeg(20 * i), f'number {i}') for i in range(5)]
    layouts.write_layout(tmp_path / 'in', {'0.tar': layouts.tar_of(sum(samples, []))})
    arguments = {'dataset': 'webdataset', 'manual_dir': str(tmp_path / 'in'), **SMALL}
    whole = prepare.prepare(out=str(tmp_path / 'whole'), name='x', **arguments)

    stage_file = decoded_files.stage_file
    staged = []

    def killed_after_two(file, *rest):
        if len(staged) == 2:
            raise KeyboardInterrupt
        staged.append(file.id)
        stage_file(file, *rest)

    monkeypatch.setattr(decoded_files, 'stage_file', killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(out=str(tmp_path / 'part'), name='x', **arguments)
    monkeypatch.setattr(decoded_files, 'stage_file', stage_file)
    part = prepare.prepare(out=str(tmp_path / 'part'), name='x', **arguments)
    assert part['splits'] == whole['splits']
    records = [sorted((tmp_path / name).glob('*.array_record*')) for name in ('whole', 'part')]
    assert records[0]
    for one, other in zip(*records, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_shards_without_pictures_or_captions(read, tmp_path):
    with pytest.raises(DataError, match='tar shards below .* hold no picture'):
        read('webdataset', {'0.tar': layouts.tar_of([('a.txt', b'1')])}, 'texts')
    with pytest.raises(DataError, match='no media file below .* found 1 .zip; unpack 0.zip first'):
        read('webdataset', {'0.zip': b''}, 'none')


# ---- lists of addresses


def test_cc12m_has_the_address_first(read, files):
    layout = layouts.image_lists(files)
    usual = read('image_lists', layout, 'usual')
    rows = [line.split('\t') for line in layout.pop('Train_GCC-training.tsv').splitlines()]
    layout['cc12m_train.tsv'] = layouts.lines(*(f'{url}\t{text}' for text, url in rows))
    swapped = read('image_lists', layout, 'swapped')
    assert captions_of(swapped) == captions_of(usual)
    assert usual.missing == ['http://example.org/c']
    captions = [texts[0] for texts in captions_of(usual).values()]
    assert 'a very typical "bus" station' in captions


def test_a_header_says_what_columns_are(read, files):
    layout = {
        'list.tsv': layouts.lines(
            'similarity\tTEXT\tfile\tURL',
            '0.3\ta dog\tx/1.jpg\thttp://a',
            '0.2\ta cat\t2\thttp://b',
        ),
        'pictures/x/1.jpg': files['JPEG'],
        'pictures/2.jpg': files['JPEG'],
    }
    catalog = read('image_lists', layout)
    assert captions_of(catalog) == {'pictures/x/1.jpg': ['a dog'], 'pictures/2.jpg': ['a cat']}
    assert catalog.annotations['pictures/2.jpg']['ground_truth'] == {'url': 'http://b'}
    with pytest.raises(DataError, match='expected an address and a caption .* got one, two'):
        read('image_lists', {'list.tsv': 'one\ttwo\n', 'a.jpg': files['JPEG']}, 'wrong')


def test_rows_that_cannot_be_used_are_listed(read, files):
    layout = layouts.image_lists(files)
    layout['Train_GCC-training.tsv'] += layouts.lines(
        'one field', 'a\tb\thttp://example.org/c', '\thttp://example.org/c', '', 'caption\t'
    )
    skipped = read('image_lists', layout).skipped
    assert skipped == {
        'Train_GCC-training.tsv, row 3': "expected 2 fields, got 1 ('one field')",
        'Train_GCC-training.tsv, row 4': "expected 2 fields, got 3 ('a\\tb\\thttp://example.org/c')",
        'Train_GCC-training.tsv, row 5': 'no caption',
        'Train_GCC-training.tsv, row 6': 'no address',
    }


def test_parquet_lists_of_img2dataset(tmp_path, files, monkeypatch):
    """Beside a folder of its pictures; what could not be downloaded has a row and no file."""
    monkeypatch.setattr('data_pipelines.datasets.image_lists._ROWS_AT_ONCE', 2)
    layouts.write_layout(
        tmp_path,
        {'00000/000000000.jpg': files['JPEG'], '00000/000000002.jpg': files['JPEG']},
    )
    table = {
        'url': ['http://a', 'http://b', 'http://c'],
        'caption': ['first', 'second', None],
        'key': ['000000000', '000000001', '000000002'],
        'status': ['success', 'failed_to_download', 'success'],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / '00000.parquet')
    catalog = named.read('image_lists', str(tmp_path))
    assert captions_of(catalog) == {'00000/000000000.jpg': ['first']}
    assert catalog.missing == ['000000001']
    assert catalog.skipped == {'00000.parquet, row 2': 'no caption'}
    first = catalog.identity
    table['caption'][0] = 'another'
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / '00000.parquet')
    assert named.read('image_lists', str(tmp_path)).identity != first
    (tmp_path / '00000.parquet').write_bytes(b'PAR1 and no more')
    with pytest.raises(DataError, match='is not readable as parquet'):
        named.read('image_lists', str(tmp_path))


texts = st.text(st.characters(codec='utf-8', exclude_characters='\t\r\n'), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(texts, min_size=1, max_size=3), max_size=6))
def test_every_row_of_a_list_is_a_caption_or_accounted_for(tmp_path_factory, files, written):
    """Whatever fields hold: quotes, marks of other lines, text that looks like a header."""
    folder = tmp_path_factory.mktemp('lists')
    address = 'http://example.org/a'
    rows = [f'sound\t{address}', *('\t'.join(row) for row in written)]
    layouts.write_layout(folder, {'x.tsv': layouts.lines(*rows), 'a.jpg': files['JPEG']})
    try:
        catalog = named.read('image_lists', str(folder))
    except DataError as error:
        # No picture is called by the address, so that nothing is found.
        assert 'none of the' in str(error)
        return
    raise AssertionError(catalog)


# ---- pictures with several captions


def test_cocos_captions_are_all_there(read, files):
    catalog = read('coco_captions', layouts.coco_captions(files))
    captions = captions_of(catalog)
    assert captions['train2017/000000000009.jpg'] == [f'sentence {k} about 9' for k in range(5)]
    assert captions['train2017/000000000025.jpg'] == ['A giraffe']
    assert catalog.annotations['val2017/000000000042.jpg']['ground_truth'] == {'image_id': 42}
    layout = {'annotations/captions_val2014.json': {'images': [], 'annotations': []}}
    with pytest.raises(DataError, match='annotations of 2014 and 2017 are in .* leave one year'):
        read('coco_captions', layout)


def test_karpathys_restval_is_for_training(read, files):
    catalog = read('coco_karpathy', layouts.coco_karpathy(files))
    assert dict(catalog.splits) == {
        'train2014/a.jpg': 'train',
        'val2014/b.jpg': 'train',
        'val2014/c.jpg': 'validation',
        'val2014/d.jpg': 'test',
    }
    assert len(captions_of(catalog)['val2014/d.jpg']) == 7
    assert catalog.annotations['val2014/d.jpg']['ground_truth'] == {'cocoid': 4, 'imgid': 3}


def test_flickr30k_by_its_owners_list(read, files):
    layout = layouts.flickr30k(files)
    usual = read('flickr30k', layout, 'usual')
    del layout['dataset_flickr30k.json']
    rows = []
    for name, captions in captions_of(usual).items():
        rows += [f'{name.split("/")[-1]}#{k}\t{text}' for k, text in enumerate(captions)]
    random.Random(0).shuffle(rows)
    layout['results_20130124.token'] = layouts.lines(*sorted(rows))
    owners = read('flickr30k', layout, 'owners')
    assert captions_of(owners) == captions_of(usual)
    assert set(owners.splits.values()) == {''}
    with pytest.raises(DataError, match='line 1: expected NAME.jpg#NUMBER, a tab and a caption'):
        read('flickr30k', {'results_20130124.token': 'a.jpg a dog\n', 'a.jpg': b''}, 'wrong')


@pytest.mark.parametrize(
    'name, path, content, message',
    [
        ('coco_captions', 'captions_val2017.json', {'images': []}, "has no 'annotations' at its"),
        (
            'coco_captions',
            'captions_val2017.json',
            {'images': [{'id': 1}], 'annotations': []},
            'expected "images" with "id" and "file_name"',
        ),
        (
            'coco_karpathy',
            'dataset_coco.json',
            {'images': [{'split': 'train', 'sentences': []}]},
            'expected "images" with "filename", "split" and "sentences"',
        ),
        (
            'flickr30k',
            'dataset_flickr30k.json',
            {'images': [layouts.karpathy_image('a.jpg', 'dev')]},
            "split 'dev' is unknown; expected train, restval, val, test",
        ),
    ],
)
def test_broken_caption_files(read, files, name, path, content, message):
    with pytest.raises(DataError) as error:
        read(name, {path: content, 'a.jpg': files['JPEG']})
    assert message in str(error.value)


# ---- folders of classes


def test_numbered_folders_are_in_the_order_of_their_numbers(read, files):
    """ImageNet-V2's 0 to 999, of which '10' comes behind '9'."""
    layout = {f'imagenetv2/{number}/x{number}.jpeg': files['JPEG'] for number in range(12)}
    catalog = read('class_folders', layout)
    assert catalog.classes == {'class': [str(number) for number in range(12)]}
    for number in range(12):
        annotation = catalog.annotations[f'imagenetv2/{number}/x{number}.jpeg']
        assert annotation['segments'][0]['labels'] == {'class': number}


def test_splits_and_names_of_class_folders(read, files):
    layout = {
        'train/n01440764/a.jpg': files['JPEG'],
        'val/n01443537/b.jpg': files['JPEG'],
        'test/n01440764/c.jpg': files['JPEG'],
        'd.jpg': files['JPEG'],
        'LOC_synset_mapping.txt': layouts.lines('n01440764 tench', 'n01443537 goldfish', 'n0 x'),
    }
    catalog = read('class_folders', layout)
    assert [catalog.splits[f] for f in catalog.files.ids()] == ['test', 'train', 'validation']
    assert catalog.classes == {'class': ['n01440764 tench', 'n01443537 goldfish']}
    assert catalog.skipped == {'d.jpg': 'in no class folder'}
    with pytest.raises(DataError, match='no picture of .* is in a folder of its class'):
        read('class_folders', {'a.jpg': files['JPEG']}, 'flat')


# ---- how pictures are scaled


def bicubic_weights(size, new_size):
    """[new_size size]: Keys' kernel with a = -0.5, as wide as a new pixel is (Pillow's filter)."""
    scale = max(1.0, size / new_size)
    weights = np.zeros((new_size, size))
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size
        x = np.abs((np.arange(size) + 0.5 - centre) / scale)
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights[i] = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def test_bicubic_pictures_are_those_of_published_preprocessing():
    """Of noise, which shows any other filter; Pillow rounds after each of its two passes."""
    picture = np.random.default_rng(0).integers(64, 192, (90, 130, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, 'PNG')
    scaled = media.read_image(stream, 10.0, 32, resize='bicubic')
    (found,) = scaled.frames
    rows, columns = bicubic_weights(90, 32), bicubic_weights(130, 46)
    expected = np.einsum('ih,hwc,jw->ijc', rows, picture.astype(float), columns)
    assert np.abs(found - expected).max() <= 1.01
    (averaged,) = media.read_image(stream, 10.0, 32).frames
    assert np.abs(averaged - expected).max() > 5


def test_bicubic_records_are_other_records(tmp_path, files):
    layouts.write_layout(tmp_path / 'in', layouts.class_folders(files))
    arguments = {'dataset': 'class_folders', 'manual_dir': str(tmp_path / 'in'), **SMALL}
    prepare.prepare(out=str(tmp_path / 'out'), **arguments)
    with pytest.raises(DataError, match='already prepared with other settings'):
        prepare.prepare(out=str(tmp_path / 'out'), resize='bicubic', **arguments)
    with pytest.raises(DataError, match='--resize=nearest: expected area or bicubic'):
        prepare.prepare(out=str(tmp_path / 'other'), resize='nearest', **arguments)
