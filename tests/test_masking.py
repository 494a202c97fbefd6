"""Corruption of words and regions: shares, what is never touched, and draws keyed by example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.inputs import masking
from vatt_jax.inputs.masking import IGNORED, RegionMasking, WordMasking
from vatt_jax.rng import Rng

B, L, N, D = 2000, 10, 8, 3
MASK, FIRST, END = 4, 5, 45
WORDS = WordMasking(mask_id=MASK, vocabulary=(FIRST, END))


def sentences():
    """Numbers [B L] of words from FIRST on between 2 (begin) and 3 (end), 0 behind; maskable."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, L - 1, (B, 1))  # words, without the two marks
    place = np.arange(L)
    maskable = (place > 0) & (place <= length)
    ids = np.where(maskable, rng.integers(FIRST, END, (B, L)), 0)
    ids[:, 0] = 2
    ids[place == length + 1] = 3
    return ids, maskable


def pictures():
    """Features [B N D] without zeros, and which regions are there."""
    rng = np.random.default_rng(1)
    valid = np.arange(N) < rng.integers(1, N + 1, (B, 1))
    return rng.uniform(1, 2, (B, N, D)).astype(np.float32), valid


def draw(function, arrays, options, step=0, rows=None, examples=None):
    """Both corruptions, jitted; `rows`: of these examples alone."""
    rows = np.arange(B) if rows is None else np.asarray(rows)
    rng = Rng.create(7, step, rows)
    arrays = [array[rows] for array in arrays]
    corrupt = jax.jit(lambda *given: function(*given, options, rng, examples))
    return jax.tree.map(np.asarray, corrupt(*arrays))


def check_share(count, total, share):
    """Within five standard deviations of a binomial count."""
    assert abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share))


def test_words_are_masked_replaced_and_kept_in_their_shares():
    ids, maskable = sentences()
    found = draw(masking.mask_words, (ids, maskable), WORDS)
    assert found.ids.dtype == found.labels.dtype == np.int32
    num_masked = found.is_masked.sum()
    check_share(num_masked, maskable.sum(), 0.15)
    # Padding and marks are never chosen, and what is not chosen is never changed.
    assert not found.is_masked[~maskable].any()
    np.testing.assert_array_equal(found.ids[~found.is_masked], ids[~found.is_masked])
    np.testing.assert_array_equal(found.labels, np.where(found.is_masked, ids, IGNORED))

    chosen, before = found.ids[found.is_masked], ids[found.is_masked]
    check_share((chosen == MASK).sum(), num_masked, 0.8)
    # A random word is the same one by chance once in 40.
    check_share((chosen == before).sum(), num_masked, 0.1 + 0.1 / (END - FIRST))
    drawn = chosen[(chosen != MASK) & (chosen != before)]
    assert drawn.min() >= FIRST and drawn.max() < END


def test_random_words_are_uniform():
    ids, maskable = sentences()
    options = WordMasking(MASK, (FIRST, END), share=1.0, mask_share=0.0, random_share=1.0)
    found = draw(masking.mask_words, (ids, maskable), options)
    counts = np.bincount(found.ids[maskable], minlength=END)[FIRST:]
    expected = maskable.sum() / (END - FIRST)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_sentence_may_be_given_at_least_one_masked_word():
    ids, maskable = sentences()
    maskable = maskable & (np.arange(B) != 5)[:, None]  # nothing but marks
    plain = draw(masking.mask_words, (ids, maskable), WORDS)
    options = WordMasking(MASK, (FIRST, END), at_least_one=True)
    found = draw(masking.mask_words, (ids, maskable), options)
    lacked = ~plain.is_masked.any(1) & maskable.any(1)
    assert lacked.sum() > 100
    # Their first word, always as the mask token; other sentences are as before.
    assert (found.is_masked[lacked] == (np.arange(L) == 1)).all()
    assert (found.ids[lacked, 1] == MASK).all()
    np.testing.assert_array_equal(found.ids[~lacked], plain.ids[~lacked])
    assert not found.is_masked[5].any()


@pytest.mark.parametrize('options', [masking.UNITER_REGIONS, masking.VILBERT_REGIONS])
def test_regions_become_zeros_in_their_shares(options):
    features, valid = pictures()
    found = draw(masking.mask_regions, (features, valid), options)
    assert not found.is_masked[~valid].any()
    expected = np.where(found.is_hidden[..., None], 0, features)
    np.testing.assert_array_equal(found.features, expected)
    assert not (found.is_hidden & ~found.is_masked).any()
    num_masked = found.is_masked.sum()
    if options.at_least_one:
        assert found.is_masked.any(1).all()
        np.testing.assert_array_equal(found.is_hidden, found.is_masked)
        # Which one is drawn does not depend on its place.
        alone = found.is_masked[(found.is_masked.sum(1) == 1) & (valid.sum(1) == N)]
        counts = alone.sum(0)
        assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
    else:
        check_share(num_masked, valid.sum(), 0.15)
        check_share(found.is_hidden.sum(), num_masked, 0.9)


@pytest.mark.parametrize(
    'function, data, options',
    [
        (masking.mask_words, sentences, WordMasking(MASK, (FIRST, END), at_least_one=True)),
        (masking.mask_regions, pictures, masking.VILBERT_REGIONS),
    ],
    ids=['words', 'regions'],
)
def test_draws_are_keyed_by_seed_step_and_example(function, data, options):
    everything = draw(function, data(), options)
    # Of some rows in another order: no row depends on the batch.
    rows = [17, 3, 1999, 4]
    some = draw(function, data(), options, rows=rows)
    for one, other in zip(some, everything):
        np.testing.assert_array_equal(one, other[rows])
    again = draw(function, data(), options, step=1)
    assert (again.is_masked != everything.is_masked).mean() > 0.05
    # And on eight devices.
    mesh = jax.make_mesh((8,), ('rows',))
    by_rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('rows'))
    spread = [jax.device_put(array, by_rows) for array in data()]
    examples = jax.device_put(np.arange(B), by_rows)
    corrupt = jax.jit(
        lambda examples, *given: function(*given, options, Rng.create(7, 0, examples))
    )
    for one, other in zip(corrupt(examples, *spread), everything):
        np.testing.assert_array_equal(one, other)


def test_conditional_masking_corrupts_one_side_of_each_example():
    rng = Rng.create(7, 0, np.arange(B))
    of_words, of_regions = masking.corrupted_sides('conditional', rng)
    np.testing.assert_array_equal(of_words, ~of_regions)
    check_share(np.sum(of_words), B, 0.5)
    words = draw(masking.mask_words, sentences(), WORDS, examples=of_words)
    regions = draw(masking.mask_regions, pictures(), masking.UNITER_REGIONS, examples=of_regions)
    assert not (words.is_masked.any(1) & regions.is_masked.any(1)).any()
    np.testing.assert_array_equal(regions.is_masked.any(1), of_regions)


@pytest.mark.parametrize(
    'scheme, words, regions',
    [('joint', True, True), ('words', True, False), ('regions', False, True)],
)
def test_other_schemes_are_the_same_for_all_examples(scheme, words, regions):
    of_words, of_regions = masking.corrupted_sides(scheme, Rng.create(0, 0, np.arange(3)))
    np.testing.assert_array_equal(of_words, [words] * 3)
    np.testing.assert_array_equal(of_regions, [regions] * 3)


def test_covered_regions_overlap_a_masked_one():
    overlaps = np.array([[[1, 0.5, 0.3], [0.5, 1, 0.45], [0.3, 0.45, 1]]])
    cover = functools.partial(masking.covered_regions, jnp.asarray(overlaps))
    np.testing.assert_array_equal(cover(np.array([[True, False, False]])), [[True, True, False]])
    np.testing.assert_array_equal(cover(np.array([[False, True, False]])), [[True, True, True]])
    np.testing.assert_array_equal(cover(np.zeros((1, 3), bool)), np.zeros((1, 3), bool))


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: WordMasking(4, (5, 45), share=1.5), 'word masking: share'),
        (lambda: WordMasking(4, (5, 45), random_share=0.3), r'mask_share \+ random_share=1.1'),
        (lambda: WordMasking(4, (45, 5)), r'vocabulary: expected \(first, end\) .* got \(45, 5\)'),
        (lambda: RegionMasking(zero_share=-0.1), 'region masking: zero_share'),
        (
            lambda: masking.corrupted_sides('both', Rng.create(0, 0, np.arange(2))),
            'masking: scheme.*joint, conditional, words, regions',
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
