"""Predicting the maps of coming blocks of a video from those before (DPC, MemDPC).

Han, Xie and Zisserman 2019 and 2020, as in their code: a convolutional GRU reads one map after
another; from its state a small network predicts the next map, which the GRU reads in turn.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.models.towers.convolutions import convolve
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng


class BiasedConv(nn.Module):
    """Convolution with a bias, x [B h w I] -> [B h w O]; orthogonal initial kernel.

    Attributes:
        features: O.
        kernel: its side, odd.
        gain: factor on the initial kernel.
    """

    features: int
    kernel: int = 1
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, 'B h w I']) -> Float[Array, 'B h w O']:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        init = jax.nn.initializers.orthogonal(self.gain)
        kernel = self.param('kernel', logical(init, None, None, 'embed', None), shape, jnp.float32)
        zeros = logical(jax.nn.initializers.zeros, None)
        bias = self.param('bias', zeros, (self.features,), jnp.float32)
        margin = (self.kernel // 2, self.kernel // 2)
        return convolve(x, kernel, (1, 1), (margin, margin)) + bias


class ConvGRU(nn.Module):
    """One step of a GRU whose matrices are convolutions: (input, state) -> state, [B h w D] each.

    Attributes:
        kernel: side of the convolutions.
        gain: factor on their initial kernels.
    """

    kernel: int = 1
    gain: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B h w D'], state: Float[Array, 'B h w D']
    ) -> Float[Array, 'B h w D']:
        def gate(state: jax.Array, name: str) -> jax.Array:
            both = jnp.concatenate([x, state], axis=-1)
            return BiasedConv(x.shape[-1], self.kernel, self.gain, name=name)(both)

        update = jax.nn.sigmoid(gate(state, 'update'))
        reset = jax.nn.sigmoid(gate(state, 'reset'))
        proposed = jnp.tanh(gate(reset * state, 'out'))
        return (1 - update) * state + update * proposed


class FuturePredictor(nn.Module):
    """Maps of observed blocks -> maps of the blocks that follow, in float32.

    Parameters: 'forward' and 'backward', the GRUs; 'hidden' and 'output', the predicting network;
    'slots' [M D]. Only the GRUs are of one direction.

    Attributes:
        width: D of the maps.
        memory: slots M. A prediction is then a mean of them, weighted by a softmax over M outputs
            (MemDPC). 0: the network's output is the prediction (DPC).
        bidirectional: the past is predicted from what follows too.
        kernel: side of the GRUs' convolutions.
        dropout: rate, of a GRU's state after each step.
        gain: factor on the orthogonal initial kernels.
    """

    width: int
    memory: int = 0
    bidirectional: bool = False
    kernel: int = 1
    dropout: float = 0.1
    gain: float = 1.0

    def setup(self) -> None:
        self.forward = ConvGRU(self.kernel, self.gain)
        if self.bidirectional:
            self.backward = ConvGRU(self.kernel, self.gain)
        self.hidden = BiasedConv(self.width, gain=self.gain)
        self.output = BiasedConv(self.memory or self.width, gain=self.gain)
        if self.memory:
            # Standard normal, as in the published code.
            normal = logical(jax.nn.initializers.normal(1.0), None, 'embed')
            self.slots = self.param('slots', normal, (self.memory, self.width), jnp.float32)

    def __call__(
        self, maps: Float[Array, 'B N h w D'], steps: int, rng: Rng, train: bool
    ) -> dict[str, Float[Array, 'B P h w D']]:
        """Predict the last P blocks from those before; backward, the first P from those after.

        Args:
            maps: of all blocks; those to be predicted are not read.
            steps: P.
            rng: random bits of these clips.
            train: whether there is dropout.

        Returns:
            direction -> predictions, in the order of time: those for blocks N - P to N - 1
            (forward), and for blocks 0 to P - 1 (backward).
        """
        rate = self.dropout if train else 0.0
        maps = maps.astype(jnp.float32)
        past = maps[:, :-steps]
        found = {'forward': self._roll_out(self.forward, past, steps, rng.at('forward'), rate)}
        if self.bidirectional:
            future = maps[:, : steps - 1 : -1]  # the last block first, down to block P
            found['backward'] = self._roll_out(
                self.backward, future, steps, rng.at('backward'), rate
            )[:, ::-1]
        return found

    def _roll_out(
        self,
        gru: ConvGRU,
        observed: Float[Array, 'B N h w D'],
        steps: int,
        rng: Rng,
        rate: float,
    ) -> Float[Array, 'B P h w D']:
        """The predictions after the observed blocks, one after another."""
        state = jnp.zeros_like(observed[:, 0])
        num_observed = observed.shape[1]
        for t in range(num_observed):
            # Maps may be negative; what is aggregated is their positive part.
            state = gru(jax.nn.relu(observed[:, t]), state)
            state = rng.at(t).dropout(state, rate)
        predictions = [self._predict(state)]
        for t in range(num_observed, num_observed + steps - 1):
            state = gru(jax.nn.relu(predictions[-1]), state)
            state = rng.at(t).dropout(state, rate)
            predictions.append(self._predict(state))
        return jnp.stack(predictions, axis=1)

    def _predict(self, state: Float[Array, 'B h w D']) -> Float[Array, 'B h w D']:
        """The next map."""
        output = self.output(jax.nn.relu(self.hidden(state)))
        if not self.memory:
            return output
        return jax.nn.softmax(output, axis=-1) @ self.slots
