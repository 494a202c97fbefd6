"""FLOPs counted from traces: equal to hand counts and to the published models', and to XLA's own where XLA counts right (nothing scanned)."""

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
    init = lambda b, r: meta.unbox(model.init(jax.random.key(0), b, train=False, rng=r))
    return flops.by_tower(model, jax.eval_shape(init, batch, rng), batch)


def layer(n, d, mlp, heads, width):
    """One transformer layer over n tokens, by hand: q, k, v and output, logits and their sum, feed-forward."""
    return 4 * 2 * n * d * heads * width + 2 * 2 * n * n * heads * width + 2 * 2 * n * d * mlp


def last_layer(n, d, mlp, heads, width):
    """The same where one token alone is asked for: keys and values of all, everything else of one."""
    return (
        2 * 2 * n * d * heads * width
        + 2 * 2 * d * heads * width
        + 2 * 2 * n * heads * width
        + 2 * 2 * d * mlp
    )


def test_a_small_model_by_hand():
    c = tiny.config().model
    c.towers.text.vocab = 50
    got = towers_of(c)
    # 4 × 16 × 16 frames in patches of 2 × 8 × 8: 8 tokens, 4 kept; an aggregate token more
    size = dict(d=32, mlp=64, heads=2, width=16)
    patches = 2 * 4 * (2 * 8 * 8 * 3) * 32
    assert got['video']['all_tokens'] == patches + 2 * layer(5, **size)
    assert got['video']['needed'] == patches + layer(5, **size) + last_layer(5, **size)
    # 1024 samples in patches of 64: 16 tokens, 8 kept
    assert got['audio']['needed'] == 2 * 8 * 64 * 32 + last_layer(9, **size)
    # two sentences of six words and the aggregate token, from a table of width 16
    assert got['text']['all_tokens'] == 2 * (2 * 7 * 16 * 32 + layer(7, **size))
    # video: 32 → 16 → 16 → 8; audio: 32 → 16; two sentences: 32 → 8
    assert got['heads']['needed'] == 2 * (32 * 16 + 16 * 16 + 16 * 8) + 2 * 32 * 16 + 2 * 2 * 32 * 8
    assert flops.model_flops(got) == 3 * sum(part['needed'] for part in got.values())


def test_a_published_model():
    """VATT base-base-small with DropToken 0.5: 836 GFLOP a clip, forward and backward (tokens 784, 600 and 5 × 16, one more each)."""
    got = towers_of(vatt.get_config('bbs,synthetic').model)
    base = dict(d=768, mlp=3072, heads=12, width=64)
    assert got['video']['all_tokens'] == 2 * 784 * (4 * 16 * 16 * 3) * 768 + 12 * layer(785, **base)
    assert got['audio']['all_tokens'] == 2 * 600 * 128 * 768 + 12 * layer(601, **base)
    assert flops.model_flops(got, 'all_tokens') / 1e9 == pytest.approx(836, abs=0.5)
    assert flops.model_flops(got) < flops.model_flops(got, 'all_tokens')


def encoder_gradient(**options):
    """(function, abstract arguments): gradient of a transformer of three layers, wide enough for matrix products to be nearly all there is."""
    encoder = Encoder(3, 256, 1024, 4, dropout=0.0, attention_dropout=0.0, **options)
    rng = Rng.create(0, 0, jnp.zeros(2))
    params = jax.eval_shape(
        lambda: meta.unbox(
            encoder.init(jax.random.key(0), jnp.zeros((2, 64, 256)), None, rng, False, True)
        )
    )
    loss = lambda p, x: encoder.apply(p, x, None, rng, True, True).sum()
    return jax.grad(loss, argnums=(0, 1)), (params, jax.ShapeDtypeStruct((2, 64, 256), jnp.float32))


def test_as_xla_counts_where_nothing_is_scanned():
    """Within 4 %, the elementwise work that XLA counts too. Under a scan XLA counts a layer once and ours stays."""
    function, args = encoder_gradient()
    ours = flops.count_call(function, *args).flops
    theirs = jax.jit(function).lower(*args).cost_analysis()['flops']
    assert ours == 3 * 3 * 2 * layer(64, 256, 1024, 4, 64)
    assert ours < theirs < 1.04 * ours
    scanned, args = encoder_gradient(scan=True)
    assert flops.count_call(scanned, *args).flops == ours
    assert jax.jit(scanned).lower(*args).cost_analysis()['flops'] < 0.8 * ours


def test_recomputation_is_executed():
    """Full remat does the forward pass again, all but the last product of each layer, which no gradient asks for."""
    function, args = encoder_gradient(remat='full')
    forward, output = 3 * 2 * layer(64, 256, 1024, 4, 64), 3 * 2 * 2 * 64 * 1024 * 256
    assert flops.count_call(function, *args).flops == 3 * forward + forward - output


def test_convolutions_and_their_gradients():
    """A strided one: forward, gradient of the kernel and of the input are the same number of products, zeros between not counted."""
    x, k = jnp.zeros((2, 12, 12, 5)), jnp.zeros((3, 3, 5, 7))
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (3, 3), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    once = 2 * (2 * 4 * 4) * 7 * (3 * 3 * 5)
    assert flops.count_call(conv, x, k).flops == once
    assert flops.count_call(
        jax.grad(lambda x, k: conv(x, k).sum(), argnums=(0, 1)), x, k
    ).flops == pytest.approx(3 * once)
    grouped = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), 'VALID', feature_group_count=5, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    assert flops.count_call(grouped, x, jnp.zeros((3, 3, 1, 10))).flops == 2 * (
        2 * 10 * 10
    ) * 10 * (3 * 3)


def test_control_flow():
    a = jnp.zeros((4, 4))
    one = 2 * 4**3
    assert (
        flops.count_call(
            lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=7)[0], a
        ).flops
        == 7 * one
    )
    assert (
        flops.count_call(lambda a: jax.lax.fori_loop(0, 3, lambda _, c: c @ a, a), a).flops
        == 3 * one
    )
    assert (
        flops.count_call(
            lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a), a
        ).flops
        == 2 * one
    )
    endless = flops.count_call(
        lambda a: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ a, a), a
    )
    assert endless.flops == one and endless.unknown == ('while loop',)
    mesh = sharding.make_mesh({'replica': 4})
    spread = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=jax.P('replica'), out_specs=jax.P('replica')
    )
    assert flops.count_call(spread, jnp.zeros((8, 4))).flops == 4 * 2 * 2 * 2 * 4


def test_fused_kernels_count_their_products():
    """What stands in a jaxpr as one operation: the products it does inside."""

    class Eqn:
        invars = [
            type('V', (), {'aval': jnp.zeros(shape)}) for shape in ((2, 5, 3, 8), (2, 7, 3, 8))
        ]

    assert flops.RULES['dot_product_attention_fwd'](Eqn).flops == 2 * 2 * (2 * 3) * 5 * 7 * 8


def test_every_part_of_a_config_is_counted():
    """Streams of one modality are towers of their own; the default config's names are those of the table."""
    c = default.get_config().model
    c.inputs.audio.samples = 256
    c.towers.audio = ConfigDict(
        {
            'name': 'wat',
            'layers': 1,
            'width': 32,
            'mlp': 64,
            'heads': 2,
            'head_width': 16,
            'patch': 64,
        }
    )
    c.head = ConfigDict({'name': 'none'})
    got = towers_of(c)
    assert set(got) == {'audio', 'heads'} and got['heads']['needed'] == 0
    assert np.isclose(got['audio']['needed'], 2 * 2 * 64 * 32 + last_layer(3, 32, 64, 2, 16))
