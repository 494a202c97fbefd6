"""Attention, in one place: separate queries and keys, key mask, bias, dropout on probabilities; the definition and the kernels of each platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vatt_jax.config import ConfigError
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

IMPLEMENTATIONS = ('auto', 'dense', 'xla', 'cudnn', 'triton', 'splash')
HOME = {'cudnn': 'gpu', 'triton': 'gpu', 'splash': 'tpu'}  # kernel -> its platform
FUSED = {'gpu': 'cudnn', 'tpu': 'splash'}  # platform -> the kernel that `auto` takes
LANES = 128  # kernels in Pallas pad tokens to a multiple, and fewer are not worth it


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
    """[B Nq heads kv] attending to [B Nk heads kv] -> [B Nq heads kv]; softmax in float32.

    mask: bool [B Nk] (keys) or [B Nq Nk]; False gets -1e9, so a row without any key is uniform, not NaN. bias: [1|B heads Nq Nk].
    `dense` is the definition and the only one with dropout on probabilities. `splash` (TPU) is used where it saves something and can do it: from
    128 queries and keys on, without bias and with a mask of keys at most; what is smaller (words, the last layer's one query) or has a bias is
    dense. `triton` (GPU, Pallas) likewise, for as many queries as keys and without any mask: it needs no cuDNN. `auto`: the platform's kernel where
    there is one and no dropout, else dense.
    """
    if implementation == 'auto':
        implementation = 'dense' if dropout else FUSED.get(jax.default_backend(), 'dense')
        if implementation == 'cudnn' and q.dtype.itemsize != 2:  # it takes no others
            implementation = 'dense'
    if implementation != 'dense' and dropout:
        raise ConfigError(
            f'config.model.attention={implementation!r} has no dropout on attention probabilities; set '
            'attention_dropout=0.0 in every tower, or use dense'
        )
    if (
        implementation == 'splash'
        and bias is None
        and min(q.shape[1], k.shape[1]) >= LANES
        and (mask is None or mask.ndim == 2)
    ):
        return splash(q, k, v, mask, scale)
    if (
        implementation == 'triton'
        and bias is None
        and mask is None
        and q.shape[1] == k.shape[1] >= LANES
    ):
        return triton(q, k, v, scale)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None]
    if implementation in ('xla', 'cudnn'):
        full = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=full, scale=scale, implementation=implementation
        )
    logits = jnp.einsum('bqhd,bkhd->bhqk', q * jnp.asarray(scale, q.dtype), k).astype(jnp.float32)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + jnp.where(mask[:, None], 0.0, -1e9)
    weights = jax.nn.softmax(logits, -1).astype(v.dtype)
    if dropout and rng is not None:
        weights = rng.at('probabilities').dropout(weights, dropout)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, v)


def portable(config):
    """`config.model` for evaluation on any machine: instead of the kernel of the platform that it was trained on, whatever there is here."""
    if config.attention in HOME:
        config = config.copy_and_resolve_references()
        config.attention = 'auto'
    return config


def check(config, platform: str) -> None:
    """Raises ConfigError for a kernel of another platform (of JAX's names) than this one."""
    if HOME.get(config.attention, platform) != platform:
        raise ConfigError(
            f'config.model.attention={config.attention!r} is a kernel of {HOME[config.attention].upper()}s and this is {platform}; set '
            "config.model.attention='auto' for whatever the machine has, or 'dense'"
        )


def splash(q, k, v, mask, scale: float, interpret: bool = False) -> jax.Array:
    """The fused kernel of TPUs (Pallas): logits stay on the chip. mask: bool [B Nk] or None; every row needs a key. On a mesh each device
    computes its own clips and heads. interpret: in Python, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    (b, n), m = q.shape[:2], k.shape[1]
    pad = lambda x, length: jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(
        1, 2
    )
    rows, keys = (-(-length // LANES) * LANES for length in (n, m))
    # Padded keys belong to another segment than every query. Padded queries are computed, and cut off.
    there = jnp.ones((b, m), bool) if mask is None else mask
    segment = jnp.pad(there, ((0, 0), (0, keys - m))).astype(jnp.int32)

    def local(q, k, v, segment):
        run = _kernel(q.shape[1], rows, keys, interpret)
        ids = lambda s: kernel.SegmentIds(jnp.ones(rows, jnp.int32), s)
        return jax.vmap(lambda q, k, v, s: run(q, k, v, ids(s)))(q, k, v, segment)

    arguments = pad(q * jnp.asarray(scale, q.dtype), rows), pad(k, keys), pad(v, keys), segment
    return _on_each_device(local, arguments, ('batch', 'heads', None, None)).swapaxes(1, 2)[:, :n]


def triton(q, k, v, scale: float, interpret: bool = False) -> jax.Array:
    """A fused kernel of GPUs (Pallas, Triton): logits stay on the chip. As many queries as keys. On a mesh and interpret: as splash."""
    from jax.experimental.pallas.ops.gpu import attention as kernel

    b, n = q.shape[:2]
    rows = -(-n // LANES) * LANES
    sizes = kernel.BlockSizes(
        block_q=128, block_k=128, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
    )
    pad = lambda x: jnp.pad(x, ((0, 0), (0, rows - n), (0, 0), (0, 0)))
    # Padding is a segment of its own.
    segment = jnp.broadcast_to(jnp.arange(rows) < n, (b, rows)).astype(jnp.int32)
    local = lambda q, k, v, s: kernel.mha(
        q, k, v, s, sm_scale=scale, block_sizes=sizes, interpret=interpret
    )
    return _on_each_device(
        local, (pad(q), pad(k), pad(v), segment), ('batch', None, 'heads', None)
    )[:, :n]


def _on_each_device(local, arguments, names):
    """local(q, k, v, segments [B N]) of each device's own clips and heads: no partitioner can split a kernel. names: of the axes of q, k and v."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = sharding.mesh_spec(names, dict(mesh.shape), arguments[0].shape)
        local = jax.shard_map(
            local, in_specs=(spec, spec, spec, P(spec[0])), out_specs=spec, check_vma=False
        )
    return local(*arguments)


def _tile(n: int) -> int:
    """The largest block that divides n (a multiple of 128) into equal ones of at most 1024."""
    return max(t for t in range(LANES, min(n, 1024) + 1, LANES) if n % t == 0)


def _kernel(heads: int, rows: int, keys: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    a, b = _tile(rows), _tile(keys)
    sizes = kernel.BlockSizes(
        block_q=a, block_kv=b, block_q_dkv=a, block_kv_dkv=b, use_fused_bwd_kernel=True
    )
    everything = masks.MultiHeadMask([masks.FullMask((rows, keys))] * heads)
    return kernel.make_splash_mha(
        everything, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
