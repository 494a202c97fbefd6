"""Which word was here? Words of a clip's sentences are hidden, and told from what is left.

Masked language modelling of BERT (Devlin et al. 2019) over streams that meet in the model
(`config.model.fusion`), as ViLBERT, UNITER and Hendricks et al. (TACL 2021) train it: words of the
other side, and the picture, say what was there. Patches may be hidden as well, between their tower
and the fusion, and their features be regressed (UNITER's MRFR).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.inputs import masking
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.tokenizer import UNKNOWN
from vatt_jax.losses.masked_regions import class_cross_entropy, feature_regression
from vatt_jax.models.layers import Dense, LayerNorm
from vatt_jax.objectives import forward, heads
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec, select_streams
from vatt_jax.objectives.matching import check_meeting
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'masked_words',
    # Streams that meet: text, and what it may look at.
    'streams': ('video', 'text'),
    # Of the words, how many are to be told; of those, how many become the mask token and how many
    # another word. The rest stays.
    'share': 0.15,
    'mask_share': 0.8,
    'random_share': 0.1,
    # Whether each sentence has a word to be told (UNITER).
    'at_least_one': False,
    # What is hidden at once: words | regions | joint | conditional, see `masking.SCHEMES`.
    'scheme': 'words',
    # The stream whose patches are hidden by the other schemes, and the weight of their loss.
    'patches': 'video',
    'patch_share': 0.15,
    'patch_weight': 1.0,
    # Whether the output layer is the table of words that the text tower reads (BERT).
    'tied': False,
}
# Name of the prediction: the word told at each place.
MASKED_WORDS = 'masked_words'
TABLE = 'word_table'
# Of these tokenizers 0 is a word, or the unknown word is another number.
OTHER_NUMBERS = ('clip', 'siglip')
# What the head of words is given beside its parameters.
Table = Float[Array, 'V W']


class WordHead(nn.Module):
    """BERT's: a layer, GELU, a norm, and the output layer, own or tied to a table.

    Attributes:
        words: number V of the words.
        width: W of the hidden layer, which is that of the table.
    """

    words: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, '... D'], table: Table | None) -> Float[Array, '... V']:
        """Logits, float32; table None: the output layer is a parameter."""
        x = Dense(self.width, ('embed', None), name='hidden')(x.astype(jnp.float32))
        x = LayerNorm(name='norm')(jax.nn.gelu(x, approximate=False))
        if table is None:
            init = nn.initializers.normal(0.02)  # BERT's
            shape = (self.words, self.width)
            table = self.param('table', logical(init, 'vocab', None), shape, jnp.float32)
        zeros = logical(jax.nn.initializers.zeros, 'vocab')
        bias = self.param('bias', zeros, (self.words,), jnp.float32)
        return x @ table.astype(jnp.float32).T + bias


class MaskedWords(Objective):
    """Mean cross entropy of the hidden words, and the squared error of hidden patches' features.

    The mask token is the unknown word: tokenizers have no number of its own for it. Unknown words
    are not hidden. Sentences and patches that are not there count for nothing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        self.text, self.hides_patches = _check(self.config)

    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.streams)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        encoded = spec.outputs.encoded[self.text]
        check_meeting(self.config.streams, spec.model, 'masked_words')
        _check_tokens(encoded, spec.batch[self.text]['data'].shape)
        numbers = spec.info.get('tokenizer') or {}
        if 'size' not in numbers:
            raise ConfigError(
                'config.objective.name=masked_words: expected data with sentences and their '
                'tokenizer, which these have not'
            )
        if self.hides_patches and spec.model.config['fusion'].get('width'):
            raise ConfigError(
                f'config.model.fusion.width: expected 0 with scheme={self.config.scheme!r}, which '
                'tells features of the width of their tower, got '
                f'{spec.model.config["fusion"]["width"]}'
            )
        if numbers.get('kind') in OTHER_NUMBERS or numbers.get('unknown', UNKNOWN) != UNKNOWN:
            raise ConfigError(
                'config.model.inputs.text.tokenizer: masked_words hides words by the number '
                f'{UNKNOWN} of the unknown one, expected words, wordpiece or sentencepiece trained '
                f'here, got {numbers.get("kind")!r}, which numbers words otherwise'
            )
        tower = spec.model.config['towers']['text']
        if self.config.tied and not tower.get('word_width'):
            raise ConfigError(
                'config.objective.tied: expected a text tower with a table of words (field '
                f'word_width), got {tower.get("name")!r}; set tied=False'
            )
        width = tower.get('word_width') or encoded.tokens.shape[-1]
        row = jnp.zeros((1, encoded.tokens.shape[-1]))
        table = jnp.zeros((numbers['size'], width)) if self.config.tied else None
        params = {'words': WordHead(numbers['size'], width).init(key, row, table)['params']}
        if self.hides_patches:
            params['patches'] = self._init_patches(jax.random.fold_in(key, 1), spec)
        return params, {}

    def _init_patches(self, key: jax.Array, spec: Spec) -> Any:
        """The layer that tells features of patches, of their tower's width."""
        width = spec.outputs.encoded[self.config.patches].tokens.shape[-1]
        params, _ = heads.init(heads.Head(outputs=width), key, width)
        return params

    def with_model(self, params: Any, model_params: Any) -> Any:
        if not self.config.tied:
            return params
        for group in ('fronts_text', 'nets_text'):
            if TABLE in model_params.get(group, {}):
                return {**params, TABLE: model_params[group][TABLE]}
        raise ConfigError('config.objective.tied: the text tower has no table of words')

    # ---- A step.

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        streams = select_streams(batch, self.streams())
        text = streams[self.text]
        of_words, _ = masking.corrupted_sides(self.config.scheme, rng)
        hidden = self._hide(text, of_words, num_words(params), rng)
        shape = text['data'].shape
        streams[self.text] = {**text, 'data': hidden.ids.reshape(shape)}
        features, batch_stats = forward.encode_tokens(model, variables, streams, rng)
        # Floats: exact accumulation differentiates by all that is returned here.
        features[_labels_of(self.text)] = hidden.labels.reshape(shape).astype(jnp.float32)
        return Encoding(features, batch_stats, state)

    def _hide(
        self, text: Mapping[str, Any], of_words: Bool[Array, ' B'], size: int, rng: Rng
    ) -> masking.MaskedWords:
        """The words of all sentences [B·K L] after corruption; `size`: of the vocabulary."""
        c = self.config
        ids = text['data']  # [B K L]
        num_sentences = ids.shape[1]
        options = masking.WordMasking(
            mask_id=UNKNOWN,
            vocabulary=(UNKNOWN + 1, size),
            share=c.share,
            mask_share=c.mask_share,
            random_share=c.random_share,
            at_least_one=c.at_least_one,
        )
        maskable = (ids > UNKNOWN) & text['mask'][..., None]
        return masking.mask_words(
            ids.reshape(-1, ids.shape[-1]),
            maskable.reshape(-1, ids.shape[-1]),
            options,
            rng.repeat(num_sentences),
            jnp.repeat(of_words, num_sentences),
        )

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        params = self.with_model(params, variables['params'])
        if TABLE in params and model.config['towers']['text'].get('frozen_words'):
            # The tower does not train it, so its other reader does not either.
            params = {**params, TABLE: jax.lax.stop_gradient(params[TABLE])}
        valid = {stream: batch[stream]['valid'] for stream in self.config.streams}
        pooled = dict(pooled)
        labels = pooled.pop(_labels_of(self.text)).astype(jnp.int32)  # [B K L]
        is_told = (labels != masking.IGNORED) & valid[self.text][:, None, None]
        patches, is_hidden = self._hide_patches(pooled, valid, rng)
        met = forward.interact(model, variables, {**pooled, **patches}, valid, rng.at('fusion'))

        rows = (-1, labels.shape[-1])
        logits = self._logits(params, met[self.text].tokens)  # [B K L V]
        value = class_cross_entropy(
            logits.reshape(*rows, logits.shape[-1]), labels.reshape(rows), is_told.reshape(rows)
        )
        is_right = logits.argmax(-1) == labels
        metrics = {
            'accuracy': masked_mean(is_right.ravel(), is_told.ravel()),
            'words_per_clip': is_told.sum() / len(labels),
        }
        if self.hides_patches:
            tokens = pooled[forward.tokens_of(self.config.patches)]
            # What the tower says is not to move towards what is easily told.
            target = jax.lax.stop_gradient(tokens)
            head = heads.Head(outputs=tokens.shape[-1])
            met_tokens = met[self.config.patches].tokens
            told: Any
            # Nothing is normalised or drawn: all rows are alike.
            _, told = head.apply({'params': params['patches']}, met_tokens, None, rng, False)
            error = feature_regression(told, target, is_hidden)
            metrics |= {'words/loss': value, 'patches/loss': error}
            value = value + self.config.patch_weight * error
        return Loss(value, metrics, variables['batch_stats'], state)

    def _hide_patches(
        self, features: Mapping[str, Any], valid: Mapping[str, Any], rng: Rng
    ) -> tuple[dict[str, jax.Array], Any]:
        """(the tokens that change, by name; bool [B N], those to be told)."""
        if not self.hides_patches:
            return {}, None
        name = forward.tokens_of(self.config.patches)
        tokens = features[name]  # [B N D]
        _, of_patches = masking.corrupted_sides(self.config.scheme, rng)
        is_there = jnp.broadcast_to(valid[self.config.patches][:, None], tokens.shape[:2])
        options = masking.RegionMasking(share=self.config.patch_share)
        hidden = masking.mask_regions(tokens, is_there, options, rng, of_patches)
        return {name: hidden.features}, hidden.is_masked

    # ---- What the words were.

    def _logits(self, params: Any, tokens: Float[Array, '... D']) -> Float[Array, '... V']:
        words, size = params['words'], num_words(params)
        # A table may have rows that no word has.
        table = params[TABLE][:size] if TABLE in params else None
        head = WordHead(size, words['norm']['scale'].shape[-1])
        logits: Any = head.apply({'params': words}, tokens, table)
        # Padding and the unknown word are no answers.
        return jnp.where(jnp.arange(size) > UNKNOWN, logits, -1e9)

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """'masked_words': the word told at each place of each sentence, int32 [B K·L]."""
        if self.text not in encoded:
            return {}
        told = self._logits(params, encoded[self.text].tokens).argmax(-1)  # [B K L]
        return {MASKED_WORDS: told.reshape(len(told), -1).astype(jnp.int32)}


def num_words(params: Any) -> int:
    """The number V of words that the head of these parameters tells apart."""
    return int(params['words']['bias'].shape[-1])


def _labels_of(stream: str) -> str:
    """The name under which `encode` hands on which words are to be told."""
    return f'{stream}/labels'


def _check_tokens(encoded: Any, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless the text tower gives a token for each word of `shape` [B K L]."""
    if encoded.tokens.shape[:3] != shape:
        raise ConfigError(
            f'config.model.towers.text: masked_words expects a token for each of {shape[-1]} words,'
            f' got {encoded.tokens.shape[2]}; choose a tower such as t5 or bert'
        )


def _check(config: Any) -> tuple[str, bool]:
    """(the text stream, whether patches are hidden) of `config.objective`.

    Raises:
        ConfigError: a value cannot work.
    """
    texts = [stream for stream in config.streams if modality_of(stream) == 'text']
    if len(texts) != 1 or len(set(config.streams)) != len(config.streams):
        raise ConfigError(
            f'config.objective.streams: expected text once among different streams, got '
            f'{config.streams}.'
        )
    choose(config.scheme, masking.SCHEMES, 'config.objective.scheme')
    for field in ('share', 'mask_share', 'random_share', 'patch_share'):
        check_range(config[field], 0, 1, f'config.objective.{field}')
    total = config.mask_share + config.random_share
    check_range(total, 0, 1, 'config.objective.mask_share + random_share')
    check_range(config.patch_weight, 0, float('inf'), 'config.objective.patch_weight')
    hides_patches = config.scheme != 'words'
    others = [stream for stream in config.streams if stream not in texts]
    if hides_patches:
        choose(config.patches, others, 'config.objective.patches')
    return texts[0], hides_patches
