"""Attention, in one place: the definition, and the kernels of each platform.

Separate queries and keys, key mask, bias, dropout on probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

IMPLEMENTATIONS = ('auto', 'dense', 'xla', 'cudnn', 'triton', 'splash')
HOME = {'cudnn': 'gpu', 'triton': 'gpu', 'splash': 'tpu'}  # kernel -> its platform
# Pallas's Triton kernel is for GPUs without cuDNN, so `auto` never takes it.
FUSED = {'gpu': 'cudnn', 'tpu': 'splash'}  # platform -> the kernel that `auto` takes
LANES = 128  # kernels in Pallas pad tokens to a multiple, and fewer are not worth it
# Finite, since softmax of a row of nothing but -inf is 0/0 = NaN. A float32 near 1e9 has steps of
# 64, which swallow the logits: a row without any key comes out uniform.
MASKED = -1e9  # added to the logits of masked keys


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    rng: Rng | None = None,
    implementation: str = 'dense',
) -> jax.Array:
    """Multi-head attention, softmax in float32.

        softmax(scale · Q Kᵀ + bias + mask) V

    `dense` is the definition and the only implementation with dropout on probabilities.
    `splash` (TPU) is used where it saves something and can do it: from 128 queries and keys on,
    without bias and with a mask of keys at most; what is smaller (words, the last layer's one
    query) or has a bias is dense. `triton` (GPU, Pallas) likewise, for as many queries as keys and
    without any mask: it needs no cuDNN. `auto` is the platform's kernel where there is one and no
    dropout, else dense.

    Args:
        q: queries [B Nq heads kv].
        k: keys [B Nk heads kv].
        v: values [B Nk heads kv].
        mask: bool [B Nk] (keys) or [B Nq Nk]. False adds -1e9 to the logit, so a row without any
            key is uniform, not NaN.
        bias: added to the logits, [1|B heads Nq Nk].
        scale: factor on the logits.
        dropout: rate on the probabilities.
        rng: for dropout.
        implementation: entry of IMPLEMENTATIONS.

    Returns:
        [B Nq heads kv].

    Raises:
        ConfigError: for dropout with an implementation that has none.
    """
    if implementation == 'auto':
        implementation = _choose_kernel(q.dtype, dropout)
    # `auto` has become dense under dropout; only a kernel chosen by name fails here.
    if implementation != 'dense' and dropout:
        raise ConfigError(
            f'config.model.attention={implementation!r} has no dropout on attention probabilities; '
            'set attention_dropout=0.0 in every tower, or use dense'
        )

    num_queries, num_keys = q.shape[1], k.shape[1]
    # Below one block of LANES tokens the kernel would mostly compute padding.
    is_long = min(num_queries, num_keys) >= LANES
    masks_keys_only = mask is None or mask.ndim == 2
    if implementation == 'splash' and is_long and bias is None and masks_keys_only:
        return splash(q, k, v, mask, scale)
    is_square = num_queries == num_keys
    if implementation == 'triton' and is_long and is_square and bias is None and mask is None:
        return triton(q, k, v, scale)

    if mask is not None and mask.ndim == 2:
        mask = mask[:, None]  # [B 1 Nk]
    if implementation in ('xla', 'cudnn'):
        head_mask = None if mask is None else mask[:, None]  # [B 1 1|Nq Nk]
        # jax.nn takes the same layout, and its mask too is True where a key is seen.
        kernel: Any = implementation  # one of two literals for the type checker
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            mask=head_mask,
            scale=scale,
            implementation=kernel,
        )
    return _dense(q, k, v, mask, bias, scale, dropout, rng)


def attention_or_zero(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, **options: Any
) -> jax.Array:
    """`attention`, but exactly zero for a query whose keys are all masked.

    Streams that may be missing are masked as a whole: what attends to nothing else must not get the
    mean of what is not there.

    Args:
        q: queries [B Nq heads kv].
        k: keys [B Nk heads kv].
        v: values [B Nk heads kv].
        mask: bool [B Nk] (keys) or [B Nq Nk], or None.
        **options: the other arguments of `attention`.

    Returns:
        [B Nq heads kv].
    """
    if mask is None:
        return attention(q, k, v, **options)
    has_key = mask.any(-1, keepdims=True)  # [B 1] or [B Nq 1]
    # Kernels get all keys in such a row, as some cannot do without any.
    attended = attention(q, k, v, mask=mask | ~has_key, **options)
    if mask.ndim == 2:
        has_key = has_key[:, None]  # [B 1 1]
    return jnp.where(has_key[..., None], attended, 0)


def _dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    dropout: float,
    rng: Rng | None,
) -> jax.Array:
    """The definition; mask [B 1|Nq Nk]. See `attention`."""
    # Scaled before the product: N·kv multiplications instead of Nq·Nk. The product is rounded to
    # the compute type; bias, mask and softmax are in float32.
    scaled_q = q * jnp.asarray(scale, q.dtype)
    logits = jnp.einsum('bqhd,bkhd->bhqk', scaled_q, k).astype(jnp.float32)  # [B heads Nq Nk]
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + jnp.where(mask[:, None], 0.0, MASKED)
    # Back to 16 bits, if v is, so that the second product is as fast as the first.
    probabilities = jax.nn.softmax(logits, -1).astype(v.dtype)
    if dropout and rng is not None:
        probabilities = rng.at('probabilities').dropout(probabilities, dropout)
    return jnp.einsum('bhqk,bkhd->bqhd', probabilities, v)


def _choose_kernel(dtype: Any, dropout: float) -> str:
    """What `auto` means on this platform."""
    if dropout:
        return 'dense'
    kernel = FUSED.get(jax.default_backend(), 'dense')
    if kernel == 'cudnn' and dtype.itemsize != 2:  # it takes 16-bit types alone
        return 'dense'
    return kernel


def portable(config: ConfigDict) -> ConfigDict:
    """`config.model` for evaluation on any machine.

    Instead of the kernel of the platform that it was trained on, it has what this machine offers.
    """
    if config.attention in HOME:
        config = config.copy_and_resolve_references()
        config.attention = 'auto'
    return config


def check(config: ConfigDict, platform: str) -> None:
    """Check that this machine has the attention kernel of `config.model`.

    Args:
        config: `config.model`.
        platform: of this machine, by JAX's names.

    Raises:
        ConfigError: for a kernel of another platform.
    """
    kernel_platform = HOME.get(config.attention, platform)
    if kernel_platform != platform:
        raise ConfigError(
            f'config.model.attention={config.attention!r} is a kernel of '
            f'{kernel_platform.upper()}s and this is {platform}; set '
            "config.model.attention='auto' for whatever the machine has, or 'dense'"
        )


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """The fused kernel of TPUs (Pallas): logits stay on the chip.

    On a mesh each device computes its own clips and heads.

    Args:
        q: queries [B Nq heads kv].
        k: keys [B Nk heads kv].
        v: values [B Nk heads kv].
        mask: bool [B Nk] or None; every row needs a key.
        scale: factor on the logits.
        interpret: whether to run the kernel in Python, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    batch_size, num_queries = q.shape[:2]
    num_keys = k.shape[1]
    padded_queries = _round_up(num_queries)
    padded_keys = _round_up(num_keys)

    def heads_first(x: jax.Array, length: int) -> jax.Array:
        return _pad_tokens(x, length).swapaxes(1, 2)  # [B heads N kv]

    # Padded keys belong to another segment than every query. Padded queries are computed, and cut
    # off.
    key_mask = jnp.ones((batch_size, num_keys), bool) if mask is None else mask
    segments = jnp.pad(key_mask, ((0, 0), (0, padded_keys - num_keys))).astype(jnp.int32)

    def attend_locally(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        # One device's q [b heads N kv]: fewer clips, and fewer heads on a `model` axis.
        run = _splash_kernel(q.shape[1], padded_queries, padded_keys, interpret)

        def attend_example(
            q: jax.Array, k: jax.Array, v: jax.Array, key_segments: jax.Array
        ) -> jax.Array:
            # A query sees keys of its own segment: 1 are the real ones, 0 masked and padded ones.
            query_segments = jnp.ones(padded_queries, jnp.int32)
            return run(q, k, v, kernel.SegmentIds(query_segments, key_segments))

        # The kernel is of one example, [heads N kv].
        return jax.vmap(attend_example)(q, k, v, segments)

    arguments = (
        # This kernel has no argument for the scale.
        heads_first(q * jnp.asarray(scale, q.dtype), padded_queries),
        heads_first(k, padded_keys),
        heads_first(v, padded_keys),
        segments,
    )
    attended = _on_each_device(attend_locally, arguments, ('batch', 'heads', None, None))
    return attended.swapaxes(1, 2)[:, :num_queries]  # [B Nq heads kv]


def triton(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, interpret: bool = False
) -> jax.Array:
    """A fused kernel of GPUs (Pallas, Triton): logits stay on the chip.

    As many queries as keys; on a mesh, and `interpret`: as splash.
    """
    from jax.experimental.pallas.ops.gpu import attention as kernel

    batch_size, num_tokens = q.shape[:2]
    padded = _round_up(num_tokens)
    block_sizes = kernel.BlockSizes(
        block_q=128, block_k=128, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
    )
    # Padding is a segment of its own.
    # Padded queries attend to padded keys alone, and their rows are cut off at the end.
    is_token = jnp.arange(padded) < num_tokens
    segments = jnp.broadcast_to(is_token, (batch_size, padded)).astype(jnp.int32)

    def attend_locally(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return kernel.mha(
            q, k, v, segments, sm_scale=scale, block_sizes=block_sizes, interpret=interpret
        )

    arguments = (
        _pad_tokens(q, padded),
        _pad_tokens(k, padded),
        _pad_tokens(v, padded),
        segments,
    )
    attended = _on_each_device(attend_locally, arguments, ('batch', None, 'heads', None))
    return attended[:, :num_tokens]


def _round_up(length: int) -> int:
    """The next multiple of LANES."""
    return -(-length // LANES) * LANES


def _pad_tokens(x: jax.Array, length: int) -> jax.Array:
    """[B N heads kv] with zeros up to `length` tokens."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _on_each_device(
    function: Callable[..., jax.Array],
    arguments: tuple[jax.Array, ...],
    names: tuple[str | None, ...],
) -> jax.Array:
    """Apply a function to each device's own clips and heads: no partitioner can split a kernel.

    Args:
        function: of q, k, v and segments [B N].
        arguments: these, global.
        names: logical, of the axes of q, k and v.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # The segments [B N] are split like the batch axis alone. check_vma is off because the
        # outputs of a pallas_call do not say over which mesh axes they vary.
        spec = sharding.mesh_spec(names, dict(mesh.shape), arguments[0].shape)
        function = jax.shard_map(
            function, in_specs=(spec, spec, spec, P(spec[0])), out_specs=spec, check_vma=False
        )
    return function(*arguments)


def _tile(n: int) -> int:
    """The largest block that divides n (a multiple of 128) into equal ones of at most 1024."""
    candidates = range(LANES, min(n, 1024) + 1, LANES)
    return max(size for size in candidates if n % size == 0)


def _splash_kernel(
    num_heads: int, num_queries: int, num_keys: int, interpret: bool
) -> Callable[..., jax.Array]:
    """The kernel of one example, for padded numbers of queries and keys, without a static mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # The kernel takes only blocks that divide the number of tokens.
    query_block = _tile(num_queries)
    key_block = _tile(num_keys)
    block_sizes = kernel.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        # One backward kernel makes dq, dk and dv from one recomputation of the logits; it must not
        # be given blocks of its own for dq.
        use_fused_bwd_kernel=True,
    )
    # Static masks are the same for every example; keys are masked by segments instead.
    full_mask = masks.MultiHeadMask([masks.FullMask((num_queries, num_keys))] * num_heads)
    # shard_map has split the heads already, and queries are not split: one shard each.
    return kernel.make_splash_mha(
        full_mask, block_sizes=block_sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
