"""ViLBERT and UNITER in the training loop: masked words, masked regions, matching.

Lu et al. 2019, Chen et al. 2020; docs/vilbert_uniter.md. The network is the objective's own. Its
regions are the cells of a picture tower's map, or those that a detector found before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.masking import RegionMasking, WordMasking
from vatt_jax.inputs.regions import Regions
from vatt_jax.models.vision_language import Uniter, Vilbert
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec, select_streams
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.objectives.matching import MATCHING
from vatt_jax.objectives.region_pretraining import networks, sources, steps
from vatt_jax.objectives.region_pretraining.fields import (
    DEFAULTS,
    OF_CLASSES,
    OF_FEATURES,
    check,
)
from vatt_jax.objectives.region_pretraining.pairs import Pairs, hide
from vatt_jax.objectives.region_pretraining.sources import Marks
from vatt_jax.objectives.region_pretraining.steps import Steps
from vatt_jax.objectives.region_pretraining.uniter import TASKS, UniterLosses
from vatt_jax.rng import Rng

# Entries of the state, and tasks that have an accuracy.
PARTS = ('loss', 'accuracy')
HAVE_ACCURACY = ('words', 'match')
# Tokenizers whose sentences have marks of another kind.
MARKED = ('clip', 'siglip')
# Prediction: of each clip the hidden words, those told right, and those without the picture.
REGION_WORDS = 'region_words'


class RegionPretraining(Objective):
    """Pairs of a sentence and a picture's regions, by either model.

    A clip without a sentence, or without a region, counts nowhere. Of a clip's sentences one is
    drawn; evaluation takes the first. In the log, `loss/TASK` of a task that was not this step's is
    that of the last step that had it.

    Parameters are those of the network, by the names of `models/vision_language`; state, with one
    task a step, is {'loss', 'accuracy'}: the latest of each task.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        check(self.config)
        # `init` knows them; a loaded run has other inputs than its training.
        self.implementation = 'dense'
        self.dtype = 'float32'

    def streams(self) -> tuple[str, ...]:
        c = self.config
        return (c.text, c.picture) if c.picture else (c.text,)

    def own_streams(self) -> tuple[str, ...]:
        return (self.config.text,)

    def map_streams(self) -> tuple[str, ...]:
        return (self.config.picture,) if self.config.picture else ()

    @property
    def weights(self) -> dict[str, float]:
        """Tasks that there are, in a fixed order."""
        tasks = self.config.tasks
        return {name: float(tasks[name]) for name in TASKS if tasks.get(name, 0) > 0}

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        self.implementation, self.dtype = spec.model.config['attention'], spec.model.dtype
        num_words = self._num_words(spec)
        feature_width, num_classes = self._region_sizes(spec)
        sizes = networks.sizes_of(
            c.model,
            c.size,
            vocabulary=self._marks(num_words=num_words).table,
            feature_width=feature_width,
            # UNITER has this head whatever the tasks; checkpoints hold no empty arrays.
            targets=max(num_classes, 1) if self._tells_classes() else feature_width,
        )
        length = spec.batch[c.text]['data'].shape[-1] + 2
        if length > sizes.positions:
            raise ConfigError(
                f'config.model.inputs.text.words: expected at most {sizes.positions - 2}, as '
                f'{c.size!r} has {sizes.positions} positions, got {length - 2}'
            )
        module = networks.network(sizes, self.implementation, self.dtype)
        if c.alignment and isinstance(module, Vilbert):
            _check_alignment(module)
        params = networks.init(module, key, length)
        if c.schedule == steps.SUM:
            return params, {}
        # One array each: a buffer that occurs twice in the state cannot be donated.
        zeros = {part: {name: jnp.zeros(()) for name in self.weights} for part in PARTS}
        return params, zeros

    def _num_words(self, spec: Spec) -> int:
        """Numbers of the tokenizer, or more of them."""
        tokenizer = spec.info.get('tokenizer', {})
        if tokenizer.get('kind') in MARKED or 'size' not in tokenizer:
            raise ConfigError(
                'config.model.inputs.text.tokenizer: region_pretraining puts marks of its own '
                f'around words, sentencepiece or wordpiece, got {tokenizer.get("kind")!r}'
            )
        size = tokenizer['size']
        if self.config.vocabulary and self.config.vocabulary < size:
            raise ConfigError(
                f'config.objective.vocabulary: expected at least {size}, as many as the tokenizer '
                f'has numbers, or 0, got {self.config.vocabulary}'
            )
        return self.config.vocabulary or size

    def _region_sizes(self, spec: Spec) -> tuple[int, int]:
        """(width of a region's feature, number of a detector's classes; 0: there are none)."""
        c = self.config
        num_classes = 0
        if c.picture:
            encoded = spec.outputs.encoded[c.picture]
            if len(encoded.grid) < 2:
                raise ConfigError(
                    f'config.model.towers.{modality_of(c.picture)}: expected a tower that makes a '
                    'map of the picture'
                )
            width = encoded.tokens.shape[-1]
        else:
            if sources.REGIONS not in spec.batch:
                raise ConfigError(
                    "config.objective.picture='': the data have no regions; name a stream, such as "
                    "'video', or set config.model.inputs.regions and a source that has them"
                )
            entry = spec.batch[sources.REGIONS]
            width = entry['features'].shape[-1]
            if 'classes' in entry:
                num_classes = entry['classes'].shape[-1]
        if OF_CLASSES & set(self.weights) and not num_classes:
            raise ConfigError(
                f'config.objective.tasks: {", ".join(sorted(OF_CLASSES & set(self.weights)))} '
                'needs the probabilities that a detector gave each region, and there are none; '
                'choose features or contrast'
            )
        return width, num_classes

    def _tells_classes(self) -> bool:
        """Whether the head beside UNITER's features tells classes."""
        return self.config.model == 'uniter' or not OF_FEATURES & set(self.weights)

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
        c = self.config
        if not c.picture:
            return Encoding({}, variables.get('batch_stats', {}), state)
        streams = select_streams(batch, (c.picture,))
        features, batch_stats = run_towers(model, variables, streams, rng, maps=(c.picture,))
        return Encoding({map_of(c.picture): features[map_of(c.picture)]}, batch_stats, state)

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
        own_steps = self._steps(params)
        module = self._network(params)
        pairs = self._pairs(params, pooled, batch, rng)
        task = None
        if own_steps.schedule == steps.ONE:
            task = steps.drawn_task(own_steps, rng)
        read = steps.inputs(own_steps, module, pairs, batch['record'], task, rng)
        value, losses, accuracies = steps.losses(own_steps, module, params, read, task, rng)
        if task is not None:
            losses = steps.latest(state['loss'], losses, task)
            accuracies = steps.latest(state['accuracy'], accuracies, task)
            state = dict(zip(PARTS, (losses, accuracies)))
        metrics = {f'loss/{name}': loss for name, loss in losses.items()}
        for name in HAVE_ACCURACY:
            if name in accuracies:
                metrics[f'accuracy/{name}'] = accuracies[name]
        metrics['share/usable'] = jnp.mean(pairs.valid.astype(jnp.float32))
        return Loss(value, metrics, variables.get('batch_stats', {}), state)

    def own_pass(
        self, params: Any, pooled: Mapping[str, Any], batch: Mapping[str, Any], rng: Rng
    ) -> Any:
        module = self._network(params)
        pairs = self._pairs(params, pooled, batch, rng)
        record = jnp.arange(len(pairs.valid))
        words, regions, _ = steps.inputs(self._steps(params), module, pairs, record, None, rng)
        return module.apply({'params': params}, words, regions, rng, True, method='encode')

    def _network(self, params: Any) -> Vilbert | Uniter:
        sizes = networks.sizes_in(params, self.config.model, self.config.size)
        return networks.network(sizes, self.implementation, self.dtype)

    def _marks(self, params: Any = None, num_words: int = 0) -> Marks:
        """Marks of the tokenizer, of which the network's word table knows the size."""
        c = self.config
        special = tuple(c.special)
        if params is not None:
            num_words = params['text_embeddings']['word_table'].shape[0]
            if not special:
                num_words -= sources.NUM_MARKS
        return sources.marks_of(special, c.first_word, num_words)

    def _steps(self, params: Any) -> Steps:
        c = self.config
        marks = self._marks(params)
        return Steps(
            tasks=tuple(self.weights),
            weights=tuple(self.weights.values()),
            schedule=c.schedule,
            masking=c.masking,
            words=WordMasking(
                marks.mask, marks.words, share=c.word_share, at_least_one=c.at_least_one
            ),
            regions=RegionMasking(c.region_share, c.zero_share, c.at_least_one),
            side=c.replaced,
            share=c.mismatched,
            candidates=c.candidates,
            matched_only=c.matched_only,
            losses=UniterLosses(c.mean_over_classes, c.alignment),
        )

    def _pairs(
        self, params: Any, features: Mapping[str, Any], batch: Mapping[str, Any], rng: Rng | None
    ) -> Pairs:
        """Pairs of a batch, of a map (of `encode`) or of its own regions."""
        c = self.config
        form = networks.BOX_FORMS[c.model]
        valid, classes = batch['valid'], None
        regions: Regions
        if c.picture:
            regions = sources.regions_of_map(features[map_of(c.picture)], form)
            valid = valid & batch[c.picture]['valid']
        else:
            entry = batch[sources.REGIONS]
            regions = sources.regions_of_records(entry, form)
            classes = entry.get('classes')
        marks = self._marks(params)
        return sources.make_pairs(batch[c.text], regions, classes, valid, marks, rng)

    # ---- Evaluation.

    def predict_batch(
        self,
        params: Any,
        state: Any,
        encoded: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> dict[str, jax.Array]:
        """'matching': logits [B 2] of mismatch and match; 'region_words': float32 [B 3], words
        that were hidden, those told right, and those told right with all regions masked out.

        {} where the words or the picture are missing.
        """
        c = self.config
        features = {}
        if c.picture:
            if c.picture not in encoded or encoded[c.picture].tokens is None:
                return {}
            picture = encoded[c.picture]
            grid = (len(picture.tokens), *picture.grid, -1)
            features[map_of(c.picture)] = picture.tokens.reshape(grid)
        if c.text not in batch or not (c.picture or sources.REGIONS in batch):
            return {}
        pairs = self._pairs(params, features, batch, None)
        return {
            MATCHING: self._match_logits(params, pairs, rng),
            REGION_WORDS: self._masked_words(params, pairs, rng),
        }

    def _match_logits(self, params: Any, pairs: Pairs, rng: Rng) -> jax.Array:
        """[B 2] of whole pairs."""
        module = self._network(params)
        nobody = jnp.zeros(len(pairs.maskable), bool)
        own_steps = self._steps(params)
        words, seen, told = hide(pairs, own_steps.words, own_steps.regions, rng, nobody, nobody)
        regions, _ = networks.as_read(module, seen, told)
        outputs: Any = module.apply({'params': params}, words, regions, rng, False)
        return networks.as_uniter(outputs).match_logits.astype(jnp.float32)

    def _masked_words(self, params: Any, pairs: Pairs, rng: Rng) -> jax.Array:
        """[B 3] of pairs with hidden words and whole pictures, then with none."""
        module = self._network(params)
        everyone = jnp.ones(len(pairs.maskable), bool)
        marks = self._marks(params)
        # All that are chosen are hidden, and at least one is: another word would mislead.
        masking = WordMasking(
            marks.mask,
            marks.words,
            share=self.config.word_share,
            mask_share=1.0,
            random_share=0.0,
            at_least_one=True,
        )
        own_steps = self._steps(params)
        words, seen, told = hide(pairs, masking, own_steps.regions, rng, everyone, ~everyone)
        regions, told = networks.as_read(module, seen, told)
        counts = [jnp.sum(told.is_masked_word, axis=-1)]
        for mask in (regions.mask, jnp.zeros_like(regions.mask)):
            shown = dataclasses.replace(regions, mask=mask)
            outputs: Any = module.apply({'params': params}, words, shown, rng, False)
            is_right = outputs.word_logits.argmax(-1) == told.words
            counts.append(jnp.sum(is_right & told.is_masked_word, axis=-1))
        return jnp.stack(counts, axis=-1).astype(jnp.float32)


def _check_alignment(module: Vilbert) -> None:
    """Raise ConfigError where words and regions have no cosine."""
    text, image = module.sizes.text.width, module.sizes.image.width
    if text != image:
        raise ConfigError(
            'config.objective.alignment: expected 0, as words and regions of this model have '
            f'different widths, {text} and {image}'
        )
