"""Boxes of named datasets, from files in the layouts of their owners."""

import json

import PIL.Image
import pytest

from data_pipelines import DataError
from data_pipelines.datasets import boxes
from vatt_jax.detection import coco


def make_pictures(folder, *names):
    """Pictures of 200 by 100 pixels."""
    (folder / 'images').mkdir()
    for name in names:
        PIL.Image.new('RGB', (200, 100)).save(folder / 'images' / f'{name}.jpg')


def run(folder, dataset, *flags):
    boxes.main([f'--dataset={dataset}', f'--folder={folder}', f'--out={folder}', *flags])
    split = 'train' if '--split=train' in flags else 'test'
    return coco.read(folder / f'{split}.json')


def test_openimages(tmp_path, capsys):
    (tmp_path / 'class-descriptions-boxable.csv').write_text(
        '/m/0342h,Guitar\n/m/0cgh4,Building\n/m/07y_7,Violin\n'
    )
    (tmp_path / 'test-annotations-bbox.csv').write_text(
        'ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,'
        'IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n'
        'aa,xclick,/m/0342h,1,0.1,0.6,0.2,0.8,1,0,0,0,0\n'
        'aa,xclick,/m/0cgh4,1,0,1,0,1,0,0,0,0,0\n'
        'bb,xclick,/m/07y_7,1,0.25,0.75,0,0.5,0,0,1,0,-1\n'
        'cc,xclick,/m/07y_7,1,0,1,0,1,0,0,0,0,0\n'
    )
    make_pictures(tmp_path, 'aa', 'bb')
    document = run(tmp_path, 'openimages', '--classes=Guitar;Violin')
    assert '2 pictures with 2 boxes of 2 classes; 1 pictures are not in' in capsys.readouterr().out
    assert coco.class_names(document) == ['Guitar', 'Violin']
    assert [image['file_name'] for image in document['images']] == ['aa.jpg', 'bb.jpg']
    guitar, violins = document['annotations']
    assert guitar['bbox'] == pytest.approx([20, 20, 100, 60])
    assert (guitar['iscrowd'], guitar['occluded'], guitar['group_of']) == (0, 1, 0)
    # A group counts neither as found nor as missed.
    assert (violins['iscrowd'], violins['group_of'], violins['inside']) == (1, 1, -1)
    assert violins['bbox'] == pytest.approx([50, 0, 100, 50])
    with pytest.raises(DataError, match="no class 'Accordion'"):
        run(tmp_path, 'openimages')


def test_vggsound(tmp_path):
    (tmp_path / 'vggsound.csv').write_text(
        'abc,30,"playing cello",test\nabc,70,"playing harp",train\n'
        'xyz,0,"dog barking",test\n-_q,5,"playing harp",test\n'
    )
    make_pictures(tmp_path, 'abc_000030', 'abc_000070', '-_q_000005')
    document = run(tmp_path, 'vggsound')
    assert coco.class_names(document) == ['playing cello', 'playing harp']
    assert [image['label'] for image in document['images']] == ['playing cello', 'playing harp']
    assert document['annotations'] == []
    assert [i['file_name'] for i in run(tmp_path, 'vggsound', '--split=train')['images']] == [
        'abc_000070.jpg'
    ]
    # VGG-SS has boxes of the test clips.
    entry = {'file': 'abc_000030', 'class': 'playing cello', 'bbox': [[0.1, 0.2, 0.5, 1.0]]}
    (tmp_path / 'vggss.json').write_text(json.dumps([entry]))
    (cello,) = run(tmp_path, 'vggsound')['annotations']
    assert cello['bbox'] == pytest.approx([20, 20, 80, 80])


def test_audioset(tmp_path):
    (tmp_path / 'class_labels_indices.csv').write_text(
        'index,mid,display_name\n0,/m/a,"Violin"\n1,/m/b,"Speech"\n2,/m/c,"Harp"\n'
    )
    (tmp_path / 'eval_segments.csv').write_text(
        '# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=3\n'
        '# YTID, start_seconds, end_seconds, positive_labels\n'
        'one, 30.000, 40.000, "/m/a,/m/b"\ntwo, 0.000, 10.000, "/m/b"\n'
        'three, 0.000, 10.000, "/m/a,/m/c"\n'
    )
    make_pictures(tmp_path, 'one_000030', 'three_000000')
    document = run(tmp_path, 'audioset')
    assert coco.class_names(document) == ['Harp', 'Violin']
    assert [(i['file_name'], i['label']) for i in document['images']] == [
        ('one_000030.jpg', 'Violin')
    ]


def test_files_that_are_missing(tmp_path):
    for dataset in boxes.DATASETS:
        with pytest.raises(DataError, match='expected the file'):
            run(tmp_path, dataset)
    (tmp_path / 'class_labels_indices.csv').write_text('index,name\n0,x\n')
    with pytest.raises(DataError, match='expected the columns mid, display_name'):
        run(tmp_path, 'audioset')
