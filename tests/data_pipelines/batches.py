"""Host batches as trees: rows stacked and chosen, and the contract that every batch keeps."""

import chex
import jax
import numpy as np


def concatenate(batches):
    """One batch with the rows of several, which must have the same structure."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def stack(iterator, count):
    """One batch with the rows of the next `count` batches of an iterator."""
    return concatenate([next(iterator) for _ in range(count)])


def take(batch, rows):
    """The rows of a batch that a slice or a mask chooses."""
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def assert_equal(got, expected):
    """Two batches have the same streams, shapes, types and values."""
    chex.assert_trees_all_equal(got, expected, strict=True)


def assert_contract(batch, config, num_rows, views=(), label_classes=None, frame_size=None):
    """A batch has exactly the entries, shapes and types of the contract of docs/architecture.md.

    Args:
      batch: from an iterator of the data pipelines.
      config: of the run; its model.inputs say how large the streams are.
      num_rows: of the batch, B.
      views: names of the streams besides the three main ones.
      label_classes: {label: number of classes if it is multi-hot, else None}.
      frame_size: height and width of the frames, if not the size that the model sees.
    """
    frame_size = frame_size or config.model.inputs.video.size
    expected = {
        'index': np.zeros(num_rows, np.int32),
        'source': np.zeros(num_rows, np.int32),
        'position': np.zeros(num_rows, np.int64),
        'valid': np.zeros(num_rows, bool),
        'labels': {},
    }
    for label, num_classes in (label_classes or {}).items():
        if num_classes is None:
            expected['labels'][label] = np.zeros(num_rows, np.int32)
        else:
            expected['labels'][label] = np.zeros((num_rows, num_classes), np.float32)
    for name in ('video', 'audio', 'text', *views):
        expected[name] = _stream_like(name, config.model.inputs, num_rows, frame_size)
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, expected)


def _stream_like(name, inputs, num_rows, frame_size):
    """Zeros with the shapes and types of the stream of this name."""
    stream = {'valid': np.zeros(num_rows, bool), 'start': np.zeros(num_rows, np.float32)}
    modality = name.partition('.')[0]
    if modality == 'video':
        shape = (num_rows, inputs.video.frames, frame_size, frame_size, 3)
        stream['data'] = np.zeros(shape, np.uint8)
        stream['box'] = np.zeros((num_rows, 4), np.float32)
        stream['flip'] = np.zeros(num_rows, bool)
    elif modality == 'audio':
        stream['data'] = np.zeros((num_rows, inputs.audio.samples), np.int16)
    else:
        candidates = 1 if name == 'text.caption' else inputs.text.candidates
        stream['data'] = np.zeros((num_rows, candidates, inputs.text.words), np.int32)
        stream['mask'] = np.zeros((num_rows, candidates), bool)
    return stream
