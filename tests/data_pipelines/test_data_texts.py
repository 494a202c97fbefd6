"""What the data say of their examples: like a list, and made only when it is looked at."""

import numpy as np
import pytest

import data_pipelines
from data_pipelines.loading.texts import Texts
from tests import tiny
from vatt_jax.modes import embed


def squares(made=None):
    """Texts of ten examples; the places that were asked for are appended to `made`."""

    def entry(place):
        if made is not None:
            made.append(place)
        return {'id': str(place * place)}

    return Texts(range(10), entry)


EXPECTED = [{'id': str(place * place)} for place in range(10)]


def test_texts_are_like_a_list():
    texts = squares()
    assert len(texts) == 10
    assert list(texts) == EXPECTED
    assert texts == EXPECTED
    assert EXPECTED == texts
    assert texts != EXPECTED[:9]
    assert texts != [*EXPECTED[:9], {'id': 'another'}]
    assert texts[-1] == EXPECTED[-1]
    assert texts[np.int64(3)] == EXPECTED[3]
    assert list(reversed(texts)) == EXPECTED[::-1]
    for part in (slice(2, 5), slice(None, None, -3), slice(8, 100), slice(5, 2)):
        assert texts[part] == EXPECTED[part]
    assert texts[2:8][1:3] == EXPECTED[3:5]
    for outside in (10, -11):
        with pytest.raises(IndexError):
            texts[outside]


def test_only_what_is_looked_at_is_made():
    made = []
    texts = squares(made)
    assert len(texts) == 10
    assert len(texts[3:]) == 7
    assert not made
    assert texts[3:][0] == EXPECTED[3]
    assert next(iter(texts[5:])) == EXPECTED[5]
    assert made == [3, 5]


def naive_text(index, record, start, end, caption):
    """An entry by its definition, written out."""
    sentences = []
    for i in range(len(index.sentence_start)):
        is_of_record = index.sentence_offset[record] <= i < index.sentence_offset[record + 1]
        overlaps = index.sentence_end[i] >= start and index.sentence_start[i] <= end
        if is_of_record and overlaps:
            sentences.append(index.sentence_text[i])
    return {
        'id': index.id[record],
        'start': start,
        'end': end,
        'caption': caption,
        'sentences': sentences,
        'ground_truth': index.ground_truth[record],
    }


@pytest.mark.parametrize('split', ['train', 'test'])
def test_texts_of_records_and_segments(config, split):
    """Of two sources by records, of the evaluation dataset by segments."""
    path = config.data.train.clocks.path
    config.data.train = {'a': {'path': path}, 'b': {'path': path}}
    data = data_pipelines.open(config)
    index = data._splits_of_pass(split, 'segments')[0].index
    by_record = []
    for record in range(len(index)):
        first, last = index.segment_offset[record : record + 2]
        captions = [caption for caption in index.segment_caption[first:last] if caption]
        duration = float(index.duration[record])
        by_record.append(naive_text(index, record, 0.0, duration, ' '.join(captions)))
    copies = 2 if split == 'train' else 1  # the mixture, or the evaluation dataset
    assert data.texts(split, 'records') == by_record * copies

    by_segment = []
    for segment, record in enumerate(index.segment_record):
        start = float(index.segment_start[segment])
        end = float(index.segment_end[segment])
        caption = index.segment_caption[segment]
        by_segment.append(naive_text(index, int(record), start, end, caption))
    assert len(data.texts(split)) == data.size(split, 'segments')
    assert data.texts(split) == by_segment
    assert len(data.texts('validation')) == 0


def test_embeddings_take_the_texts_of_their_rows(monkeypatch):
    """Places that are missing, blocks of several widths, and plain lists as users' data give."""
    monkeypatch.setattr(embed, 'TEXTS_AT_ONCE', 2)
    texts = [{'id': 'x' * i, 'start': i / 2, 'sentences': []} for i in range(1, 8)]
    features = {'pooled': {}, 'spaces': {}, 'labels': {}, 'valid': {}, 'mask': {}}
    for index in ([0, 1, 3, 4, 6], []):
        arrays = embed.as_arrays({**features, 'index': np.array(index, int)}, texts)
        assert arrays['id'].tolist() == ['x' * (i + 1) for i in index]
        assert arrays['start'].tolist() == [(i + 1) / 2 for i in index]
    lazy = Texts(range(7), texts.__getitem__)
    arrays = embed.as_arrays({**features, 'index': np.array([6, 2])}, lazy)
    assert arrays['id'].tolist() == ['x' * 7, 'x' * 3]


def test_a_large_synthetic_split_has_texts_at_once():
    config = tiny.config(data__synthetic_size=10**8)
    texts = data_pipelines.open(config).texts('train')
    assert len(texts) == 10**8
    assert texts[-1]['id'] == f'train/{10**8 - 1}'
