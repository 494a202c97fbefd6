"""The run-time type checker of the test suite, as jaxtyping's import hook applies it."""

import beartype
import numpy as np

# NumPy's scalars are numbers, and an int may be given for a float (PEP 484's numeric tower).
NUMBERS = beartype.BeartypeHintOverrides(
    {
        int: int | np.integer,
        float: float | int | np.floating | np.integer,
        bool: bool | np.bool_,
    }
)

typechecker = beartype.beartype(conf=beartype.BeartypeConf(hint_overrides=NUMBERS))
