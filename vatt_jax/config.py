"""Reading, overriding and checking configs; every mistake is one sentence, found before anything is built."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A mistake of the user's that a sentence can explain. run.py prints it and exits with code 2."""


# Dicts whose entries a config file names freely; whoever reads them checks their fields (with_defaults).
OPEN = (
    'model.inputs.audio.mel',
    'model.towers',
    'model.encoder',
    'model.head',
    'objective',
    'data.train',
    'data.eval',
    'data.make',
    'evals',
    'compiler_options',
)


def load(spec: str) -> ConfigDict:
    """Config of 'path/file.py' or 'path/file.py:arg' (the argument goes to its get_config)."""
    path, _, arg = spec.partition(':')
    file = pathlib.Path(path)
    if not file.is_file():
        near = (
            sorted(str(p) for p in file.parent.glob('*.py') if p.stem != '__init__')
            if file.parent.is_dir()
            else []
        )
        hint = f'there are {", ".join(near)}' if near else f'folder {file.parent} does not exist'
        raise ConfigError(f'--config={spec}: no file {path}; {hint}')
    if file.suffix != '.py':
        raise ConfigError(
            f'--config={spec}: {path} is not a Python file; a config is one, such as configs/default.py'
        )
    module_spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f'--config={spec}: {path} cannot be run ({type(error).__name__}: {_line(error)}); mend that file'
        ) from error
    if not callable(getattr(module, 'get_config', None)):
        raise ConfigError(
            f'--config={spec}: {path} defines no get_config(); a config file has one, see configs/default.py'
        )
    if arg and not inspect.signature(module.get_config).parameters:
        raise ConfigError(
            f'--config={spec}: get_config() of {path} takes no argument; leave out :{arg}'
        )
    try:
        config = module.get_config(arg) if arg else module.get_config()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f'--config={spec}: {_line(error.args[0] if error.args else error)}'
        ) from error
    return config


def override(config: ConfigDict, assignments: Iterable[tuple[str, str]]) -> None:
    """Sets fields in place from ('optimizer.schedule.peak', '1e-3') pairs, keeping each field's type. A group whose entries are named freely
    (OPEN) may be replaced as a whole: ('data.train', "{'mine': {'path': 'data/mine'}}")."""
    for path, text in assignments:
        *parents, last = path.split('.')
        node = config
        for depth, key in enumerate([*parents, last]):
            if not isinstance(node, ConfigDict):
                raise ConfigError(
                    f'--config.{path}={text}: {".".join(path.split(".")[:depth])} is a value, not a group'
                )
            if key not in node:
                where = '.'.join(['config', *path.split('.')[:depth]])
                raise ConfigError(
                    f'--config.{path}={text}: {where} has no field {key!r}; {_near(key, node)}'
                )
            if depth < len(parents):
                node = node[key]
        if isinstance(node[last], ConfigDict):
            node[last] = _group(path, text, node[last])
        else:
            node[last] = parse(text, node[last], f'config.{path}')


def _group(path: str, text: str, old: ConfigDict) -> ConfigDict:
    if path not in OPEN:
        raise ConfigError(
            f'--config.{path}={text}: {path} is a group of fields ({", ".join(old)}); name one of them'
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, dict) or not all(isinstance(k, str) and k for k in value):
        raise ConfigError(
            f'--config.{path}={text}: {path} is a group of fields ({", ".join(old) or "none yet"}); name one of them, or replace '
            'it by a dictionary in quotes, such as "{\'name\': value}"'
        )
    return ConfigDict(_tuples(value))


def parse(text: str, like: Any, where: str) -> Any:
    """`text` as a value of the type of `like`. Raises ConfigError naming the field."""
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {'true': True, 'false': False}.get(text.lower(), text)
    return _typed(value, like, where)


def _typed(value: Any, like: Any, where: str) -> Any:
    if isinstance(like, bool):
        ok = isinstance(value, bool)
    elif isinstance(like, float):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if ok else value
    elif isinstance(like, int):
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(like, (tuple, list)):
        ok = isinstance(value, (tuple, list))
        value = _tuples(value) if ok else value
    else:
        ok = like is None or isinstance(value, type(like))
    if not ok:
        raise ConfigError(
            f'{where}={value!r} is a {type(value).__name__}; a {type(like).__name__} is wanted, '
            f'such as {like!r}'
        )
    return value


def check_fields(
    config: ConfigDict, schema: ConfigDict, where: str = 'config', path: str = ''
) -> None:
    """Every field of `config` exists in `schema` (configs/default.py) and has its type."""
    for key, value in config.items():
        name = f'{path}.{key}' if path else key
        if key not in schema:
            raise ConfigError(f'{where}.{key}={value!r}: no such field; {_near(key, schema)}')
        if name in OPEN:
            continue
        if isinstance(schema[key], ConfigDict) != isinstance(value, ConfigDict):
            raise ConfigError(
                f'{where}.{key}={value!r}: a {"group" if isinstance(schema[key], ConfigDict) else "value"} is wanted'
            )
        if isinstance(value, ConfigDict):
            check_fields(value, schema[key], f'{where}.{key}', name)
        else:
            config[key] = _typed(value, schema[key], f'{where}.{key}')
    for key in schema:
        if key not in config:
            raise ConfigError(
                f'{where} lacks the field {key!r}; start from configs/default.py, which has them all'
            )


def complete(config: ConfigDict, defaults: ConfigDict, path: str = '') -> ConfigDict:
    """`config` with the fields of `defaults` that it lacks, filled in place: of a run older than they are, whose behaviour the defaults keep."""
    for key, value in defaults.items():
        name = f'{path}.{key}' if path else key
        if key not in config:
            config[key] = value
        elif (
            isinstance(value, ConfigDict)
            and isinstance(config[key], ConfigDict)
            and name not in OPEN
        ):
            complete(config[key], value, name)
    return config


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> ConfigDict:
    """`defaults` overlaid with `config`. Raises ConfigError for a field that has no default, and for wrong types."""
    out = ConfigDict(dict(defaults))
    for key, value in config.items():
        if key not in defaults:
            raise ConfigError(f'{where}.{key}={value!r}: no such field; {_near(key, defaults)}')
        out[key] = (
            _typed(value, defaults[key], f'{where}.{key}')
            if not isinstance(value, ConfigDict)
            else value
        )
    return out


def choose(value: str, options: Iterable[str], where: str) -> str:
    """`value` if it is one of `options`; otherwise a ConfigError that lists them."""
    options = list(options)
    if value not in options:
        raise ConfigError(f'{where}={value!r}: choose one of {", ".join(options)}')
    return value


COUNTS = {  # field -> smallest value
    **dict.fromkeys(
        (
            'batch_size',
            'accumulate',
            'steps',
            'log_every',
            'max_bad_steps',
            'checkpoint.every',
            'checkpoint.keep',
            'data.prefetch',
            'data.threads',
            'data.synthetic_size',
            'model.inputs.video.frames',
            'model.inputs.video.size',
            'model.inputs.audio.samples',
            'model.inputs.audio.rate',
            'model.inputs.text.candidates',
            'model.inputs.text.words',
        ),
        1,
    ),
    **dict.fromkeys(('eval_every', 'checkpoint.keep_every'), 0),
}
SHARES = ('data.flip', 'data.max_corrupt', 'augment.color')
CHOICES = {
    'jax_platform': ('', 'cpu', 'cuda', 'tpu'),
    'compute_dtype': ('float32', 'bfloat16'),
    'data.source': ('records', 'synthetic', 'npz'),
    'accumulation': ('plain', 'exact'),
}


def check_values(config: ConfigDict) -> None:
    """Raises ConfigError for a field whose value makes no sense, whatever the others are."""
    of = lambda field: functools.reduce(lambda node, key: node[key], field.split('.'), config)
    for field, low in COUNTS.items():
        if of(field) < low:
            raise ConfigError(
                f'config.{field}={of(field)}: {"a positive number" if low else "a positive number, or 0 for none,"} is wanted'
            )
    for field in SHARES:
        if not 0 <= of(field) <= 1:
            raise ConfigError(f'config.{field}={of(field):g}: a number from 0 to 1 is wanted')
    for field, high in (('data.crop', 1), ('data.aspect', float('inf'))):
        pair = of(field)
        if (
            len(pair) != 2
            or not all(isinstance(x, (int, float)) for x in pair)
            or not 0 < pair[0] <= pair[1] <= high
        ):
            raise ConfigError(
                f'config.{field}={pair}: two numbers are wanted, smaller one first, above 0{" and at most 1" if high == 1 else ""}'
            )
    if not config.model.inputs.video.fps > 0:
        raise ConfigError(
            f'config.model.inputs.video.fps={config.model.inputs.video.fps:g}: a positive number is wanted'
        )
    if config.profile and not (
        len(config.profile) == 2
        and all(isinstance(s, int) for s in config.profile)
        and 0 < config.profile[0] <= config.profile[1]
    ):
        raise ConfigError(
            f'config.profile={config.profile}: (first, last) step to be traced is wanted, such as (20, 22), or () for none'
        )
    for modality in config.data.mismatch:
        choose(modality, config.model.inputs, 'config.data.mismatch')
    for field, options in CHOICES.items():
        choose(of(field), options, f'config.{field}')


def check_batch(config: ConfigDict, devices: int, processes: int) -> tuple[int, ...]:
    """Mesh shape of this config on `devices`; the batch divides over microbatches, hosts and data-parallel devices."""
    from vatt_jax.parallel import sharding

    try:
        shape = sharding.mesh_shape(config.mesh, devices)
    except sharding.ShardingError as error:
        raise ConfigError(str(error)) from error
    rows = shape[0] * shape[1]
    check_values(config)
    unit = rows * config.accumulate
    if config.batch_size % unit:
        low = max(1, config.batch_size // unit) * unit
        raise ConfigError(
            f'config.batch_size={config.batch_size} does not divide over {rows} data-parallel devices × '
            f'config.accumulate={config.accumulate} microbatches; {low} or {low + unit} would'
        )
    if config.batch_size % processes:
        raise ConfigError(
            f'config.batch_size={config.batch_size} does not divide over {processes} processes'
        )
    return shape


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1)


def from_json(text: str) -> ConfigDict:
    """The inverse of to_json; lists become tuples, as configs write them."""
    return ConfigDict(_tuples(json.loads(text)))


def stored(workdir: str | pathlib.Path) -> ConfigDict | None:
    """The resolved config kept with a run, None when the folder holds no run."""
    file = pathlib.Path(workdir) / 'config.json'
    if not file.exists():
        return None
    try:
        return from_json(file.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f'{file} cannot be read ({type(error).__name__}: {error}); remove it and name the config with --config, '
            'or choose another --workdir'
        ) from error


def same(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Dotted names of the fields in which two configs differ."""
    flat_a, flat_b = dict(flatten(a)), dict(flatten(b))
    return sorted(
        k for k in flat_a.keys() | flat_b.keys() if _tuples(flat_a.get(k)) != _tuples(flat_b.get(k))
    )


def flatten(config: Mapping[str, Any], prefix: str = '') -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from flatten(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def _tuples(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(_tuples(v) for v in x)
    return {k: _tuples(v) for k, v in x.items()} if isinstance(x, dict) else x


def _line(text: Any) -> str:
    """Whatever a library has to say, on one line."""
    return ' '.join(str(text).split())


def _near(key: str, fields: Iterable[str]) -> str:
    fields = list(fields)
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    return f'did you mean {close[0]!r}?' if close else f'it has {", ".join(fields) or "no fields"}'


def fail(message: str) -> None:
    """Prints one sentence to standard error and leaves with code 2; never a traceback."""
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads of data pipelines and checkpointers must not keep a failed run alive, and atexit hooks have nothing to save.
    os._exit(2)
