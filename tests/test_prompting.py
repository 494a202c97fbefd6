"""Visual prompts, CoOp, PGN, video prompting and the loss by class names, against definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tests import tiny_clip
from tests.test_adapters import HEADS, LAYERS, adapted_clip, clip_variables, encode
from tests.test_clip_towers import (
    B,
    attend,
    batch_norm,
    convolution,
    layer_norm,
    openai_block,
    openai_patches,
)
from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.models import adapters
from vatt_jax.models.adapters.coop import arrange
from vatt_jax.models.adapters.visual_prompt import frame_places
from vatt_jax.objectives import class_names
from vatt_jax.rng import Rng

WIDTH = tiny_clip.SIZE['width']


# ---- visual prompts
def test_a_frame_has_the_papers_number_of_parameters():
    assert 3 * len(frame_places(224, 30)) == 69_840


def prompted(form, width, size=6, seed=0):
    """What is added to two clips of two black frames, and the parameters; [2 2 size size 3]."""
    tower = adapters.Tower('video', size=size)
    fields = {'name': 'visual_prompt', 'form': form, 'width': width}
    module = adapters.build(fields, {'video': tower}, 'float32')['video']
    data = jnp.zeros((2, 2, size, size, 3))
    rng = Rng.create(seed, 0, jnp.arange(2))
    variables = meta.unbox(module.init(jax.random.key(1), data, rng, method='pixels'))
    added = module.apply(variables, data, rng, method='pixels')
    return np.asarray(added), np.asarray(variables['params']['pixels'])


def test_a_frame_lies_along_the_border():
    added, values = prompted('frame', 2)
    expected = np.zeros((6, 6, 3))
    remaining = list(values)
    for row in range(6):
        for column in range(6):
            if min(row, column, 5 - row, 5 - column) < 2:
                expected[row, column] = remaining.pop(0)
    assert not remaining
    for clip in range(2):
        for frame in range(2):
            np.testing.assert_array_equal(added[clip, frame], expected.astype(np.float32))


def test_a_patch_is_at_the_corner_and_a_random_one_anywhere():
    added, values = prompted('patch', 3)
    np.testing.assert_array_equal(added[0, 0, :3, :3], values)
    assert np.count_nonzero(added[0, 0]) == values.size
    places = set()
    for seed in range(6):
        added, values = prompted('random', 3, seed=seed)
        np.testing.assert_array_equal(added[:, 0], added[:, 1])
        for clip in range(2):
            rows, columns, _ = np.nonzero(added[clip, 0])
            top, left = rows.min(), columns.min()
            np.testing.assert_array_equal(added[clip, 0, top : top + 3, left : left + 3], values)
            places.add((top, left))
    assert len(places) > 4
    assert {place[0] for place in places} <= {0, 1, 2, 3}


def test_a_frame_too_wide_is_refused():
    with pytest.raises(ConfigError, match="expected at most 3 for form='frame' and pictures of 6"):
        prompted('frame', 4)


# ---- words
def slots_of(sentence, vectors, prefix, postfix, end):
    """The definition, place by place: 'w3' is word 3 of the sentence, 'v3' slot 3."""
    out = []
    new_end = min(end + prefix + postfix, len(sentence) - 1)
    for place in range(len(sentence)):
        word = place - prefix
        if place == 0:
            out.append(sentence[0])
        elif place == new_end:
            out.append(sentence[end])
        elif 1 <= word < end and place < new_end:
            out.append(sentence[word])
        else:
            out.append(vectors[place])
    return np.stack(out), new_end


@pytest.mark.parametrize('prefix, postfix, end', [(3, 0, 2), (2, 3, 4), (4, 4, 9), (0, 0, 5)])
def test_learnt_vectors_stand_around_the_name(prefix, postfix, end):
    noise = np.random.default_rng(0)
    sentence, vectors = noise.normal(size=(2, 12, 4)).astype(np.float32)
    expected, new_end = slots_of(sentence, vectors, prefix, postfix, end)
    words, slots = jnp.asarray(sentence[None]), jnp.asarray(vectors)
    found, read = arrange(words, jnp.array([end]), slots, prefix, postfix, 1)
    assert int(read[0]) == new_end
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize(
    'name, fields',
    [
        ('coop', {'context': 2}),
        pytest.param('video_prompting', {'prefix': 1, 'postfix': 1}, marks=pytest.mark.slow),
    ],
)
def test_learnt_words_in_clips_text_tower(name, fields):
    m, batch = adapted_clip(name=name, modalities=('text',), **fields)
    variables, weights, new = clip_variables(m, batch)
    vectors = np.zeros((tiny_clip.WORDS, WIDTH))
    if name == 'coop':
        vectors[1:3] = new['adapters_text/vectors']
        prefix, postfix = 2, 0
    else:
        vectors = new['adapters_text/slots']
        prefix, postfix = 1, 1
    pooled = encode(m, variables, batch, 'text').pooled
    for row in range(B):
        ids = batch['text']['data'][row, 0]
        words = weights['token_embedding.weight'][ids]
        x, end = slots_of(words, vectors, prefix, postfix, int(np.argmax(ids)))
        x = x + weights['positional_embedding']
        for layer in range(LAYERS):
            x = openai_block(weights, f'transformer.resblocks.{layer}.', x, HEADS, causal=True)
        expected = layer_norm(weights, 'ln_final.', x)[end]
        np.testing.assert_allclose(pooled[row, 0], expected, rtol=3e-4, atol=3e-4)


def test_frames_meet_in_a_transformer_before_they_are_averaged():
    tower = adapters.Tower('video', layers=2, width=8, frames=3, by_frame=True)
    fields = {'name': 'video_prompting', 'layers': 1, 'heads': 2}
    module = adapters.build(fields, {'video': tower}, 'float32')['video']
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    variables = meta.unbox(module.init(jax.random.key(1), vectors, method='frames'))
    found = module.apply(variables, vectors, method='frames')
    flat = {
        k: np.asarray(v, np.float64) for k, v in flatten_dict(variables['params'], sep='/').items()
    }
    block = {k.removeprefix('blocks_0/'): v for k, v in flat.items() if k.startswith('blocks_0/')}
    for row in range(2):
        x = vectors[row] + flat['times']
        y = layer_norm(block, 'attention_norm/', x, leaves=('scale', 'bias'))
        query, key, value = (
            np.einsum('nd,dhk->nhk', y, block[f'{name}/kernel']) + block[f'{name}/bias']
            for name in ('query', 'key', 'value')
        )
        attended = attend(*(part.reshape(3, 8) for part in (query, key, value)), heads=2)
        x = x + np.einsum('nhk,hkd->nd', attended.reshape(3, 2, 4), block['out/kernel'])
        x = x + block['out/bias']
        y = layer_norm(block, 'mlp_norm/', x, leaves=('scale', 'bias'))
        hidden = y @ block['mlp_in/kernel'] + block['mlp_in/bias']
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        x = x + hidden @ block['mlp_out/kernel'] + block['mlp_out/bias']
        np.testing.assert_allclose(found[row], x.mean(0), rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_divide_the_width_are_refused():
    tower = adapters.Tower('video', layers=2, width=8, frames=3, by_frame=True)
    fields = {'name': 'video_prompting', 'heads': 3}
    module = adapters.build(fields, {'video': tower}, 'float32')['video']
    with pytest.raises(ConfigError, match='adapter.heads: expected a divisor of the width 8'):
        module.init(jax.random.key(1), jnp.zeros((2, 3, 8)), method='frames')


# ---- PGN
def small_resnet(flat, picture, num_groups):
    """The network in evaluation: kernels [h w I O] by their names in the adapter."""

    def unit(name, x, stride, relu):
        kernel = flat[f'params/network/{name}/conv/kernel'].transpose(3, 2, 0, 1)
        norm = {
            'weight': flat[f'params/network/{name}/norm/scale'],
            'bias': flat[f'params/network/{name}/norm/bias'],
            'running_mean': flat[f'batch_stats/network/{name}/norm/mean'],
            'running_var': flat[f'batch_stats/network/{name}/norm/var'],
        }
        y = batch_norm(norm, '', convolution(kernel, x, stride))
        return np.maximum(y, 0) if relu else y

    x = unit('stem', picture, 2, True)
    for group in range(num_groups):
        stride = 1 if group == 0 else 2
        shortcut = x
        if f'params/network/group_{group}_short/conv/kernel' in flat:
            shortcut = unit(f'group_{group}_short', x, stride, False)
        y = unit(f'group_{group}_first', x, stride, True)
        x = np.maximum(unit(f'group_{group}_second', y, 1, False) + shortcut, 0)
    pooled = x.mean((0, 1))
    return pooled @ flat['params/network/logits/kernel'] + flat['params/network/logits/bias']


def test_pgn_mixes_its_library_and_its_prompts_stand_last():
    fields = {'prompts': 2, 'library': 5, 'widths': (3, 4)}
    m, batch = adapted_clip(name='pgn', modalities=('video',), **fields)
    variables, weights, _ = clip_variables(m, batch)
    flat = {}
    for group in ('params', 'batch_stats'):
        tree = {group: variables[group]['adapters_video']}
        for path, x in flatten_dict(tree, sep='/').items():
            flat[path] = np.asarray(x, np.float64)
    encoded = encode(m, variables, batch, 'video', features=True)
    for row in range(B):
        picture = np.asarray(batch['video']['data'][row, 0], np.float64)
        logits = small_resnet(flat, picture, 2).reshape(2, 5)
        mixture = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        prompts = mixture @ flat['params/library']
        x = openai_patches(weights['visual.conv1.weight'], picture)
        x = np.concatenate([weights['visual.class_embedding'][None], x])
        x = np.concatenate([x + weights['visual.positional_embedding'], prompts])
        x = layer_norm(weights, 'visual.ln_pre.', x)
        for layer in range(LAYERS):
            x = openai_block(weights, f'visual.transformer.resblocks.{layer}.', x, HEADS)
        x = layer_norm(weights, 'visual.ln_post.', x)
        np.testing.assert_allclose(encoded.pooled[row], x[0], rtol=5e-4, atol=5e-4)
        np.testing.assert_allclose(encoded.tokens[row], x[1:-2], rtol=5e-4, atol=5e-4)


# ---- the loss
def test_classes_of_the_batch_are_among_the_candidates():
    rng = Rng.create(0, 3, jnp.arange(4))
    target, counted = jnp.array([7, 2, 7, 9]), jnp.array([True, True, True, False])
    chosen = np.asarray(class_names.choose_classes(target, counted, 20, 6, rng))
    assert len(set(chosen)) == 6
    assert {2, 7} <= set(chosen[:2])
    others = [
        frozenset(
            np.asarray(class_names.choose_classes(target, counted, 20, 6, rng.at(i))).tolist()
        )
        for i in range(6)
    ]
    assert len(set(others)) > 3


@pytest.mark.parametrize('candidates', [0, 4])
def test_the_loss_is_cross_entropy_of_cosines(candidates, monkeypatch):
    noise = np.random.default_rng(0)
    clips, classes = noise.normal(size=(3, 5)), noise.normal(size=(6, 5))
    label = np.array([4, -1, 1])
    fields = {'name': 'class_names', 'candidates': candidates, 'scale': 7.0}
    objective = objectives.build(ConfigDict(fields))

    def embed(self, model, variables, pooled, batch, sentences, rng):
        rows = class_names._unit(jnp.asarray(classes))[sentences[:, 0]]
        return class_names._unit(jnp.asarray(clips)), rows

    monkeypatch.setattr(class_names.ClassNames, '_embed', embed)
    valid = jnp.ones(3, bool)
    batch = {'labels': {'class': jnp.asarray(label)}, 'video': {'valid': valid}}
    state = {'sentences': jnp.arange(6)[:, None]}
    rng = Rng.create(0, 0, jnp.arange(3))
    loss = objective.compute_loss(None, {'batch_stats': {}}, {}, state, {}, batch, rng)
    chosen = range(6)
    if candidates:
        counted = jnp.asarray(label >= 0)
        target = jnp.maximum(label, 0)
        chosen = class_names.choose_classes(target, counted, 6, candidates, rng).tolist()
    total = 0.0
    for row in (0, 2):
        cosines = {}
        for p in chosen:
            product = clips[row] @ classes[p]
            cosines[p] = product / np.linalg.norm(clips[row]) / np.linalg.norm(classes[p])
        normaliser = math.log(sum(math.exp(7 * x) for x in cosines.values()))
        total += normaliser - 7 * cosines[label[row]]
    np.testing.assert_allclose(loss.value, total / 2, rtol=1e-5)
