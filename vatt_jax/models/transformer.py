"""The transformer encoder of VATT: pre-LN, or post-LN as an option; with T5's and CLIP's options.

Its layers are stacked in one parameter tree, whether they are scanned or unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from vatt_jax.models.attention import attention
from vatt_jax.models.layer_inputs import (
    LayerInputs,
    LowRank,
    add_prompts,
    replace_prompts,
    without_prompts,
)
from vatt_jax.models.layers import ACTIVATIONS, LayerNorm
from vatt_jax.models.stacks import stacked_params
from vatt_jax.parallel.sharding import as_rows, constrain, logical
from vatt_jax.rng import Packed, Rng

REMAT = ('none', 'dots', 'full')
Layout = tuple[tuple[int, int], ...]  # of each stream (K, n): K rows of n tokens for every example
# Parameters, deep prompts and low-rank parts of an adapter; of all layers [layers …], or of one.
LayerTree = tuple[Any, Any, Any]
Spread = tuple[str, float]  # ('uniform', the limit) or ('normal', the deviation), around 0


def pack(parts: Sequence[jax.Array], examples: int) -> jax.Array:
    """Put several streams into one array, end to end along the token axis.

    Rows of one example only are joined, so on a mesh nothing moves between devices.

    Args:
        parts: [B·K n …] of each stream.
        examples: B.

    Returns:
        [B N …], N the sum of all K·n.
    """
    # Rows are example by example (b·K + k), so this reshape puts an example's K rows side by side.
    return jnp.concatenate([x.reshape(examples, -1, *x.shape[2:]) for x in parts], axis=1)


def unpack(x: jax.Array, layout: Layout) -> list[jax.Array]:
    """Cut [B N …] into [B·K n …] of each stream, the inverse of `pack`."""
    lengths = [rows * row_length for rows, row_length in layout]
    split_points = np.cumsum(lengths)[:-1]
    parts = jnp.split(x, split_points, axis=1)
    return [
        part.reshape(-1, row_length, *x.shape[2:])
        for part, (_, row_length) in zip(parts, layout, strict=True)
    ]


def first_tokens(layout: Layout) -> Int[np.ndarray, ' R']:
    """Columns of the first token of each row of a packed array."""
    row_lengths = []
    for rows, row_length in layout:
        row_lengths += [row_length] * rows
    return np.cumsum([0, *row_lengths[:-1]])


def take_token(x: Shaped[Array, 'B N D'], column: Int[Array, ' B']) -> Shaped[Array, 'B 1 D']:
    """One token of each row."""
    return jnp.take_along_axis(x, column[:, None, None], axis=1)


def causal_mask(num_tokens: int, mask: jax.Array | None) -> Bool[Array, '_ N N']:
    """Which keys each query sees: its own token, those before it, and of these what `mask` has.

    Args:
        num_tokens: N.
        mask: bool [B N], the keys that are there, or None.

    Returns:
        [query, key] of all rows, or of each.
    """
    seen = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))[None]
    return seen if mask is None else seen & mask[:, None]


def _mask_of_token(mask: jax.Array | None, column: jax.Array) -> jax.Array | None:
    """What one query of each row sees: [1|B N N] -> [B 1 N]; [B N], of keys alone, as it is."""
    if mask is None or mask.ndim == 2:
        return mask
    shared = jnp.broadcast_to(mask, (len(column), *mask.shape[1:]))
    return take_token(shared, column)


def glorot_spreads(width: int, heads_width: int, mlp: int, layers: int) -> dict[str, Spread]:
    """Keras's default: uniform, variance 2 / (fan in + fan out)."""
    attention = ('uniform', (6 / (width + heads_width)) ** 0.5)
    feed_forward = ('uniform', (6 / (width + mlp)) ** 0.5)
    spreads: dict[str, Spread] = {name: attention for name in ('query', 'key', 'value', 'out')}
    return {**spreads, 'mlp_in': feed_forward, 'mlp_out': feed_forward}


def torch_spreads(width: int, heads_width: int, mlp: int, layers: int) -> dict[str, Spread]:
    """PyTorch's defaults, with which CLIP's image transformer begins.

    The three projections of MultiheadAttention are one matrix there, glorot uniform as a whole.
    """
    projected = ('uniform', (6 / (width + 3 * heads_width)) ** 0.5)
    spreads: dict[str, Spread] = {name: projected for name in ('query', 'key', 'value')}
    return {
        **spreads,
        'out': ('uniform', heads_width**-0.5),
        'mlp_in': ('uniform', width**-0.5),
        'mlp_out': ('uniform', mlp**-0.5),
    }


def clip_spreads(width: int, heads_width: int, mlp: int, layers: int) -> dict[str, Spread]:
    """CLIP's text transformer (its released code): what adds to the residual is scaled by depth."""
    residual = ('normal', width**-0.5 * (2 * layers) ** -0.5)
    attention = ('normal', width**-0.5)
    spreads: dict[str, Spread] = {name: attention for name in ('query', 'key', 'value')}
    return {
        **spreads,
        'out': residual,
        'mlp_in': ('normal', (2 * width) ** -0.5),
        'mlp_out': residual,
    }


def bert_spreads(width: int, heads_width: int, mlp: int, layers: int) -> dict[str, Spread]:
    """BERT's, whatever the sizes."""
    names = ('query', 'key', 'value', 'out', 'mlp_in', 'mlp_out')
    return dict.fromkeys(names, ('normal', 0.02))


def linear_spreads(width: int, heads_width: int, mlp: int, layers: int) -> dict[str, Spread]:
    """PyTorch's default of linear layers that stand by themselves: within 1/sqrt(fan in) of 0."""
    names = ('query', 'key', 'value', 'mlp_in')
    spreads: dict[str, Spread] = dict.fromkeys(names, ('uniform', width**-0.5))
    return {**spreads, 'out': ('uniform', heads_width**-0.5), 'mlp_out': ('uniform', mlp**-0.5)}


# Initial values of a block's kernels: (width, heads · head_width, mlp, layers) -> {kernel: Spread}.
BLOCK_INITS: dict[str, Callable[[int, int, int, int], dict[str, Spread]]] = {
    'glorot': glorot_spreads,
    'torch': torch_spreads,
    'clip': clip_spreads,
    'bert': bert_spreads,
    'linear': linear_spreads,
}


class Projection(nn.Module):
    """An einsum with a kernel of several dimensions, kept so that each can be sharded.

    Attributes:
        equation: of [B N …] with the kernel; B and N are its `...`.
        shape: of the kernel.
        axes: logical names of the kernel's dimensions.
        spread: of the initial values.
        bias: whether to add one.
        dtype: to compute in.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    spread: Spread
    bias: bool = True
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: jax.Array, low_rank: LowRank | None = None) -> jax.Array:
        """Project x [B N …]; `low_rank` is added to the kernel, without being multiplied out."""
        # JAX's own initialisers would read fans off the last two axes, [heads kv] of [D heads kv],
        # and take the first for the size of a receptive field.
        kind, size = self.spread

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            if kind == 'normal':
                return size * jax.random.normal(key, shape, dtype)
            return jax.random.uniform(key, shape, dtype, -size, size)

        kernel = self.param('kernel', logical(init, *self.axes), self.shape, jnp.float32)
        y = jnp.einsum(self.equation, as_rows(x), kernel.astype(self.dtype))  # [B·N …] or [B N …]

        # Dimensions of the kernel that the result has as well: they are also the bias's.
        kernel_letters, output_letters = self.equation.split(',')[1].split('->')
        output_dims = [i for i, letter in enumerate(kernel_letters) if letter in output_letters]
        output_shape = tuple(self.shape[i] for i in output_dims)
        output_axes = [self.axes[i] for i in output_dims]
        y = y.reshape(*x.shape[:2], *output_shape)
        if self.bias:
            zeros = logical(jax.nn.initializers.zeros, *output_axes)
            bias = self.param('bias', zeros, output_shape, jnp.float32)
            y = y + bias.astype(self.dtype)
        if low_rank is None:
            return y
        return y + low_rank.apply(x, num_inputs=len(self.shape) - len(output_dims))


class Block(nn.Module):
    """One layer (VATT paper), with T5's and CLIP's options.

        x += drop(MHA(norm(x)));  x += drop(W2 drop(gelu(W1 norm(x))))

    With pre_norm False (the original Transformer, official `bert_small`) instead
    x = norm(x + drop(MHA(x))), and the same for the feed-forward part.

    Attributes:
        bias: whether dense layers have one (False: T5 and the spectrogram tower).
        rms: whether the attention norm is an RMS norm (True: T5; its feed-forward norm is a
            LayerNorm all the same).
        scaled: whether logits are divided by sqrt(head_width) (False: T5).
        pre_norm: whether norms come before each part or after it.
        eps: of all norms, added to the variance.
        activation: entry of layers.ACTIVATIONS.
        kernel_init: entry of BLOCK_INITS.
        depth: number of layers, for initial values that depend on it.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
    """

    width: int
    mlp: int
    heads: int
    head_width: int
    dropout: float
    attention_dropout: float
    bias: bool = True
    rms: bool = False
    scaled: bool = True
    pre_norm: bool = True
    eps: float = 1e-6
    activation: str = 'gelu'
    kernel_init: str = 'glorot'
    depth: int = 1
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B N D'],
        mask: Any,
        bias: jax.Array | None,
        rng: Rng,
        train: bool,
        first_only: bool = False,
        layout: Layout | None = None,
        read: jax.Array | None = None,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> Float[Array, 'B Nq D']:
        """Apply the layer.

        Args:
            x: tokens.
            mask: bool [B N] or [1|B N N] (queries, keys) or None; with a layout, a tuple of [B N].
            bias: added to the attention logits, [1 heads N N], or None.
            rng: of the layer; with a layout, an rng.Packed.
            train: whether dropout is on.
            first_only: whether to compute the first token of each row alone. It attends to all
                tokens, so keys and values are computed for all.
            layout: of several streams packed into one; see Encoder.
            read: int [B], with first_only, the token to compute in the place of the first.
            low_rank: projection -> what an adapter adds to its kernel.

        Returns:
            [B N D], or with first_only [B 1 D] (with a layout [B ΣK D]).
        """
        low_rank = low_rank or {}
        # Both norms are made here so that a layer's parameters keep their order.
        attention_norm = LayerNorm(self.rms, self.eps, name='attention_norm')
        mlp_norm = LayerNorm(eps=self.eps, name='mlp_norm')

        y = attention_norm(x) if self.pre_norm else x
        first: slice | np.ndarray = slice(0, 1)
        if layout is not None:
            first = first_tokens(layout)
        # In the last layer queries, residual and feed-forward part are of the first token alone.
        query_input = y
        if first_only and read is not None:
            x = take_token(x, read)
            query_input = take_token(y, read)
            mask = _mask_of_token(mask, read)
        elif first_only:
            x = x[:, first]
            query_input = y[:, first]
        query = self._qkv_projection('query')(query_input, low_rank.get('query'))  # [B Nq heads kv]
        key = self._qkv_projection('key')(y, low_rank.get('key'))  # [B N heads kv]
        value = self._qkv_projection('value')(y, low_rank.get('value'))  # [B N heads kv]

        if layout is None:
            if bias is not None and first_only:
                bias = bias[:, :, :1]  # the row of the first query
            attended = self._attend(query, key, value, mask, bias, rng, train)
        else:
            assert isinstance(rng, Packed)
            query_layout = layout
            if first_only:
                query_layout = tuple((rows, 1) for rows, _ in layout)
            # One attention for each stream. Over the packed row with a block-diagonal mask, most
            # logits would be computed to be masked.
            parts = []
            for stream_query, stream_key, stream_value, stream_mask, stream_rng in zip(
                unpack(query, query_layout),
                unpack(key, layout),
                unpack(value, layout),
                mask,
                rng.parts(layout),
                strict=True,
            ):
                # T5's bias belongs to towers of their own, which are never packed.
                part = self._attend(
                    stream_query, stream_key, stream_value, stream_mask, None, stream_rng, train
                )
                parts.append(part)
            attended = pack(parts, len(x))
            if first_only:
                # The remaining columns draw what they would draw among all tokens.
                rng = rng.take(first)

        attended = Projection(
            equation='...hk,hkd->...d',
            shape=(self.heads, self.head_width, self.width),
            axes=('heads', 'kv', 'embed'),
            spread=self._spread('out'),
            bias=self.bias,
            dtype=self.dtype,
            name='out',
        )(attended, low_rank.get('out'))  # [B Nq D]
        # Draws stay the same on unpacked rows too: bits are numbered from the first token.
        x = x + self._drop(attended, rng, 'attention', train)
        if not self.pre_norm:
            x = attention_norm(x)

        y = mlp_norm(x) if self.pre_norm else x
        y = Projection(
            equation='...d,df->...f',
            shape=(self.width, self.mlp),
            axes=('embed', 'mlp'),
            spread=self._spread('mlp_in'),
            bias=self.bias,
            dtype=self.dtype,
            name='mlp_in',
        )(y, low_rank.get('mlp_in'))  # [B Nq mlp]
        # `mlp` is split over the mesh between the two matrices (one sum over devices, after the
        # second).
        y = ACTIVATIONS[self.activation](constrain(y, 'batch', 'length', 'mlp'))
        y = self._drop(y, rng, 'hidden', train)
        y = Projection(
            equation='...f,fd->...d',
            shape=(self.mlp, self.width),
            axes=('mlp', 'embed'),
            spread=self._spread('mlp_out'),
            bias=self.bias,
            dtype=self.dtype,
            name='mlp_out',
        )(y, low_rank.get('mlp_out'))  # [B Nq D]
        x = x + self._drop(y, rng, 'mlp', train)
        if not self.pre_norm:
            x = mlp_norm(x)
        # Tokens over `seq` and the width whole: the layout in which the next layer begins.
        return constrain(x, 'batch', 'length', None)

    def _spread(self, kernel: str) -> Spread:
        """Of the initial values of a kernel."""
        spreads = BLOCK_INITS[self.kernel_init](
            self.width, self.heads * self.head_width, self.mlp, self.depth
        )
        return spreads[kernel]

    def _qkv_projection(self, name: str) -> Projection:
        """The projection to queries, keys or values."""
        return Projection(
            equation='...d,dhk->...hk',
            shape=(self.width, self.heads, self.head_width),
            axes=('embed', 'heads', 'kv'),
            spread=self._spread(name),
            bias=self.bias,
            dtype=self.dtype,
            name=name,
        )

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        bias: jax.Array | None,
        rng: Rng,
        train: bool,
    ) -> jax.Array:
        """Attention with the options of this layer."""
        return attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=self.head_width**-0.5 if self.scaled else 1.0,
            dropout=self.attention_dropout if train else 0.0,
            rng=rng,
            implementation=self.implementation,
        )

    def _drop(self, x: jax.Array, rng: Rng, site: str, train: bool) -> jax.Array:
        """Dropout with the random bits of a site, in training."""
        if not train:
            return x
        return rng.at(site).dropout(x, self.dropout)


class Encoder(nn.Module):
    """`layers` blocks and, if pre_norm, a final norm and dropout.

    Parameters of all layers are stacked ([layers, …]), so a checkpoint does not know whether they
    were scanned or unrolled. Random bits are keyed by the layer's number, so both draw the same.

    Attributes:
        causal: whether a token attends to itself and those before it alone (CLIP's text).
        buckets: if positive, T5's relative-position bias, one table for all layers.
        max_distance: from which on all distances share a bucket.
        scan: whether layers are a `lax.scan` (one compiled layer) or unrolled.
        remat: entry of REMAT, what the backward pass computes again: nothing, all but the results
            of matrix products, or everything.

    The other attributes are those of `Block`.
    """

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
    eps: float = 1e-6
    activation: str = 'gelu'
    kernel_init: str = 'glorot'
    causal: bool = False
    buckets: int = 0
    max_distance: int = 64
    scan: bool = False
    remat: str = 'none'
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B N D'],
        mask: Any,
        rng: Rng,
        train: bool,
        features: bool = False,
        layout: Layout | None = None,
        read: jax.Array | None = None,
        adapter: LayerInputs | None = None,
    ) -> Float[Array, 'B Nq D']:
        """Encode tokens.

        Args:
            x: tokens, the aggregate token first.
            mask: bool [B N] or None.
            rng: of these rows.
            train: whether dropout is on.
            features: whether all tokens are read. Otherwise only the first one is: the last layer
                computes keys and values for all tokens and everything else for the first. This is
                exact, since no other token of the last layer reaches it.
            layout: of several streams in one pass, their rows end to end along N (`pack`), each
                attending to itself; mask is then a tuple of theirs and rng an rng.Packed.
                Everything but attention reads the weights once for all of them.
            read: int [B], the token that is read without features; None: the first one. For
                encoders without dropout, whose random bits are numbered from the first.
            adapter: what the layers are given beside the tokens; not with a layout.

        Returns:
            [B N D], or without features [B 1 D] (with a layout [B ΣK D]).
        """
        # parent=None: a pure function of its parameters, which this module stacks and slices itself
        block = Block(
            width=self.width,
            mlp=self.mlp,
            heads=self.heads,
            head_width=self.head_width,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            bias=self.bias,
            rms=self.rms,
            scaled=self.scaled,
            pre_norm=self.pre_norm,
            eps=self.eps,
            activation=self.activation,
            kernel_init=self.kernel_init,
            depth=self.layers,
            implementation=self.implementation,
            dtype=self.dtype,
            parent=None,
        )
        adapter = adapter or LayerInputs()
        if adapter.prompts is not None:
            x = add_prompts(x, adapter.prompts)
        if self.causal:
            mask = causal_mask(x.shape[1], mask)
        # Made once: every layer adds the same table (T5).
        bias = self._relative_bias(x.shape[1]) if self.buckets else None
        stacked = stacked_params(self, 'layers', self._layer_init(block), self.layers)

        def apply_layer(
            x: jax.Array, stacked: LayerTree, layer: int | jax.Array, first_only: bool
        ) -> jax.Array:
            params, deep_prompts, low_rank = stacked
            if deep_prompts is not None:
                x = replace_prompts(x, deep_prompts)
            y: Any = block.apply(
                {'params': params},
                x,
                mask,
                bias,
                rng.at(layer),
                train,
                first_only,
                layout,
                read,
                low_rank,
            )
            return y

        run_layer = self._rematerialised(apply_layer)
        layers = (stacked, adapter.deep_prompts, adapter.low_rank)
        if self.scan:
            x = self._scan_layers(run_layer, layers, x, features)
        else:
            x = self._unroll_layers(run_layer, layers, x, features)
        if adapter.prompts is not None and features:
            x = without_prompts(x, adapter.prompts)
        if not self.pre_norm:
            return x

        # Post-LN layers end in a norm; pre-LN leaves the plain sum of all residuals.
        x = LayerNorm(self.rms, self.eps, name='final_norm')(x)
        if not train:
            return x
        rng = rng.at('final')  # apart from the layers, whose sites are numbers
        if layout is not None and not features:
            assert isinstance(rng, Packed)
            rng = rng.take(first_tokens(layout))
        return rng.dropout(x, self.dropout)

    def _layer_init(self, block: Block) -> Callable[[jax.Array], Any]:
        """An initialiser of the parameters of one layer."""

        def init_layer(key: jax.Array) -> Any:
            # No parameter's shape depends on the numbers of examples and tokens.
            sample = jnp.zeros((1, 2, self.width), self.dtype)
            rng = Rng.create(0, 0, jnp.zeros(1))
            variables: Any = block.init(key, sample, None, None, rng, False)
            return variables['params']

        return init_layer

    def _rematerialised(self, apply_layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """The layer with what the backward pass is to compute again; see REMAT."""
        if self.remat == 'none':
            return apply_layer
        policy = None
        if self.remat == 'dots':
            # Saves products with weights. Logits have batch dimensions (B, heads) and are
            # recomputed: they are the memory that grows with N².
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(
            apply_layer,
            # Inside a scan, XLA cannot merge the two computations anyway, and this barrier costs.
            prevent_cse=not self.scan,
            static_argnums=(3,),  # first_only
            policy=policy,
        )

    def _scan_layers(
        self, run_layer: Callable[..., jax.Array], stacked: LayerTree, x: jax.Array, features: bool
    ) -> jax.Array:
        """Scan all layers but the last one, which may compute the first token alone."""

        def without_last(path: Any, param: jax.Array) -> jax.Array:
            # Kernels are cast before the loop, so that their gradients, stacked by it, are of the
            # compute type and half as large.
            if getattr(path[-1], 'key', None) == 'kernel':
                return param[:-1].astype(self.dtype)
            return param[:-1]

        def scan_step(x: jax.Array, scanned: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            params, layer = scanned
            return run_layer(x, params, layer, False), None

        last_params = jax.tree.map(lambda param: param[-1], stacked)
        scanned_params = jax.tree_util.tree_map_with_path(without_last, stacked)
        # The carry of a scan keeps its shape, so the layer that may return one token is outside.
        x, _ = jax.lax.scan(scan_step, x, (scanned_params, jnp.arange(self.layers - 1)))
        return run_layer(x, last_params, self.layers - 1, not features)

    def _unroll_layers(
        self, run_layer: Callable[..., jax.Array], stacked: LayerTree, x: jax.Array, features: bool
    ) -> jax.Array:
        """Apply the layers one after another; the last may compute the first token alone."""
        # split, not indexing: its transpose is one concatenation where indexing's is a padded sum
        # for each layer
        leaves, tree = jax.tree.flatten(stacked)
        split_leaves = [jax.lax.split(leaf, (1,) * self.layers) for leaf in leaves]
        for layer in range(self.layers):
            params = jax.tree.unflatten(tree, [parts[layer][0] for parts in split_leaves])
            is_last = layer == self.layers - 1
            x = run_layer(x, params, layer, is_last and not features)
        return x

    def _relative_bias(self, num_tokens: int) -> Float[Array, '1 heads N N']:
        """T5's bias of the logits, one number for each head and bucket, float32."""
        table = self.param(
            'relative_bias',
            logical(jax.nn.initializers.normal(self.width**-0.5), 'buckets', 'heads'),
            (self.buckets, self.heads),
            jnp.float32,
        )
        # The buckets are a NumPy constant of the program; the aggregate token is position 0.
        bias = table[relative_buckets(num_tokens, self.buckets, self.max_distance)]  # [N N heads]
        return bias.transpose(2, 0, 1)[None]


def relative_buckets(n: int, buckets: int, max_distance: int) -> Int[np.ndarray, 'N N']:
    """T5's bidirectional buckets of the distance key minus query, [query, key].

    Half of them are for each sign. Of a half, the first half is exact, one distance each; the rest
    is logarithmic up to max_distance.
    """
    relative = np.arange(n)[None] - np.arange(n)[:, None]  # [N N], key minus query
    distance = np.abs(relative)
    half = buckets // 2
    num_exact = half // 2
    # The floor of 1 only keeps the logarithm finite; those distances are exact ones below.
    log_ratio = np.log(np.maximum(distance, 1) / num_exact) / np.log(max_distance / num_exact)
    logarithmic = num_exact + (log_ratio * (half - num_exact)).astype(int)
    bucket = np.where(distance < num_exact, distance, np.minimum(logarithmic, half - 1))
    return bucket + half * (relative > 0)  # [N N]
