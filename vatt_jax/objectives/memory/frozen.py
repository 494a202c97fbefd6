"""A trained model of another run beside the one that is learnt: it is read and never changes.

Its variables are part of the objective's state, under the name that `Objective.frozen_models` gives
it: in the checkpoint, on the mesh by their own logical axes, and in no optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vatt_jax.rng import Rng


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A module in evaluation mode.

    Attributes:
        model: the Linen module, built from the other run's config.
    """

    model: Any

    def init(
        self, batch: Mapping[str, Any], streams: tuple[str, ...]
    ) -> tuple[Any, dict[str, Any]]:
        """What the state keeps of the model, without its values.

        These come as the run begins (training/start.py).

        Args:
            batch: a device batch, abstract or not.
            streams: those that the model will be applied to.

        Returns:
            (abstract Outputs, {'params', 'batch_stats'}): zeros boxed with logical axes, of the
            towers and spaces that these streams reach.
        """

        def init(key: Array, batch: Mapping[str, Any]) -> Any:
            rng = Rng.create(0, 0, jnp.zeros(batch['index'].shape, jnp.uint32))
            inputs = {name: batch[name] for name in streams}
            return self.model.init_with_output(key, inputs, rng=rng, train=False)

        outputs, boxed = jax.eval_shape(init, jax.random.key(0), dict(batch))
        # Of shapes alone: drawing values that are thrown away would take seconds to compile.
        zeros = jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), dict(boxed))
        return outputs, {'params': zeros['params'], 'batch_stats': zeros.get('batch_stats', {})}

    def outputs(
        self,
        variables: Mapping[str, Any],
        batch: Mapping[str, Any],
        streams: tuple[str, ...],
        rng: Rng,
    ) -> Any:
        """The model's Outputs in evaluation mode, without gradient.

        Args:
            variables: of the model, as the objective's state holds them.
            batch: the device batch.
            streams: those to encode.
            rng: of these clips; evaluation draws nothing from it.
        """
        inputs = {name: batch[name] for name in streams}
        outputs = self.model.apply(variables, inputs, train=False, rng=rng)
        return jax.lax.stop_gradient(outputs)
