"""Contrast with a queue of keys, and positives that another modality finds.

InfoNCE as in MoCo (He et al. 2020), and CoCLR (Han et al. 2020), which begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.losses import nce
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec
from vatt_jax.objectives.forward import project, run_towers
from vatt_jax.objectives.memory import queue as queues
from vatt_jax.objectives.memory import teacher as teachers
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'coclr',
    # Stream that the student encodes.
    'query': 'video',
    # Stream that the teacher encodes: another view of the same record and modality.
    'key': 'video.second',
    # Common space in which both are compared.
    'space': 'projection',
    # Keys of former steps, which are the negatives.
    'queue': 2048,
    # How much of the teacher stays in a step.
    'momentum': 0.999,
    'temperature': 0.07,
    # Stream of another modality in which a frozen model looks for positives (CoCLR), such as
    # 'audio.second', the sound of the key's window. '': none, each key for itself (InfoNCE).
    'sampler_stream': '',
    # Run folder of that model, and the common space of its features. '': its pooled features.
    'sampler': '',
    'sampler_space': 'projection',
    # config.model of that run. It is filled in when the run begins.
    'sampler_model': ConfigDict(),
    # Positives that are mined for each clip.
    'nearest': 5,
    # How often a step leaves a clip's own key out of its positives, where there are others.
    'leave_out_own': 0.9,
}
# Field -> smallest and largest value.
RANGES = {
    'momentum': (0, 1),
    'temperature': (0, math.inf),
    'leave_out_own': (0, 1),
}
SMALLEST_VALUES = {'queue': 1, 'nearest': 1}
HEAD_EXAMPLE = "{'name': 'projection', 'hidden': 1024, 'projection': 128}"


class CoCLR(Objective):
    """Queries must find their positives among the keys of a queue.

        loss = mean over clips of  log Σ_{own key, queue} exp s - log Σ_positives exp s

    with s the cosine of query and key over the temperature. Queries are the student's, keys those
    of its momentum copy, of another window of the record.

    InfoNCE: the own key is the only positive. CoCLR: positives are also the queue's keys of the
    same record, and those of the records that another modality finds most similar: `nearest` of
    them, by the cosine of a frozen model's features, of which there is a second column in the
    queue. While the queue fills, nothing is mined and parameters stay.

    A clip enters the queue where it has all streams; one without the query's or the key's has no
    loss.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        for field, (low, high) in RANGES.items():
            check_range(c[field], low, high, f'config.objective.{field}')
        _check(c)
        self.mines = bool(c.sampler_stream)

    def streams(self) -> tuple[str, ...]:
        return (self.config.query, self.config.key, *self.frozen_streams())

    def frozen_streams(self) -> tuple[str, ...]:
        return (self.config.sampler_stream,) if self.mines else ()

    def frozen_models(self) -> dict[str, str]:
        return {'sampler': self.config.sampler} if self.mines else {}

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        num_rows = spec.batch['index'].shape[0]
        if num_rows > c.queue:
            raise ConfigError(
                f'config.objective.queue: expected at least the (micro)batch of {num_rows} clips, '
                f'got {c.queue}.'
            )
        shape = _features(spec.outputs, c.space, c.query, 'config.objective.space').shape
        if len(shape) != 2:
            raise ConfigError(
                f'config.objective.query: expected a stream with one embedding per clip, got '
                f'{c.query!r} with {shape[1]} candidates for each clip.'
            )
        columns = {'key': jax.ShapeDtypeStruct(shape[1:], jnp.float32)}
        state: dict[str, Any] = {'teacher': teachers.create(spec.model_params, spec.batch_stats)}
        if self.mines:
            outputs, state['sampler'] = self.frozen['sampler'].init(
                spec.batch, self.frozen_streams()
            )
            where = 'config.objective.sampler_space'
            sampled = _features(outputs, c.sampler_space, c.sampler_stream, where)
            columns['sampled'] = jax.ShapeDtypeStruct(sampled.shape[-1:], jnp.float32)
            # Of which record a key is.
            columns['record'] = jax.ShapeDtypeStruct((), jnp.int32)
        state['queue'] = queues.create(c.queue, columns)
        return {}, state

    def begin(self, model_params: Any, batch_stats: Any, state: Any) -> Any:
        return {**state, 'teacher': teachers.begin(state['teacher'], model_params, batch_stats)}

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
        pooled, batch_stats = run_towers(model, variables, {c.query: batch[c.query]}, rng)
        teacher = teachers.variables(state['teacher'], variables['params'])
        key_pooled, key_stats = run_towers(model, teacher, {c.key: batch[c.key]}, rng)
        # Its own running statistics: those of the student's features are none of the teacher's.
        teacher = {**state['teacher'], 'batch_stats': key_stats}
        pooled[f'teacher/{c.key}'] = jax.lax.stop_gradient(key_pooled[c.key])
        if self.mines:
            pooled['sampler'] = self.sampled(state['sampler'], batch, rng)
        return Encoding(pooled, batch_stats, {**state, 'teacher': teacher})

    def sampled(self, variables: Any, batch: Mapping[str, Any], rng: Rng) -> Float[Array, 'B E']:
        """The frozen model's features of the clips, of unit length."""
        c = self.config
        outputs = self.frozen['sampler'].outputs(variables, batch, self.frozen_streams(), rng)
        features = _features(outputs, c.sampler_space, c.sampler_stream)
        features = heads.unit(features.astype(jnp.float32))
        if features.ndim == 3:
            # Text: the mean over the sentences that a clip has.
            mask = batch[c.sampler_stream]['mask']  # [B K]
            features = heads.unit(jnp.sum(jnp.where(mask[..., None], features, 0), 1))
        return features

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Any,
    ) -> Loss:
        c = self.config
        valid = batch[c.query]['valid'] & batch[c.key]['valid'] & batch['valid']  # [B]
        queries, batch_stats = self._project(model, variables, c.query, pooled[c.query], valid)
        teacher = teachers.variables(state['teacher'], variables['params'])
        keys, key_stats = self._project(model, teacher, c.key, pooled[f'teacher/{c.key}'], valid)
        keys = jax.lax.stop_gradient(heads.unit(keys))  # [B E]

        # The queue as it was before this step: its own keys come once, beside it.
        queue = state['queue']
        is_filled = queues.is_filled(queue)  # [Q]
        positive = None
        own_positive: Any = True
        if self.mines:
            positive = self._positives(queue, pooled['sampler'], batch)  # [B Q]
            own_positive = self._own_is_positive(positive, rng)  # [B]
        further = nce.Keys(queue['columns']['key'], is_filled, positive=positive)
        loss = nce.info_nce(
            queries,
            keys,
            x_valid=valid,
            y_valid=valid,
            keys=(further,),
            in_batch=False,
            own_positive=own_positive,
            temperature=c.temperature,
        )

        new_state = {
            **state,
            'teacher': {**state['teacher'], 'batch_stats': key_stats},
            'queue': self._pushed(queue, keys, pooled, batch, valid),
        }
        cosine = jnp.sum(heads.unit(queries) * keys, -1)  # [B]
        metrics = {
            'own_cosine': masked_mean(cosine, valid),
            'queue_filled': jnp.mean(is_filled.astype(jnp.float32)),
        }
        apply_update: Any = True
        if positive is not None:
            metrics['positives'] = masked_mean(positive.sum(-1).astype(jnp.float32), valid)
            # Positives of a queue that is half empty would be of any kind.
            apply_update = queue['is_full']
        return Loss(loss, metrics, batch_stats, new_state, apply_update)

    def _project(
        self, model: Any, variables: Any, stream: str, pooled: jax.Array, valid: jax.Array
    ) -> tuple[Float[Array, 'B E'], Any]:
        """(embeddings in the common space, new batch statistics)."""
        spaces, batch_stats = project(model, variables, {stream: pooled}, {stream: valid})
        return spaces[self.config.space][stream], batch_stats

    def _pushed(
        self,
        queue: queues.Queue,
        keys: Float[Array, 'B E'],
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        valid: Bool[Array, ' B'],
    ) -> queues.Queue:
        """The queue with the keys of a batch."""
        rows = {'key': keys}
        if self.mines:
            rows = {**rows, 'sampled': pooled['sampler'], 'record': batch['record']}
            # A key that no one could mine stays out.
            valid = valid & batch[self.config.sampler_stream]['valid']
        return queues.push(queue, rows, valid)

    def _positives(
        self, queue: queues.Queue, sampled: Float[Array, 'B E'], batch: Mapping[str, Any]
    ) -> Bool[Array, 'B Q']:
        """Which keys of the queue are positives of which clips: of the same record, and mined."""
        c = self.config
        columns = queue['columns']
        is_filled = queues.is_filled(queue)[None]  # [1 Q]
        is_same_record = is_filled & (batch['record'][:, None] == columns['record'])  # [B Q]
        scores = jnp.einsum('be,qe->bq', sampled, columns['sampled'], precision='highest')
        # Keys of the same record would take the places of others, which are to be found.
        is_candidate = is_filled & ~is_same_record
        scores, nearest = jax.lax.top_k(jnp.where(is_candidate, scores, -jnp.inf), c.nearest)
        is_found = scores > -jnp.inf  # [B nearest]; a small queue may have fewer
        rows = jnp.arange(len(sampled))[:, None]
        is_mined = jnp.zeros_like(is_same_record).at[rows, nearest].set(is_found)
        # A clip without the sampler's modality has nothing to look for.
        may_mine = queue['is_full'] & batch[c.sampler_stream]['valid']  # [B]
        return is_same_record | (is_mined & may_mine[:, None])

    def _own_is_positive(self, positive: Bool[Array, 'B Q'], rng: Rng) -> Bool[Array, ' B']:
        """Whether a clip's own key is among its positives."""
        # One draw for the whole batch, as the published code has it.
        bits = rng.at('leave_out_own').shared_bits(())
        leaves_out = (bits >> 8).astype(jnp.float32) < self.config.leave_out_own * 2**24
        return ~(leaves_out & positive.any(-1))

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Let the teacher follow the student."""
        followed = teachers.follow(state['teacher']['params'], model_params, self.config.momentum)
        state = {**state, 'teacher': {**state['teacher'], 'params': followed}}
        return model_params, params, state

    def teacher(self, state: Any) -> dict[str, Any]:
        return state['teacher']


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    for field, smallest in SMALLEST_VALUES.items():
        if config[field] < smallest:
            raise ConfigError(
                f'config.objective.{field}: expected at least {smallest}, got {config[field]}.'
            )
    if not config.temperature > 0:
        raise ConfigError(
            f'config.objective.temperature: expected a positive number, got {config.temperature}.'
        )
    if config.query == config.key or modality_of(config.query) != modality_of(config.key):
        raise ConfigError(
            'config.objective.key: expected another view of the modality of query, got '
            f'{config.key!r} for the query {config.query!r}. Set key="video.second" and '
            "config.data.views=(('video.second', {'kind': 'clip'}),)."
        )
    if config.sampler_stream and config.nearest > config.queue:
        raise ConfigError(
            f'config.objective.nearest: expected at most the size of the queue, {config.queue}, '
            f'got {config.nearest}.'
        )
    if config.sampler and not config.sampler_stream:
        raise ConfigError(
            f'config.objective.sampler={config.sampler!r}: expected the stream that it mines in, '
            'set config.objective.sampler_stream, such as "audio.second".'
        )


def _features(outputs: Any, space: str, stream: str, where: str = '') -> Any:
    """Features of a stream [B(,K) E]: in a common space, or the pooled ones for ''.

    Args:
        outputs: the model's Outputs.
        space: name of the space.
        stream: name of the stream.
        where: the field that names the space, for the message.

    Raises:
        ConfigError: the model has no such embedding.
    """
    if not space:
        return outputs.encoded[stream].pooled
    members = outputs.spaces.get(space, {})
    if stream not in members:
        raise ConfigError(
            f'{where}={space!r}: expected a common space of {stream!r}, the model has '
            f'{", ".join(outputs.spaces) or "none"}; set config.model.head={HEAD_EXAMPLE}'
        )
    return members[stream]
