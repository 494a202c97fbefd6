"""FLOPs counted from traces.

Equal to hand counts and to the published models', and to XLA's own where XLA counts right
(nothing scanned).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from ml_collections import ConfigDict

from configs import default, vatt
from tests import tiny
from vatt_jax import models
from vatt_jax.inputs import preprocess
from vatt_jax.models.transformer import Encoder
from vatt_jax.parallel import sharding
from vatt_jax.performance import flops
from vatt_jax.rng import Rng


def towers_of(model_config):
    """`flops.by_tower` of a `config.model`: nothing is computed."""
    model = models.build(model_config)
    batch = preprocess.abstract(model_config.inputs, tuple(model_config.towers), 2, 'float32')
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros(2)))

    def init(batch, rng):
        return meta.unbox(model.init(jax.random.key(0), batch, train=False, rng=rng))

    return flops.by_tower(model, jax.eval_shape(init, batch, rng), batch)


def flops_of(function, *args):
    """FLOPs of one call."""
    return flops.count_call(function, *args).flops


# A product of [n k] and [k m] takes 2 n k m FLOPs.
def layer(tokens, d, mlp, heads, width):
    """One transformer layer over `tokens`, by hand."""
    projections = 4 * 2 * tokens * d * heads * width  # query, key, value and output
    attention = 2 * 2 * tokens * tokens * heads * width  # logits, and the sum of values
    feed_forward = 2 * 2 * tokens * d * mlp
    return projections + attention + feed_forward


def last_layer(tokens, d, mlp, heads, width):
    """The same where one token alone is asked for: keys and values of all, the rest of one."""
    keys_and_values = 2 * 2 * tokens * d * heads * width
    query_and_output = 2 * 2 * d * heads * width
    attention = 2 * 2 * tokens * heads * width
    feed_forward = 2 * 2 * d * mlp
    return keys_and_values + query_and_output + attention + feed_forward


def test_streams_that_meet_are_counted_with_the_keys_of_all():
    config = tiny.config().model
    config.towers.text.vocab = 50
    config.fusion = {
        'streams': ('video', 'text'),
        'types': ('merged',),
        'mlp': 24,
        'heads': 2,
        'head_width': 8,
    }
    # Patches that are kept, words of two sentences, and the aggregate token of each.
    lengths = {'video': 4 + 1, 'text': 2 * (6 + 1)}
    expected = 0
    for length in lengths.values():
        expected += layer(length, d=32, mlp=24, heads=2, width=8)
        # A layer by itself attends to its own tokens, this one to those of both.
        others = sum(lengths.values()) - length
        expected += 2 * 2 * length * others * 2 * 8
    got = towers_of(config)
    assert got['fusion'] == {'needed': expected, 'all_tokens': expected}
    # All tokens of the towers are read.
    assert got['video']['needed'] == got['video']['all_tokens']


def test_a_small_model_by_hand():
    config = tiny.config().model
    config.towers.text.vocab = 50
    got = towers_of(config)
    size = {'d': 32, 'mlp': 64, 'heads': 2, 'width': 16}

    # 4 × 16 × 16 frames in patches of 2 × 8 × 8: 8 tokens, 4 kept; an aggregate token more
    patches = 2 * 4 * (2 * 8 * 8 * 3) * 32
    assert got['video']['all_tokens'] == patches + 2 * layer(5, **size)
    assert got['video']['needed'] == patches + layer(5, **size) + last_layer(5, **size)

    # 1024 samples in patches of 64: 16 tokens, 8 kept
    patches = 2 * 8 * 64 * 32
    assert got['audio']['needed'] == patches + last_layer(9, **size)

    # two sentences of six words and the aggregate token, from a table of width 16
    projection = 2 * 7 * 16 * 32
    assert got['text']['all_tokens'] == 2 * (projection + layer(7, **size))

    # video: 32 → 16 → 16 → 8; audio: 32 → 16; two sentences: 32 → 8
    video_head = 2 * (32 * 16 + 16 * 16 + 16 * 8)
    audio_head = 2 * 32 * 16
    text_head = 2 * 2 * 32 * 8
    assert got['heads']['needed'] == video_head + audio_head + text_head

    # a backward pass is twice a forward pass
    assert flops.model_flops(got) == 3 * sum(part['needed'] for part in got.values())


def test_a_published_model():
    """VATT base-base-small with DropToken 0.5: 836 GFLOP a clip, forward and backward.

    Tokens 784, 600 and 5 × 16, one more each.
    """
    got = towers_of(vatt.get_config('bbs,synthetic').model)
    base = {'d': 768, 'mlp': 3072, 'heads': 12, 'width': 64}
    video_patches = 2 * 784 * (4 * 16 * 16 * 3) * 768
    audio_patches = 2 * 600 * 128 * 768
    assert got['video']['all_tokens'] == video_patches + 12 * layer(785, **base)
    assert got['audio']['all_tokens'] == audio_patches + 12 * layer(601, **base)
    all_tokens = flops.model_flops(got, 'all_tokens')
    assert all_tokens / 1e9 == pytest.approx(836, abs=0.5)
    assert flops.model_flops(got) < all_tokens


# Three layers over two sequences of 64 tokens, wide enough for matrix products to be nearly all.
FORWARD = 3 * 2 * layer(64, 256, 1024, 4, 64)


def encoder_gradient(**options):
    """(function, abstract arguments): gradient of the transformer above."""
    encoder = Encoder(3, 256, 1024, 4, dropout=0.0, attention_dropout=0.0, **options)
    rng = Rng.create(0, 0, jnp.zeros(2))

    def init():
        x = jnp.zeros((2, 64, 256))
        return meta.unbox(encoder.init(jax.random.key(0), x, None, rng, False, True))

    def loss(params, x):
        return encoder.apply(params, x, None, rng, True, True).sum()

    x = jax.ShapeDtypeStruct((2, 64, 256), jnp.float32)
    return jax.grad(loss, argnums=(0, 1)), (jax.eval_shape(init), x)


def flops_by_xla(function, args):
    """XLA's own count of a lowered function."""
    return jax.jit(function).lower(*args).cost_analysis()['flops']


def test_as_xla_counts_where_nothing_is_scanned():
    """Within 4 %, the elementwise work that XLA counts too.

    Under a scan XLA counts a layer once and ours stays.
    """
    function, args = encoder_gradient()
    ours = flops_of(function, *args)
    assert ours == 3 * FORWARD
    assert ours < flops_by_xla(function, args) < 1.04 * ours

    scanned, args = encoder_gradient(scan=True)
    assert flops_of(scanned, *args) == ours
    assert flops_by_xla(scanned, args) < 0.8 * ours


def test_recomputation_is_executed():
    """Full remat does the forward pass again.

    All but the last product of each layer, which no gradient asks for.
    """
    function, args = encoder_gradient(remat='full')
    last_product = 3 * 2 * 2 * 64 * 1024 * 256
    assert flops_of(function, *args) == 3 * FORWARD + FORWARD - last_product


def convolve(x, kernel, stride, groups=1):
    """A convolution of images without padding."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        'VALID',
        feature_group_count=groups,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def test_convolutions_and_their_gradients():
    """Forward, gradient of the kernel and of the input are the same number of products.

    The convolution is strided; zeros between are not counted.
    """
    x, kernel = jnp.zeros((2, 12, 12, 5)), jnp.zeros((3, 3, 5, 7))

    def strided(x, kernel):
        return convolve(x, kernel, 3)

    def total(x, kernel):
        return strided(x, kernel).sum()

    once = 2 * (2 * 4 * 4) * 7 * (3 * 3 * 5)
    assert flops_of(strided, x, kernel) == once
    gradient = jax.grad(total, argnums=(0, 1))
    assert flops_of(gradient, x, kernel) == pytest.approx(3 * once)


def test_grouped_convolutions():
    def grouped(x, kernel):
        return convolve(x, kernel, 1, groups=5)

    x, kernel = jnp.zeros((2, 12, 12, 5)), jnp.zeros((3, 3, 1, 10))
    assert flops_of(grouped, x, kernel) == 2 * (2 * 10 * 10) * 10 * (3 * 3)


SQUARE = jnp.zeros((4, 4))
PRODUCT = 2 * 4**3  # of two squares


def test_a_scan_counts_every_turn():
    def seven_products(a):
        def body(carry, _):
            return carry @ a, None

        carry, _ = jax.lax.scan(body, a, None, length=7)
        return carry

    assert flops_of(seven_products, SQUARE) == 7 * PRODUCT


def test_a_counted_loop_counts_every_turn():
    def three_products(a):
        return jax.lax.fori_loop(0, 3, lambda _, carry: carry @ a, a)

    assert flops_of(three_products, SQUARE) == 3 * PRODUCT


def test_a_condition_counts_its_dearest_branch():
    def two_or_one(a):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a)

    assert flops_of(two_or_one, SQUARE) == 2 * PRODUCT


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    def endless(a):
        return jax.lax.while_loop(lambda carry: carry[0, 0] > 0, lambda carry: carry @ a, a)

    counted = flops.count_call(endless, SQUARE)
    assert counted.flops == PRODUCT
    assert counted.unknown == ('while loop',)


def test_a_mapped_function_counts_on_every_device():
    mesh = sharding.make_mesh({'replica': 4})
    rows = jax.P('replica')
    mapped = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops_of(mapped, jnp.zeros((8, 4))) == 4 * 2 * 2 * 2 * 4


def test_fused_kernels_count_their_products():
    """What stands in a jaxpr as one operation: the products it does inside."""

    class Variable:
        def __init__(self, shape):
            self.aval = jax.ShapeDtypeStruct(shape, jnp.float32)

    class Equation:
        invars = [Variable((2, 5, 3, 8)), Variable((2, 7, 3, 8))]

    rule = flops.RULES['dot_product_attention_fwd']
    assert rule(Equation).flops == 2 * 2 * (2 * 3) * 5 * 7 * 8


def test_every_part_of_a_config_is_counted():
    """A model of one tower and no head: nothing else is in the table."""
    config = default.get_config().model
    config.inputs.audio.samples = 256
    tower = {'layers': 1, 'width': 32, 'mlp': 64, 'heads': 2, 'head_width': 16, 'patch': 64}
    config.towers.audio = ConfigDict({'name': 'wat', **tower})
    config.head = ConfigDict({'name': 'none'})
    got = towers_of(config)
    assert set(got) == {'audio', 'heads'}
    assert got['heads']['needed'] == 0
    patches = 2 * 2 * 64 * 32
    assert np.isclose(got['audio']['needed'], patches + last_layer(3, 32, 64, 2, 16))
