"""The run-time type checker of the test suite, as jaxtyping's import hook applies it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np
from ml_collections import ConfigDict

# What annotations mean more widely than Python's own types.
WIDER = beartype.BeartypeHintOverrides(
    {
        # NumPy's scalars are numbers, and an int may be given for a float (PEP 484's numeric
        # tower).
        int: int | np.integer,
        float: float | int | np.floating | np.integer,
        bool: bool | np.bool_,
        # Functions of JAX take NumPy's arrays.
        jax.Array: jax.Array | np.ndarray,
        # A ConfigDict is used like a mapping, and is not registered as one.
        Mapping[str, Any]: Mapping[str, Any] | ConfigDict,
    }
)

typechecker = beartype.beartype(conf=beartype.BeartypeConf(hint_overrides=WIDER))


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Nothing is checked inside: for tests of what the project itself says of wrong arguments."""
    jaxtyping.config.update('jaxtyping_disable', True)
    try:
        yield
    finally:
        jaxtyping.config.update('jaxtyping_disable', False)
