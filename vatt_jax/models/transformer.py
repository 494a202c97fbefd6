"""The transformer encoder of VATT (pre-LN; post-LN as an option), its layers stacked in one parameter tree whether scanned or unrolled."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.models.attention import attention
from vatt_jax.models.layers import LayerNorm
from vatt_jax.parallel.sharding import as_rows, constrain, logical
from vatt_jax.rng import Rng

REMAT = ('none', 'dots', 'full')
Layout = tuple[tuple[int, int], ...]  # of each stream (K, n): K rows of n tokens for every example


def pack(parts, examples: int) -> jax.Array:
    """[B·K n …] of each stream -> [B N …]: an example's rows end to end, N the sum of all K·n. Of no two examples, so a mesh moves nothing."""
    return jnp.concatenate([x.reshape(examples, -1, *x.shape[2:]) for x in parts], 1)


def unpack(x: jax.Array, layout: Layout) -> list[jax.Array]:
    """The inverse of `pack`."""
    ends = np.cumsum([rows * n for rows, n in layout])[:-1]
    return [
        part.reshape(-1, n, *x.shape[2:])
        for part, (_, n) in zip(jnp.split(x, ends, 1), layout, strict=True)
    ]


def first_tokens(layout: Layout) -> np.ndarray:
    """Columns of the first token of each row."""
    lengths = [n for rows, n in layout for _ in range(rows)]
    return np.cumsum([0, *lengths[:-1]])


class Projection(nn.Module):
    """An einsum of [B N …] with an n-d kernel kept n-d, so that each of its dimensions can be sharded. equation: B and N are its `...`."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan: tuple[int, int]  # (in, out), for glorot
    bias: bool = True
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x):
        limit = (6 / sum(self.fan)) ** 0.5
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
        kernel = self.param('kernel', logical(init, *self.axes), self.shape, jnp.float32).astype(
            self.dtype
        )
        y = jnp.einsum(self.equation, as_rows(x), kernel)
        letters, out = self.equation.split(',')[1].split('->')
        kept = [i for i, letter in enumerate(letters) if letter in out]
        y = y.reshape(*x.shape[:2], *(self.shape[i] for i in kept))
        if self.bias:
            y = y + self.param(
                'bias',
                logical(jax.nn.initializers.zeros, *(self.axes[i] for i in kept)),
                tuple(self.shape[i] for i in kept),
                jnp.float32,
            ).astype(self.dtype)
        return y


class Block(nn.Module):
    """One layer: x += drop(MHA(norm(x))); x += drop(W2 drop(gelu(W1 norm(x)))). VATT paper, section 3.3; T5 options by fields.

    pre_norm False (original Transformer, official `bert_small`): x = norm(x + drop(MHA(x))), and the same for the feed-forward part.
    """

    width: int
    mlp: int
    heads: int
    head_width: int
    dropout: float
    attention_dropout: float
    bias: bool = True  # of Dense layers (False: T5 and the spectrogram tower)
    rms: bool = (
        False  # of the attention norm (True: T5; its feed-forward norm is a LayerNorm all the same)
    )
    scaled: bool = True  # logits / sqrt(head_width) (False: T5)
    pre_norm: bool = True
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        x,
        mask,
        bias,
        rng: Rng,
        train: bool,
        first_only: bool = False,
        layout: Layout | None = None,
    ):
        """x [B N D] -> [B N D], or [B 1 D] for the first token alone: its keys and values are all tokens'. layout: see Encoder."""
        h, k, d = self.heads, self.head_width, self.width
        into = lambda name: Projection(
            '...d,dhk->...hk',
            (d, h, k),
            ('embed', 'heads', 'kv'),
            (d, h * k),
            self.bias,
            self.dtype,
            name=name,
        )
        drop = lambda y, site: rng.at(site).dropout(y, self.dropout) if train else y
        attention_norm, mlp_norm = (
            LayerNorm(self.rms, name='attention_norm'),
            LayerNorm(name='mlp_norm'),
        )
        before, after = (
            (lambda norm, x: norm(x), lambda norm, x: x)
            if self.pre_norm
            else (lambda norm, x: x, lambda norm, x: norm(x))
        )
        y = before(attention_norm, x)
        first = slice(0, 1) if layout is None else first_tokens(layout)
        x, asking = (x[:, first], y[:, first]) if first_only else (x, y)
        qkv = into('query')(asking), into('key')(y), into('value')(y)
        attend = functools.partial(
            attention,
            scale=k**-0.5 if self.scaled else 1.0,
            dropout=self.attention_dropout if train else 0.0,
            implementation=self.implementation,
        )
        if layout is None:
            out = attend(
                *qkv,
                mask=mask,
                bias=bias[:, :, :1] if bias is not None and first_only else bias,
                rng=rng,
            )
        else:
            asked = tuple((rows, 1) for rows, _ in layout) if first_only else layout
            parts = zip(
                *(unpack(a, of) for a, of in zip(qkv, (asked, layout, layout))),
                mask,
                rng.parts(layout),
                strict=True,
            )
            out = pack([attend(*part, mask=m, rng=r) for *part, m, r in parts], len(x))
            rng = rng.take(first) if first_only else rng
        out = Projection(
            '...hk,hkd->...d',
            (h, k, d),
            ('heads', 'kv', 'embed'),
            (h * k, d),
            self.bias,
            self.dtype,
            name='out',
        )(out)
        x = after(attention_norm, x + drop(out, 'attention'))
        y = before(mlp_norm, x)
        y = Projection(
            '...d,df->...f',
            (d, self.mlp),
            ('embed', 'mlp'),
            (d, self.mlp),
            self.bias,
            self.dtype,
            name='mlp_in',
        )(y)
        y = drop(jax.nn.gelu(constrain(y, 'batch', 'length', 'mlp'), approximate=False), 'hidden')
        y = Projection(
            '...f,fd->...d',
            (self.mlp, d),
            ('mlp', 'embed'),
            (self.mlp, d),
            self.bias,
            self.dtype,
            name='mlp_out',
        )(y)
        return constrain(after(mlp_norm, x + drop(y, 'mlp')), 'batch', 'length', None)


class Encoder(nn.Module):
    """`layers` blocks and, if pre_norm, a final norm and dropout. Parameters of all layers are stacked ([layers, ...]), so a checkpoint does not know
    whether they were scanned or unrolled; random bits are keyed by the layer's number, so both draw the same."""

    layers: int
    width: int
    mlp: int
    heads: int
    head_width: int = 64
    dropout: float = 0.1
    attention_dropout: float = 0.1
    bias: bool = True
    rms: bool = False
    scaled: bool = True
    pre_norm: bool = True
    buckets: int = 0  # > 0: T5's relative-position bias, one table for all layers
    max_distance: int = 64
    scan: bool = False
    remat: str = 'none'
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x, mask, rng: Rng, train: bool, features: bool = False, layout: Layout | None = None
    ):
        """x [B N D], mask bool [B N] or None. features False: only the first token is read, so the last layer computes keys and values
        for all tokens and everything else for the first: [B 1 D]. Exact, since no other token of the last layer reaches it.

        layout: several streams in one pass, their rows end to end along N (`pack`), each attending to itself; mask is then a tuple of theirs, rng an
        rng.Packed, and without features the result is [B ΣK D]. Everything but attention reads the weights once for all of them."""
        block = Block(
            self.width,
            self.mlp,
            self.heads,
            self.head_width,
            self.dropout,
            self.attention_dropout,
            self.bias,
            self.rms,
            self.scaled,
            self.pre_norm,
            self.implementation,
            self.dtype,
            parent=None,
        )
        bias = self._relative_bias(x.shape[1]) if self.buckets else None

        def init(key):
            sample = jnp.zeros((1, 2, self.width), self.dtype)
            one = lambda k: block.init(
                k, sample, None, None, Rng.create(0, 0, jnp.zeros(1)), False
            )['params']
            return nn.meta.add_axis(
                jax.vmap(one)(jax.random.split(key, self.layers)), 0, {nn.PARTITION_NAME: 'layers'}
            )

        stacked = self.param('layers', init)

        def apply(x, params, layer, first_only):
            return block.apply(
                {'params': params}, x, mask, bias, rng.at(layer), train, first_only, layout
            )

        wrap = lambda f: (
            f
            if self.remat == 'none'
            else jax.checkpoint(
                f,
                prevent_cse=not self.scan,
                static_argnums=(3,),
                policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                if self.remat == 'dots'
                else None,
            )
        )
        step = wrap(apply)
        if self.scan:
            last = jax.tree.map(lambda p: p[-1], stacked)
            # Kernels are cast before the loop, so that their gradients, stacked by it, are of the compute type and half as large.
            cast = lambda path, p: p[:-1].astype(self.dtype) if path[-1].key == 'kernel' else p[:-1]
            before = jax.tree_util.tree_map_with_path(cast, stacked)
            x, _ = jax.lax.scan(
                lambda x, at: (step(x, at[0], at[1], False), None),
                x,
                (before, jnp.arange(self.layers - 1)),
            )
            x = step(x, last, self.layers - 1, not features)
        else:
            # split, not indexing: its transpose is one concatenation where indexing's is a padded sum per layer
            leaves, tree = jax.tree.flatten(stacked)
            parts = [jax.lax.split(p, (1,) * self.layers) for p in leaves]
            for layer in range(self.layers):
                params = jax.tree.unflatten(tree, [p[layer][0] for p in parts])
                x = step(x, params, layer, layer == self.layers - 1 and not features)
        if not self.pre_norm:
            return x
        x = LayerNorm(self.rms, name='final_norm')(x)
        rng = (
            rng.at('final')
            if layout is None or features
            else rng.at('final').take(first_tokens(layout))
        )
        return rng.dropout(x, self.dropout) if train else x

    def _relative_bias(self, n: int) -> jax.Array:
        """float32 [1 heads N N]: T5's, one number for each head and bucket."""
        table = self.param(
            'relative_bias',
            logical(jax.nn.initializers.normal(self.width**-0.5), 'buckets', 'heads'),
            (self.buckets, self.heads),
            jnp.float32,
        )
        return table[relative_buckets(n, self.buckets, self.max_distance)].transpose(2, 0, 1)[None]


def relative_buckets(n: int, buckets: int, max_distance: int) -> np.ndarray:
    """int [N N], [query, key]: T5's bidirectional buckets of key minus query. Half of them for each sign; of a half, the first half exact, the rest
    logarithmic up to max_distance."""
    relative = np.arange(n)[None] - np.arange(n)[:, None]
    distance, half = np.abs(relative), buckets // 2
    exact = half // 2
    far = exact + (
        np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact) * (half - exact)
    ).astype(int)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (relative > 0)
