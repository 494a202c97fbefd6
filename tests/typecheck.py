"""The run-time type checker of the test suite, as jaxtyping's import hook applies it."""

import beartype

# A float may be given as an int, as type checkers allow (PEP 484's numeric tower).
typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
