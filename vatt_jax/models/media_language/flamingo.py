"""Flamingo (Alayrac et al. 2022): a frozen language model that reads media between its layers.

Media are the features of a frozen vision tower (or of any other one), computed by whoever gives
them. What is new are the resampler, the gated layers, and the rows of new words.
"""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.models.fusion.blocks import BlockOptions, CrossBlock
from vatt_jax.models.language import Cache, CausalLM, Form, Interleaved, LMOutputs
from vatt_jax.models.language.decoder import SPREAD
from vatt_jax.models.media_language.media import ATTEND, seen_media
from vatt_jax.models.media_language.resampler import EPS, PerceiverResampler
from vatt_jax.models.stacks import stacked_params
from vatt_jax.parallel.sharding import logical

# Keys and values of the media in every gated layer, [gated_layers B M·R heads kv] each.
MediaMemory = tuple[Any, Any]


# A pytree: it crosses loops and the boundary of jit.
@flax.struct.dataclass
class FlamingoCache:
    """What has been read so far: words, and all media, whether their tags have come or not.

    Attributes:
        text: of the language model.
        num_tags: int32 [B], tags so far.
        media: keys and values.
    """

    text: Cache
    num_tags: Any
    media: MediaMemory

    @property
    def slots(self) -> int:
        """Of words."""
        return self.text.slots

    def take_rows(self, rows: Int[Array, ' R']) -> FlamingoCache:
        """The cache of other rows: those of these numbers, in this order."""
        media = jax.tree.map(lambda x: x[:, rows], self.media)
        return FlamingoCache(self.text.take_rows(rows), self.num_tags[rows], media)


class FlamingoLM(nn.Module):
    """A language model with a gated cross-attention layer before every n-th of its layers.

        y += tanh(a) · attention(queries: norm(y), keys and values: media);
        y += tanh(b) · MLP(norm(y))

    a and b are 0 at first, when the model is the language model to the bit. Parameters of the
    latter are the entry `language`, all others are new (`new_parts.split`). Decoding takes it like
    a CausalLM, with a cache of `begin`.

    Attributes:
        language: the language model.
        resampler: of the media.
        tag: number of the word that stands for a medium.
        new_words: words behind those of the language model, such as the tag and the end of a chunk:
            numbers form.vocab, form.vocab + 1, …
        every: n; the first gated layer is before layer n - 1, counted from 0.
        heads: of the cross-attention.
        head_width: of each head.
        mlp: hidden width of the feed-forward part; 0: 4 D.
        activation: entry of layers.ACTIVATIONS; the paper's is squared_relu, the open
            implementations' gelu.
        attend: entry of media.ATTEND.
    """

    language: CausalLM
    resampler: PerceiverResampler
    tag: int
    new_words: int = 2
    every: int = 1
    heads: int = 8
    head_width: int = 64
    mlp: int = 0
    activation: str = 'gelu'
    attend: str = 'immediate'

    def setup(self) -> None:
        form = self.form
        choose(self.attend, ATTEND, 'FlamingoLM.attend')
        check_range(self.every, 1, form.layers, 'FlamingoLM.every')
        check_range(self.tag, 0, form.vocab + self.new_words - 1, 'FlamingoLM.tag')
        self.gated_layers = stacked_params(
            self, 'gated_layers', self._init_layer, form.layers // self.every
        )
        if self.new_words:
            init = logical(jax.nn.initializers.normal(SPREAD), None, 'embed')
            shape = (self.new_words, form.width)
            self.new_rows = self.param('new_rows', init, shape, jnp.float32)
            if not form.tied:
                self.new_outputs = self.param('new_outputs', init, shape, jnp.float32)

    @property
    def form(self) -> Form:
        """Of the language model."""
        return self.language.form

    @property
    def dtype(self) -> str:
        """Of activations."""
        return self.language.dtype

    def __call__(
        self,
        ids: Int[Array, 'B N'],
        mask: Bool[Array, 'B N'] | None = None,
        cache: Any = None,
        media: Float[Array, 'B M T S Dm'] | None = None,
    ) -> LMOutputs:
        """Logits at every word, of the new words too; the arguments are those of `hidden`."""
        x, cache = self.hidden(ids, mask, cache, media)
        return LMOutputs(self.logits(x), cache)

    def hidden(
        self,
        ids: Int[Array, 'B N'],
        mask: Bool[Array, 'B N'] | None = None,
        cache: Any = None,
        media: Float[Array, 'B M T S Dm'] | None = None,
    ) -> tuple[Float[Array, 'B N D'], FlamingoCache | None]:
        """What the last norm makes of each word.

        Args:
            ids: numbers of words, tags among them.
            mask: words that are there; None: all.
            cache: of `begin`, and of the words before these; or None.
            media: S tokens of T frames of M media; None with a cache, which holds them.

        Returns:
            The tokens, and the cache with them.

        Raises:
            ConfigError: not exactly one of media and a cache of `begin` is given, or the text is
                longer than the model's context.
        """
        if mask is None:
            mask = jnp.ones(ids.shape, bool)
        memory = self._memory(cache, media)
        num_tags = jnp.cumsum((ids == self.tag) & mask, axis=1)
        if cache is not None:
            num_tags = num_tags + cache.num_tags[:, None]
        x, text = self.language.hidden(
            self.embed(ids),
            mask,
            None if cache is None else cache.text,
            interleaved=self._interleaved(memory, num_tags),
        )
        if cache is not None:
            assert text is not None
            cache = FlamingoCache(text, num_tags[:, -1], memory)
        return x, cache

    def begin(self, media: Float[Array, 'B M T S Dm'], slots: int) -> FlamingoCache:
        """A cache that holds the media, with room for so many words: what decoding starts from."""
        text = Cache.create(self.form, len(media), slots, self.dtype)
        return FlamingoCache(text, jnp.zeros(len(media), jnp.int32), self.look(media))

    def look(self, media: Float[Array, 'B M T S Dm']) -> MediaMemory:
        """Keys and values of media in every gated layer. They are not normed again."""
        tokens = self.resampler(media)  # [B M R Dm]
        tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
        block = self._block()

        def of_layer(params: Any) -> Any:
            return block.apply({'params': params}, tokens, method='keys_and_values')

        return jax.vmap(of_layer)(self.gated_layers)

    def embed(self, ids: Int[Array, 'B N']) -> Float[Array, 'B N D']:
        """Rows of the word tables, the frozen and the new one."""
        vocab = self.form.vocab
        known = self.language.embed(jnp.minimum(ids, vocab - 1))
        if not self.new_words:
            return known
        new = self.new_rows[jnp.maximum(ids - vocab, 0)].astype(self.dtype)
        return jnp.where((ids >= vocab)[:, :, None], new, known)

    def logits(self, hidden: Float[Array, 'B N D']) -> Float32[Array, 'B N V']:
        """Logits of the next word, float32; those of new words last."""
        known = self.language.logits(hidden)
        if not self.new_words:
            return known
        rows = self.new_rows if self.form.tied else self.new_outputs
        new = hidden @ rows.T.astype(self.dtype)
        return jnp.concatenate([known, new.astype(jnp.float32)], axis=-1)

    def _memory(self, cache: Any, media: Any) -> MediaMemory:
        if cache is None and media is not None:
            return self.look(media)
        if isinstance(cache, FlamingoCache) and media is None:
            return cache.media
        got = 'no cache' if cache is None else f'a {type(cache).__name__}'
        raise ConfigError(
            'FlamingoLM: expected either media or a cache of FlamingoLM.begin, which holds them, '
            f'got {got} and {"no " if media is None else ""}media; generate and beam_search take '
            'the cache of `begin` as cache='
        )

    def _interleaved(self, memory: MediaMemory, num_tags: Int[Array, 'B N']) -> Interleaved:
        """The gated layers, for words that see these media."""
        num_tokens = self.resampler.latents
        num_media = memory[0].shape[2] // num_tokens
        seen = seen_media(num_tags, num_media, self.attend)
        seen = jnp.repeat(seen, num_tokens, axis=2)  # [B N M·R]
        block = self._block()

        def apply(x: jax.Array, inputs: Any) -> jax.Array:
            params, (key, value) = inputs
            y: Any = block.apply({'params': params}, x, key, value, seen, method=_attend)
            return y

        return Interleaved((self.gated_layers, memory), self.every, apply)

    def _block(self) -> CrossBlock:
        """A layer without parameters of its own: they are rows of `gated_layers`."""
        width = self.form.width
        options = BlockOptions(
            mlp=self.mlp or 4 * width,
            heads=self.heads,
            head_width=self.head_width,
            bias=False,
            gated=True,
            eps=EPS,
            activation=self.activation,
            kernel_init='linear',
            implementation=self.language.implementation,
            dtype=self.dtype,
        )
        return CrossBlock(width, options, self.resampler.width, parent=None)

    def _init_layer(self, key: jax.Array) -> Any:
        """Initial parameters of one gated layer."""
        # No parameter's shape depends on the numbers of rows and tokens.
        x = jnp.zeros((1, 1, self.form.width), self.dtype)
        media = jnp.zeros((1, 1, self.resampler.width), self.dtype)
        variables: Any = self._block().init(key, x, media, None, None, False)
        return variables['params']


def _attend(
    block: CrossBlock,
    x: Float[Array, 'B N D'],
    key: Float[Array, 'B M·R heads kv'],
    value: Float[Array, 'B M·R heads kv'],
    seen: Bool[Array, 'B N M·R'],
) -> Float[Array, 'B N D']:
    return block.attend(x, block.normed(x), key, value, seen, rng=None, train=False)
