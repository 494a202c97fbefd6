"""ViLBERT and UNITER against their released forms in float64, and their files."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import released_vision_language as released
from vatt_jax.config import ConfigError
from vatt_jax.importers import pickles, vision_language
from vatt_jax.importers.pickles import torch_writer
from vatt_jax.inputs.regions import Regions, Words, add_global, box_numbers, pad
from vatt_jax.models.vision_language import (
    UNITER,
    VILBERT,
    Uniter,
    UniterSizes,
    Vilbert,
    VilbertSizes,
)
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

B, L, N = 8, 6, 5
RNG = Rng.create(0, 0, jnp.arange(B))
NUM_WORDS, NUM_REGIONS = (6, 4, 2), (5, 3, 1)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pairs(form, batch=B, is_hidden=False):
    """(words, regions) of noise; padding holds noise too."""
    rng = np.random.default_rng(0)
    counts = np.arange(batch) % 3
    words = Words(
        ids=rng.integers(0, 50, (batch, L)).astype(np.int32),
        mask=np.arange(L)[None] < np.array(NUM_WORDS)[counts][:, None],
        types=rng.integers(0, 2, (batch, L)).astype(np.int32),
    )
    mask = np.arange(N)[None] < np.array(NUM_REGIONS)[counts][:, None]
    regions = Regions(noise(1, batch, N, 12), noise(2, batch, N, form), mask)
    if is_hidden:
        regions = regions.replace(is_hidden=rng.random((batch, N)) < 0.5)
    return words, regions


def case(kind):
    """(model, state dict, words, regions, definition of one pair)."""
    if kind == 'vilbert':
        sizes = VILBERT['tiny']
        arrays = released.draw(released.vilbert_shapes(sizes))
        return Vilbert(sizes), arrays, *pairs(5), released.vilbert
    sizes = UNITER['tiny']
    arrays = released.draw(released.uniter_shapes(sizes))
    return Uniter(sizes), arrays, *pairs(7, is_hidden=True), released.uniter


@functools.partial(jax.jit, static_argnums=(0, 5))
def apply(model, params, words, regions, rng, train):
    return model.apply({'params': params}, words, regions, rng, train)


def run(model, params, words, regions, train=False, rng=RNG):
    """Compiled once for each model: equal ones are equal arguments."""
    return apply(model, params, words, regions, rng, train)


def flat(outputs):
    """{name: array} of outputs and of what they hold encoded."""
    values = {**vars(outputs), **vars(outputs.encoded)}
    values.pop('encoded')
    return values


KINDS = ('vilbert', 'uniter')


@pytest.mark.parametrize('kind', KINDS)
def test_every_output_is_that_of_the_released_model(kind, tmp_path):
    model, arrays, words, regions, define = case(kind)
    torch_writer.write(tmp_path / 'model.bin', arrays)
    params = vision_language.read(tmp_path / 'model.bin', model).params
    got = flat(run(model, params, words, regions))
    # Later rows have the masks of these.
    for row in range(3):
        w, r = words.mask[row], regions.mask[row]
        extra = () if regions.is_hidden is None else (regions.is_hidden[row, r],)
        inputs = (words.ids[row, w], words.types[row, w], regions.features[row, r])
        expected = define(arrays, model.sizes, *inputs, regions.boxes[row, r], *extra)
        assert set(expected) == set(got)
        for name, value in expected.items():
            # Padding stands at the end; pooled vectors have none.
            real = got[name][row] if value.ndim == 1 else got[name][row, : len(value)]
            np.testing.assert_allclose(real, value, rtol=1e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize('kind', KINDS)
def test_padding_changes_nothing(kind):
    model, arrays, words, regions, _ = case(kind)
    params = vision_language.from_state_dict(arrays, model).params
    noisy = regions.replace(
        features=np.where(regions.mask[..., None], regions.features, 1e3),
        boxes=np.where(regions.mask[..., None], regions.boxes, -7),
    )
    other = words.replace(ids=np.where(words.mask, words.ids, 17))
    expected, got = (
        flat(run(model, params, *inputs)) for inputs in ((words, regions), (other, noisy))
    )
    for name, value in expected.items():
        mask = np.ones(B, bool)
        if value.ndim == 3:
            mask = words.mask if value.shape[1] == L else regions.mask
        np.testing.assert_array_equal(value[mask], got[name][mask], err_msg=name)


WITH_DROPOUT = [pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize('kind, train', [('vilbert', False), *WITH_DROPOUT])
def test_eight_devices_compute_what_one_does(kind, train):
    model, arrays, words, regions, _ = case(kind)
    params = vision_language.from_state_dict(arrays, model).params
    expected = run(model, params, words, regions, train)
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2})

    def init():
        return model.init(jax.random.key(0), words, regions, RNG, False)['params']

    layout = sharding.tree_shardings(jax.eval_shape(init), mesh)
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, layout)
        got = run(model, placed, *jax.device_put((words, regions), rows), train)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=1e-4)


def test_dropout_is_where_bert_has_it():
    """None inside the feed-forward part."""
    text, co = (Vilbert(VILBERT['tiny']).bind({}).text_layer[0], Uniter(UNITER['tiny']).bind({}))
    for options in (text.options, co.layer[0].options):
        assert options.hidden_dropout == 0.0
        assert options.dropout == options.attention_dropout == 0.1


# ---- files


@pytest.mark.parametrize('kind', KINDS)
def test_files_come_back_as_they_were(kind, tmp_path):
    model, arrays, *_ = case(kind)
    other_task = {'vil_logit.weight': noise(3, 1, 16)}
    torch_writer.write(tmp_path / 'in.bin', {**arrays, **other_task})
    weights = vision_language.read(tmp_path / 'in.bin', model)
    unused = set(weights.unused)
    assert 'vil_logit.weight' in unused
    # Dense layers of the release that nothing reads.
    dead = {name for name in arrays if 'q_dense' in name}
    assert unused == {'vil_logit.weight', *dead}
    assert weights.read + len(unused) == len(arrays) + 1
    vision_language.write(tmp_path / 'out.bin', weights.params, model, weights.unused)
    chex.assert_trees_all_equal(pickles.read(tmp_path / 'out.bin'), {**arrays, **other_task})


def test_old_names_of_norms_are_read():
    model, arrays, *_ = case('uniter')
    old = {}
    for name, array in arrays.items():
        if '.LayerNorm.' in name:
            name = name.replace('.weight', '.gamma').replace('.bias', '.beta')
        old[name] = array
    got = vision_language.from_state_dict(old, model).params
    chex.assert_trees_all_equal(got, vision_language.from_state_dict(arrays, model).params)


def test_what_does_not_fit_is_named():
    model, arrays, *_ = case('vilbert')
    missing = dict(arrays)
    del missing['bert.v_pooler.dense.bias']
    with pytest.raises(ConfigError, match='lacks 1 of .* bert.v_pooler.dense.bias'):
        vision_language.from_state_dict(missing, model)
    wide = {**arrays, 'bert.t_pooler.dense.weight': noise(0, 16, 25)}
    with pytest.raises(
        ConfigError, match=r't_pooler.dense.weight has shape \[16, 25\].*\[16, 24\]'
    ):
        vision_language.from_state_dict(wide, model)
    untied = {**arrays, 'cls.predictions.decoder.weight': noise(0, 50, 24)}
    with pytest.raises(ConfigError, match='decoder.weight: expected the numbers of bert.embed'):
        vision_language.from_state_dict(untied, model)


@pytest.mark.parametrize(
    'name, option',
    [
        ('bert.embeddings.task_embeddings.weight', 'task_specific_tokens'),
        ('bert.encoder.v_layer.0.attention.self.dyLinear_q.weight', 'dynamic_attention'),
    ],
)
def test_a_file_of_an_option_that_is_not_there_is_refused(name, option, tmp_path):
    model, arrays, *_ = case('vilbert')
    params = vision_language.from_state_dict(arrays, model).params
    torch_writer.write(tmp_path / 'model.bin', {**arrays, name: noise(0, 20, 24)})
    with pytest.raises(ConfigError, match=f'{name}: .*--{option}'):
        vision_language.read(tmp_path / 'model.bin', model)
    with pytest.raises(ConfigError, match=f'--{option}'):
        vision_language.start_from(tmp_path / 'model.bin', model, params)


@pytest.mark.parametrize('kind', KINDS)
def test_a_bert_begins_either_model(kind, tmp_path):
    model, arrays, *_ = case(kind)
    params = vision_language.from_state_dict(arrays, model).params
    layers = model.sizes.text if kind == 'vilbert' else model.sizes.layers
    bert = released.draw(released.bert_shapes(model.sizes, layers), seed=9)
    torch_writer.write(tmp_path / 'bert.bin', bert)
    weights = vision_language.start_from(tmp_path / 'bert.bin', model, params, bert=True)
    prefix = 'bert' if kind == 'vilbert' else 'uniter'
    for name, value in vision_language.to_state_dict(weights.params, model).items():
        # ViLBERT's poolers have another width; UNITER has BERT's.
        begun = name.replace(prefix, 'bert', 1)
        np.testing.assert_array_equal(value, bert.get(begun, arrays[name]), err_msg=name)
    pooler = {'bert.pooler.dense.weight', 'bert.pooler.dense.bias'}
    unused = {'cls.seq_relationship.weight', 'cls.seq_relationship.bias'}
    assert set(weights.unused) == (unused | pooler if kind == 'vilbert' else unused)
    assert 'region_embeddings/features/kernel' in weights.kept
    assert not any(name.startswith('text_embeddings') for name in weights.kept)


def test_a_file_without_heads_leaves_them_as_they_were(tmp_path):
    model, arrays, *_ = case('uniter')
    params = vision_language.from_state_dict(arrays, model).params
    encoder = {name: array + 1 for name, array in arrays.items() if name.startswith('uniter.')}
    torch_writer.write(tmp_path / 'vqa.pt', encoder)
    weights = vision_language.start_from(tmp_path / 'vqa.pt', model, params)
    assert {name.partition('/')[0] for name in weights.kept} == {
        'word_head',
        'feature_head',
        'class_head',
        'match_head',
    }
    torch_writer.write(tmp_path / 'other.pt', {'fc.weight': noise(0, 2, 2)})
    with pytest.raises(ConfigError, match='expected variables of uniter, got fc.weight'):
        vision_language.start_from(tmp_path / 'other.pt', model, params)


# ---- sizes

RELEASED_VILBERT = {
    'attention_probs_dropout_prob': 0.1,
    'hidden_act': 'gelu',
    'hidden_dropout_prob': 0.1,
    'hidden_size': 768,
    'intermediate_size': 3072,
    'max_position_embeddings': 512,
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'type_vocab_size': 2,
    'vocab_size': 30522,
    'v_feature_size': 2048,
    'v_target_size': 1601,
    'v_hidden_size': 1024,
    'v_num_hidden_layers': 6,
    'v_num_attention_heads': 8,
    'v_intermediate_size': 1024,
    'bi_hidden_size': 1024,
    'bi_num_attention_heads': 8,
    'v_hidden_act': 'gelu',
    'v_biattention_id': [0, 1, 2, 3, 4, 5],
    't_biattention_id': [6, 7, 8, 9, 10, 11],
    'pooling_method': 'mul',
}


def test_presets_are_the_released_configs():
    assert VilbertSizes.from_release(RELEASED_VILBERT) == VILBERT['base']
    with pytest.raises(ConfigError, match='dynamic_attention: only False is built, got True'):
        VilbertSizes.from_release({**RELEASED_VILBERT, 'dynamic_attention': True})
    with pytest.raises(ConfigError, match='v_hidden_act: expected that of hidden_act'):
        VilbertSizes.from_release({**RELEASED_VILBERT, 'v_hidden_act': 'relu'})
    uniter = {
        name: value
        for name, value in RELEASED_VILBERT.items()
        if not name.startswith(('v_', 't_', 'bi_'))
    }
    assert UniterSizes.from_release({**uniter, 'vocab_size': 28996}) == UNITER['base']
    del uniter['hidden_size']
    with pytest.raises(ConfigError, match="expected a field 'hidden_size'"):
        UniterSizes.from_release(uniter)
    with pytest.raises(ConfigError, match='text_stops: expected numbers from 0 to 12'):
        dataclasses.replace(VILBERT['base'], text_stops=(6, 7, 8, 9, 10, 13))


def count(model, without):
    """Parameters in millions."""
    total = 0
    for path, leaf in vision_language.abstract(model).items():
        if not any(part in path for part in without):
            total += leaf.size
    return total / 1e6


@pytest.mark.slow
def test_published_numbers_of_parameters():
    """UNITER: 86 M without embeddings and heads; ViLBERT: 221 M without word embeddings."""
    heads = ('word_head', 'feature_head', 'region_head', 'class_head', 'match_head')
    assert count(Uniter(UNITER['base']), (*heads, 'text_embeddings')) == pytest.approx(86, abs=2)
    # The release has two dense layers more in each co-attention, which nothing reads.
    dead = 6 * (1024 + 1) * (1024 + 768) / 1e6
    vilbert = count(Vilbert(VILBERT['base']), (*heads, 'word_table'))
    assert vilbert + dead == pytest.approx(221, abs=3)


# ---- regions


def test_boxes_are_told_by_five_or_seven_numbers():
    corners = np.array([[0.1, 0.2, 0.5, 0.8]])
    np.testing.assert_allclose(box_numbers(corners, 5), [[0.1, 0.2, 0.5, 0.8, 0.24]], rtol=1e-6)
    seven = [[0.1, 0.2, 0.5, 0.8, 0.4, 0.6, 0.24]]
    np.testing.assert_allclose(box_numbers(corners, 7), seven, rtol=1e-6)
    with pytest.raises(ValueError, match='got 6'):
        box_numbers(corners, 6)


def test_pictures_are_padded_and_cut():
    features = [noise(0, 2, 4), noise(1, 5, 4)]
    corners = [np.abs(noise(2, 2, 4)), np.abs(noise(3, 5, 4))]
    regions = pad(features, corners, 3, 5)
    np.testing.assert_array_equal(regions.mask, [[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(regions.features[1], features[1][:3])
    assert not regions.features[0, 2].any() and not regions.boxes[0, 2].any()
    with pytest.raises(ValueError, match='picture 1: .* got 4 boxes and 5 features'):
        pad(features, [corners[0], corners[1][:4]], 3, 5)


def test_the_global_region_is_divided_by_what_is_not_covered():
    _, regions = pairs(5, batch=3)
    is_covered = np.zeros((3, N), bool)
    is_covered[0, :2] = is_covered[2, 0] = True
    got = add_global(regions, is_covered)
    sums = np.where(regions.mask[..., None], regions.features, 0).sum(1)
    # Five regions but two; three; one, which is covered: divided by 1.
    np.testing.assert_allclose(got.features[:, 0], sums / [[3], [3], [1]], rtol=1e-5)
    np.testing.assert_array_equal(got.boxes[:, 0], np.tile([0, 0, 1, 1, 1], (3, 1)))
    assert got.mask[:, 0].all()
    np.testing.assert_array_equal(got.mask[:, 1:], regions.mask)
