"""SpecAugment on the device, and spectrograms normalised by given numbers."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.inputs import spectrogram
from vatt_jax.inputs.spec_augment import spec_augment
from vatt_jax.rng import Rng
from vatt_jax.training import loop

B, T, F = 2000, 12, 7
MEL = {'bins': F, 'window': 256, 'hop': 128, 'low': 60.0, 'high': 900.0}


def masked(examples=None, **fields):
    """bool [B T F]: what is masked of spectrograms without zeros."""
    config = {'frequency_masks': 0, 'frequency_width': 0, 'time_masks': 0, 'time_width': 0}
    examples = jnp.arange(B) if examples is None else examples
    rng = Rng.create(0, 0, examples)
    x = jnp.ones((len(examples), T, F))
    return np.asarray(spec_augment(x, {**config, **fields}, rng)) == 0


def runs(line):
    """(start, length) of each run of True in a line."""
    found = []
    for place, value in enumerate(line):
        if value and (place == 0 or not line[place - 1]):
            found.append((place, 0))
        if value:
            start, length = found[-1]
            found[-1] = (start, length + 1)
    return found


@pytest.mark.parametrize(
    'fields, axis, length',
    [
        ({'time_masks': 1, 'time_width': 6}, 1, T),
        ({'frequency_masks': 1, 'frequency_width': 3}, 2, F),
    ],
)
def test_a_mask_is_one_run_of_fewer_places_than_its_width(fields, axis, length):
    """Every width below it and every start that fits occur, about equally often."""
    is_masked = masked(**fields)
    lines = is_masked.any(axis=3 - axis)  # [B length]
    # The whole of a band or of a frame.
    assert (is_masked.all(axis=3 - axis) == lines).all()

    width = next(value for name, value in fields.items() if name.endswith('width'))
    sizes, starts = collections.Counter(), collections.Counter()
    for line in lines:
        found = runs(line)
        assert len(found) <= 1
        start, size = found[0] if found else (0, 0)
        sizes[size] += 1
        if size == 1:
            starts[start] += 1
    assert set(sizes) == set(range(width))
    # Five standard deviations of a binomial count.
    expected = B / width
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in sizes.values())
    assert set(starts) == set(range(length))


def test_masks_are_keyed_by_example():
    fields = {'time_masks': 2, 'time_width': 4, 'frequency_masks': 1, 'frequency_width': 3}
    all_rows = masked(**fields)
    some = jnp.array([7, 3, 1999])
    np.testing.assert_array_equal(masked(some, **fields), all_rows[np.asarray(some)])
    assert all_rows.any(axis=(1, 2)).mean() > 0.8
    assert len(np.unique(all_rows.reshape(B, -1), axis=0)) > B // 2


@pytest.mark.parametrize('form', ['mel', 'filterbank'])
def test_a_normalised_spectrogram_is_the_plain_one_less_mean_over_deviation(form):
    x = np.float32(np.random.default_rng(0).normal(size=(2, 1000)) * 0.1)
    mel = {**MEL, 'form': form, 'stretch': False}
    plain = np.float64(spectrogram.log_mel(jnp.asarray(x), 2000, mel))
    normalised = {**mel, 'mean': 1.93, 'deviation': 17.89}
    got = spectrogram.log_mel(jnp.asarray(x), 2000, normalised)
    np.testing.assert_allclose(got, (plain - 1.93) / 17.89, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'mel, masks, message',
    [
        ({}, {'time_masks': 1}, 'spec_augment: expected a model that reads spectrograms'),
        (MEL, {'time_masks': 1, 'time_width': 9}, 'spec_augment.time_width: expected at most 8'),
        (
            MEL,
            {'frequency_masks': 1, 'frequency_width': 8},
            'spec_augment.frequency_width: expected at most 7, the size of the spectrogram, got 8',
        ),
        ({**MEL, 'deviation': 0.0}, {'time_masks': 1}, 'mel.deviation: expected a positive number'),
    ],
)
def test_what_cannot_be_masked_is_refused(mel, masks, message):
    config = tiny.config()
    config.model.inputs.audio.mel = mel
    if mel:
        config.model.towers.audio = {'name': 'spt', 'layers': 1, 'patch': (2, 7)}
    config.augment.spec_augment.update(masks)
    with pytest.raises(ConfigError, match=message):
        loop.check(config)
