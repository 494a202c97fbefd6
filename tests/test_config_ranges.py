"""Every number of a config has a range; what lies outside is a sentence with the field."""

import importlib
import math

import pytest
from ml_collections import ConfigDict

from tests import tiny
from vatt_jax import config as configs
from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.objectives import OBJECTIVES
from vatt_jax.training import loop


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def impossible(value):
    """Values of the same type that make no sense in any field."""
    return [-5, 10**12] if isinstance(value, int) else [-5.0, math.nan, math.inf]


def numbers(fields):
    return [(name, value) for name, value in configs.flatten(fields) if is_number(value)]


@pytest.mark.parametrize('field, default', numbers(tiny.config()))
def test_fields_of_the_config(field, default):
    for value in impossible(default):
        config = tiny.config(**{field.replace('.', '__'): value})
        with pytest.raises(ConfigError, match=field.rsplit('.', 1)[-1]):
            loop.check(config)


def nested(field, value):
    """{'a': {'b': value}} of 'a.b'."""
    first, _, rest = field.partition('.')
    return {first: nested(rest, value) if rest else value}


def defaults_of(entry):
    return importlib.import_module(entry.__module__).DEFAULTS


@pytest.mark.parametrize(
    'name, field, default',
    [(name, *pair) for name, entry in OBJECTIVES.items() for pair in numbers(defaults_of(entry))],
)
def test_fields_of_objectives(name, field, default):
    # The bias of a logit may have either sign; counts are compared with the data later.
    values = [value for value in impossible(default) if not (field == 'bias' and value == -5)]
    for value in values:
        if value == 10**12:
            continue
        with pytest.raises(ConfigError, match=rf'config.objective.{field}\b'):
            OBJECTIVES[name](ConfigDict({'name': name, **nested(field, value)}))


class Data:
    info = {'labels': {'class': ['a', 'b']}}

    def size(self, split, by):
        return 10


class Outputs:
    spaces = {'va': ('video', 'audio')}
    encoded = {}


@pytest.mark.parametrize(
    'kind, field, default',
    [(kind, *pair) for kind, entry in evals.EVALUATORS.items() for pair in numbers(entry.DEFAULTS)],
)
def test_fields_of_evaluators(kind, field, default):
    # A shift of sound may go either way, and a limit beyond the data is all of them.
    values = [value for value in impossible(default) if not (field == 'seconds' and value == -5)]
    for value in values:
        if value == 10**12:
            continue
        with pytest.raises(ConfigError, match=rf'config.evals.x\b.*\b{field}\b'):
            evals.build('x', ConfigDict({'type': kind, field: value})).check(Data(), Outputs())
