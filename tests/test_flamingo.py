"""Flamingo against NumPy float64; what its words see; its cache; what is trained; its files."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny_media_language as tiny
from tests.tiny_media_language import FLAMINGO, FORM, MEDIA_WIDTH, RESAMPLER
from vatt_jax.config import ConfigError
from vatt_jax.importers import media_language as importer
from vatt_jax.importers.pickles import torch_writer
from vatt_jax.losses import next_words
from vatt_jax.models.language import CausalLM, Rules, beam_search, generate
from vatt_jax.models.media_language import counted_words, merge, split
from vatt_jax.models.media_language.media import ATTEND

TAG, END = FORM.vocab, FORM.vocab + 1
# Row 0 begins with a tag; row 1 has words before its first one and three tags for two media; row 2
# has padding before, within and behind.
IDS = np.array(
    [[TAG, 4, 2, TAG, 7, END], [3, 5, TAG, TAG, 1, TAG], [TAG, 6, TAG, 3, 2, 8]], np.int32
)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0]], bool)
M, T, S = 2, 2, 3


def media_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=(*shape, MEDIA_WIDTH)).astype(np.float32)


MEDIA = media_of(3, M, T, S)
# With the paper's activation; the models below have the open implementations'.
PAPERS = RESAMPLER.clone(activation='squared_relu')


@functools.cache
def logits_of(model):
    """The jitted logits of a Flamingo."""
    return jax.jit(
        lambda variables, ids, mask, media: model.apply(variables, ids, mask, None, media).logits
    )


@functools.cache
def resampled_by(model):
    return jax.jit(lambda params, x, mask: model.apply({'params': params}, x, mask))


# ---- the resampler
def test_resampled_media_are_those_of_the_definition():
    seen = np.random.default_rng(2).random(MEDIA.shape[:-1]) < 0.6
    params = tiny.flamingo_variables()['params']['resampler']
    found = resampled_by(PAPERS)(params, MEDIA, seen)
    for row in range(3):
        expected = tiny.resample(tiny.flamingo_theirs(), PAPERS, MEDIA[row], seen[row])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_permuted_latents_are_permuted_tokens():
    params = tiny.flamingo_variables()['params']['resampler']
    everything = np.ones(MEDIA.shape[:-1], bool)
    plain = resampled_by(PAPERS)(params, MEDIA, everything)
    order = np.array([2, 0, 1])
    permuted = {**params, 'latents': params['latents'][order]}
    found = resampled_by(PAPERS)(permuted, MEDIA, everything)
    np.testing.assert_allclose(found, plain[:, :, order], rtol=1e-4, atol=1e-5)


def test_longer_videos_get_times_between_the_rows():
    """Five frames over three rows; the two between are halves."""
    x = media_of(1, 1, 5, S)
    found = resampled_by(PAPERS)(tiny.flamingo_variables()['params']['resampler'], x, None)
    weights = tiny.flamingo_theirs()
    table = weights['perceiver.frame_embs']
    times = [table[0], (table[0] + table[1]) / 2, table[1], (table[1] + table[2]) / 2, table[2]]
    longer = {**weights, 'perceiver.frame_embs': np.stack(times)}
    expected = tiny.resample(longer, PAPERS, x[0])
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


# ---- the model
@pytest.mark.parametrize('attend', ATTEND)
def test_logits_are_those_of_the_definition(attend):
    """Of every word that is there, as if its row held no padding."""
    model = FLAMINGO.clone(attend=attend)
    logits = logits_of(model)(tiny.flamingo_variables(), IDS, MASK, MEDIA)
    weights = tiny.flamingo_theirs()
    for row in range(3):
        words = IDS[row][MASK[row]]
        expected = tiny.flamingo_logits(weights, model, words, MEDIA[row].astype(np.float64))
        if attend == 'immediate' and row == 1:
            # The third tag of row 1 has no medium.
            expected, logits_row = expected[:5], logits[row][:5]
        else:
            logits_row = logits[row][MASK[row]]
        np.testing.assert_allclose(logits_row, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('attend', ATTEND)
def test_a_medium_changes_nothing_before_its_tag(attend):
    logits = logits_of(FLAMINGO.clone(attend=attend))
    variables = tiny.flamingo_variables()
    plain = logits(variables, IDS, MASK, MEDIA)
    for medium in range(M):
        changed = MEDIA.copy()
        changed[:, medium] += 1 + media_of(3, T, S, seed=5)
        found = logits(variables, IDS, MASK, changed)
        for row in range(2):
            tag = np.flatnonzero(IDS[row] == TAG)[medium]
            np.testing.assert_array_equal(found[row, :tag], plain[row, :tag])
            assert np.abs(found[row, tag] - plain[row, tag]).max() > 1e-3


def test_closed_gates_are_the_language_model_to_the_bit():
    variables = tiny.flamingo_variables()
    gated = dict(variables['params']['gated_layers'])
    gated |= {name: jnp.zeros_like(gated[name]) for name in ('attention_gate', 'mlp_gate')}
    closed = {'params': {**variables['params'], 'gated_layers': gated}}
    model = FLAMINGO.clone(tag=3)  # a word that the language model has
    ids = np.where(IDS < FORM.vocab, IDS, 3)
    found = logits_of(model)(closed, ids, MASK, MEDIA)
    language = {'params': variables['params']['language']}
    bare = jax.jit(lambda v, ids, mask: CausalLM(FORM).apply(v, ids, mask).logits)
    expected = bare(language, ids, MASK)
    np.testing.assert_array_equal(found[..., : FORM.vocab][MASK], expected[MASK])


def test_new_gates_are_closed():
    shapes = jax.eval_shape(FLAMINGO.init, jax.random.key(0), IDS, MASK, None, MEDIA)
    assert shapes['params']['gated_layers']['mlp_gate'].shape == (1,)
    params = jax.jit(FLAMINGO._init_layer)(jax.random.key(0))
    assert not params['attention_gate'] and not params['mlp_gate']


# ---- decoding
def test_cached_logits_are_the_uncached():
    """Tags come within the first part and in later ones."""
    variables = tiny.flamingo_variables()
    mask = np.ones_like(MASK)
    plain = logits_of(FLAMINGO)(variables, IDS, mask, MEDIA)
    begin = jax.jit(lambda v, media: FLAMINGO.apply(v, media, 8, method='begin'))
    step = jax.jit(lambda v, ids, cache: FLAMINGO.apply(v, ids, None, cache))
    cache, start = begin(variables, MEDIA), 0
    for length in (2, 2, 2):
        outputs = step(variables, IDS[:, start : start + length], cache)
        cache = outputs.cache
        expected = plain[:, start : start + length]
        np.testing.assert_allclose(outputs.logits, expected, rtol=1e-4, atol=1e-4)
        start += length
    np.testing.assert_array_equal(cache.num_tags, (IDS == TAG).sum(1))


def test_beams_read_the_media_of_their_row():
    """The probability of what was found is that of a whole pass, whichever prefix it came from."""
    variables, new_tokens = tiny.flamingo_variables(), 2
    prompt, mask = IDS[:, :4], MASK[:, :4]
    cache = jax.jit(lambda v, media: FLAMINGO.apply(v, media, 6, method='begin'))(variables, MEDIA)
    beams = beam_search(
        FLAMINGO, variables, prompt, mask, rules=Rules(new_tokens), width=3, cache=cache
    )
    for k in range(3):
        ids = np.concatenate([prompt, beams.tokens[:, k]], axis=1)
        seen = np.concatenate([mask, np.ones((3, new_tokens), bool)], axis=1)
        log_p = jax.nn.log_softmax(logits_of(FLAMINGO)(variables, ids, seen, MEDIA))
        for row in range(3):
            last = np.flatnonzero(mask[row])[-1]
            total = log_p[row, last, ids[row, 4]] + log_p[row, 4, ids[row, 5]]
            np.testing.assert_allclose(beams.log_probabilities[row, k], total, rtol=1e-4, atol=1e-4)


# ---- training
def test_words_that_count_are_those_between_a_tag_and_an_end():
    ids = np.random.default_rng(0).integers(0, 5, (200, 9))
    mask = np.arange(9) < np.random.default_rng(1).integers(1, 10, 200)[:, None]
    for end in (4, None):
        found = np.asarray(counted_words(jnp.asarray(ids), jnp.asarray(mask), tag=3, end=end))
        for row in range(200):
            words = ids[row][mask[row]]
            assert found[row][mask[row]].tolist() == tiny.counted(words, 3, end)
        assert not found[~mask].any()


def test_the_loss_is_the_mean_over_words_that_count():
    noise = np.random.default_rng(0)
    logits, ids = noise.normal(size=(3, 4, 5)), noise.integers(0, 5, (3, 4))
    counted = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], bool)
    of_words = functools.partial(next_words.next_words, jnp.asarray(logits), jnp.asarray(ids))
    found = of_words(jnp.asarray(counted))
    losses = []
    for row in range(3):
        for n in range(1, 4):
            if counted[row, n]:
                before = logits[row, n - 1]
                losses.append(np.log(np.exp(before).sum()) - before[ids[row, n]])
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)
    assert of_words(jnp.zeros_like(counted)) == 0


def test_only_what_is_new_is_trained():
    # Two layers, which compile sooner, with outputs that are not the word table.
    form = dataclasses.replace(FORM, layers=2, tied=False)
    model = FLAMINGO.clone(
        language=CausalLM(form, remat='full'), resampler=RESAMPLER.clone(layers=1)
    )
    new, frozen = split(tiny.flamingo_variables(model)['params'])
    assert set(frozen) == {'language'} and 'new_rows' in new
    optimizer = optax.adam(0.01)
    ids, mask, media = jnp.asarray(IDS), jnp.asarray(MASK), jnp.asarray(MEDIA)
    counted = counted_words(ids, mask, TAG, END)

    def loss(new):
        logits = model.apply({'params': merge(new, frozen)}, ids, mask, None, media).logits
        return next_words.next_words(logits, ids, counted)

    @jax.jit
    def step(new, slots):
        value, grads = jax.value_and_grad(loss)(new)
        updates, slots = optimizer.update(grads, slots)
        return value, grads, optax.apply_updates(new, updates), slots

    first, grads, trained, slots = step(new, optimizer.init(new))
    for _ in range(3):
        last, _, trained, slots = step(trained, slots)
    assert last < first
    # Times and media beyond those of the batch are not used by it.
    unused = {('resampler', 'frame_table'), ('resampler', 'media_table')}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        names = tuple(key.key for key in path)
        if names not in unused:
            assert np.abs(grad).max() > 0, names
    assert 'word_table' not in jax.tree_util.tree_structure(slots).__repr__()


# ---- files
def test_files_of_open_flamingo_come_out_as_they_went_in(tmp_path):
    params = tiny.flamingo_variables()['params']
    path = tmp_path / 'checkpoint.pt'
    importer.save_flamingo(path, FLAMINGO, params)
    arrays = importer.clip.read_arrays(path, str(path))
    # Names and shapes as the public code makes them.
    expected = {
        'perceiver.latents': (3, 6),
        'perceiver.frame_embs': (3, 6),
        'perceiver.media_time_embs': (4, 1, 6),
        'perceiver.layers.1.0.norm_media.bias': (6,),
        'perceiver.layers.1.0.to_kv.weight': (20, 6),
        'perceiver.layers.0.1.1.weight': (7, 6),
        'perceiver.norm.weight': (6,),
        'lang_encoder.transformer.h.1.gated_cross_attn_layer.attn_gate': (1,),
        'lang_encoder.transformer.h.1.gated_cross_attn_layer.attn.to_kv.weight': (12, 6),
        'lang_encoder.transformer.h.1.gated_cross_attn_layer.attn.to_out.weight': (8, 6),
        'lang_encoder.transformer.h.1.gated_cross_attn_layer.ff.3.weight': (8, 10),
        'lang_encoder.transformer.wte.weight': (FORM.vocab + 2, 8),
    }
    assert expected.items() <= {name: array.shape for name, array in arrays.items()}.items()
    found, report = importer.load_flamingo(path, FLAMINGO)
    chex.assert_trees_all_equal(found, split(params)[0])
    assert not report.unused
    # As their training script saves it, and with the names of the list of gated layers.
    old = {}
    for name, array in arrays.items():
        name = name.replace('transformer.h.1.gated_cross_attn_layer', 'gated_cross_attn_layers.1')
        old[f'model_state_dict.module.{name}'] = array
    torch_writer.write(path, old)
    found, _ = importer.load_flamingo(path, FLAMINGO)
    chex.assert_trees_all_equal(found, split(params)[0])


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    importer.save_flamingo(path, FLAMINGO, tiny.flamingo_variables()['params'])
    with pytest.raises(ConfigError, match='a word table of 16 rows .*got 15'):
        importer.load_flamingo(path, FLAMINGO.clone(new_words=3))
    with pytest.raises(ConfigError, match='lacks .*gated_cross_attn_layers.0'):
        importer.load_flamingo(path, FLAMINGO.clone(every=1))
    wider = FLAMINGO.clone(resampler=RESAMPLER.clone(latents=4))
    with pytest.raises(ConfigError, match=r'perceiver.latents has shape \[3, 6\]'):
        importer.load_flamingo(path, wider)


# ---- errors
@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (FLAMINGO.clone(attend='next'), 'FlamingoLM.attend'),
        (FLAMINGO.clone(every=4), 'FlamingoLM.every'),
        (FLAMINGO.clone(tag=15), 'FlamingoLM.tag'),
        (FLAMINGO.clone(resampler=RESAMPLER.clone(width=7)), 'PerceiverResampler.width'),
        (FLAMINGO.clone(resampler=RESAMPLER.clone(media=1)), 'PerceiverResampler.media'),
    ],
)
def test_models_that_cannot_be(model, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), IDS, MASK, None, MEDIA)


def test_what_cannot_be_read():
    variables = tiny.flamingo_variables()
    apply = functools.partial(jax.eval_shape, FLAMINGO.apply)
    with pytest.raises(ConfigError, match='expected either media or a cache'):
        apply(variables, IDS)
    with pytest.raises(ConfigError, match='got a Cache and no media'):
        generate(FLAMINGO, variables, IDS, rules=Rules(1))
    begin = functools.partial(FLAMINGO.apply, method='begin')
    cache = jax.eval_shape(lambda v, media: begin(v, media, 6), variables, MEDIA)
    with pytest.raises(ConfigError, match='expected at least 8 slots'):
        jax.eval_shape(
            lambda cache: generate(FLAMINGO, variables, IDS, rules=Rules(2), cache=cache), cache
        )
