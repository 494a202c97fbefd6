"""Reading, overriding and checking configs.

Every mistake is one sentence, found before anything is built.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from vatt_jax import named_configs, phase_folders
from vatt_jax.run_folder import RunFolder

Value = TypeVar('Value')  # of a field that is one of several


class ConfigError(ValueError):
    """A mistake of the user's that a sentence can explain.

    The command line prints it and exits with code 2.
    """


# Groups whose entries a config file names freely; whoever reads them checks their fields, see
# with_defaults.
OPEN = (
    # {} for raw samples, so its fields cannot be required.
    'model.inputs.audio.mel',
    # {} for none.
    'model.inputs.flow',
    # {} for none.
    'model.inputs.regions',
    'model.towers',
    'model.encoder',
    'model.head',
    # {} for none.
    'model.adapter',
    # {} for none.
    'model.fusion',
    'objective',
    'data.train',
    'data.eval',
    'data.make',
    'evals',
    # Names are XLA's, and differ from version to version.
    'compiler_options',
)

# Groups whose entries have names of the user's choice, of which files and folders are made.
NAMED_ENTRIES = ('data.train', 'evals', 'model.towers', 'model.head')

# Old dotted path -> new dotted path, of a field or a whole group. Overrides and stored configs with
# the old name are accepted, with a warning.
RENAMED_FIELDS: dict[str, str] = {}

# Field -> smallest value.
COUNTS = {
    # Of all processes and microbatches together.
    'batch_size': 1,
    'accumulate': 1,
    'steps': 1,
    'log_every': 1,
    'max_bad_steps': 1,
    'checkpoint.every': 1,
    'checkpoint.keep': 1,
    'data.prefetch': 1,
    'data.threads': 1,
    'data.clips_per_epoch': 1,
    'data.synthetic_size': 1,
    'object_store.tries': 1,
    'object_store.memory': 1,
    'model.inputs.video.frames': 1,
    'model.inputs.video.size': 1,
    'model.inputs.audio.samples': 1,
    'model.inputs.audio.rate': 1,
    'model.inputs.text.candidates': 1,
    'model.inputs.text.words': 1,
    # 0: none
    'augment.spec_augment.frequency_masks': 0,
    'augment.spec_augment.frequency_width': 0,
    'augment.spec_augment.time_masks': 0,
    'augment.spec_augment.time_width': 0,
    # 0: never
    'eval_every': 0,
    'checkpoint.keep_every': 0,
}
# Fields from 0 to 1.
SHARES = (
    'data.flip',
    'data.max_corrupt',
    'augment.color',
    'augment.grey',
    'augment.blur',
    'augment.solarise',
    'augment.strong',
)
# Field -> smallest and largest value of the others; configs/default.py says what they mean. Those
# of `mesh` are checked against the devices, those of `optimizer` by optim.check.
RANGES: dict[str, tuple[float, float]] = {
    # 32 bits: NumPy's generators take no negative seed, JAX's keys no longer one.
    'seed': (0, 2**32 - 1),
    # Processes of one host.
    'data.workers': (0, 1024),
    # Factors within 1 ± these; below 0 a picture would be inverted.
    'augment.contrast': (0, 1),
    'augment.saturation': (0, 1),
    'augment.volume': (0, 1),
    'augment.gain': (0, 1),
    # Shares of the range of pixels and of the clip's peak.
    'augment.brightness': (0, 1),
    # Of the picture's side.
    'augment.blur_width': (0, 1),
    'augment.audio_noise': (0, 1),
    # Of a full circle, either way.
    'augment.hue': (0, 0.5),
    # A request needs some time; an hour is that of a store which will not answer.
    'object_store.timeout': (0.01, 3600),
    'object_store.backoff': (0, 3600),
    # Of MB/s; 0: measured.
    'object_store.bandwidth': (0, 1e6),
}
# Of config.model.inputs.flow, each with a value of its type.
FLOW_FIELDS = {'frames': 32, 'size': 224, 'fps': 10.0, 'channels': 2}
# Steps and rows are counted in int32 on the device.
LARGEST_COUNT = 2**31 - 1
# Field of (smallest, largest) -> upper bound of both.
INTERVALS = {
    'data.crop': 1,
    'data.aspect': 1000,
    # Pixels; a kernel as wide as the picture is flat long before.
    'augment.blur_sigma': 1000,
}
# Field -> its values. '' leaves the platform to JAX.
CHOICES = {
    'jax_platform': ('', 'cpu', 'cuda', 'tpu'),
    'compute_dtype': ('float32', 'bfloat16'),
    'data.source': ('records', 'synthetic', 'npz', 'coco'),
    'accumulation': ('plain', 'exact'),
    'evaluated': ('student', 'teacher'),
}


def load(spec: str) -> ConfigDict:
    """Load a config file.

    Args:
        spec: 'path/file.py' or 'path/file.py:arg'; the argument goes to its get_config. Where
            there is no such file, 'configs/demo.py', 'demo' and 'demo:arg' are the named config.

    Raises:
        ConfigError: There is no such file, it cannot be run, or get_config refuses the argument.
    """
    path, _, arg = spec.partition(':')
    file = _config_file(spec, path)
    # Of the call too: get_config may import other configs.
    with named_configs.importable(file):
        return _call_get_config(spec, path, file, arg)


def _call_get_config(spec: str, path: str, file: pathlib.Path, arg: str) -> ConfigDict:
    get_config = _get_config_function(spec, path, file)
    if not arg:
        arguments = []
    elif inspect.signature(get_config).parameters:
        arguments = [arg]
    else:
        raise ConfigError(
            f'--config={spec}: get_config() of {path} takes no argument; leave out :{arg}'
        )
    try:
        config = get_config(*arguments)
    # What a get_config raises for an argument that it does not know, in its own words.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # str() of a KeyError would put its message in quotes.
        message = error.args[0] if error.args else error
        raise ConfigError(f'--config={spec}: {_one_line(message)}{_raised_at(error)}') from error
    # A bug of the file. SystemExit: files that were scripts before may call sys.exit().
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f'--config={spec}: get_config() raised {type(error).__name__}: '
            f'{_one_line(error)}{_raised_at(error)}; correct that file'
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f'--config={spec}: expected get_config() of {path} to return a ConfigDict, got '
            f'{type(config).__name__}; see configs/default.py'
        )
    return config


def _raised_at(error: BaseException) -> str:
    """Return ' (file, line N)' of the place that raised, as far as the traceback says."""
    frames = traceback.extract_tb(error.__traceback__)
    # The first frame is that of the caller in this file.
    if len(frames) < 2:
        return ''
    return f' ({frames[-1].filename}, line {frames[-1].lineno})'


def _config_file(spec: str, path: str) -> pathlib.Path:
    """Return the file that --config names: one that is there, else a named config."""
    file = pathlib.Path(path)
    if file.is_file() and file.suffix == '.py':
        return file
    # Before what is here under this name and cannot be a config: `demo` may well be a folder.
    named = named_configs.find(path)
    if named is not None:
        return named
    if file.is_file():
        raise ConfigError(
            f'--config={spec}: {path} is not a Python file; a config is one, such as '
            'configs/default.py'
        )
    if named_configs.could_be_name(path):
        hint = f' and no named config; {_name_suggestion(file.stem)}'
    else:
        hint = f'; {_files_nearby(file.parent)}'
    raise ConfigError(f'--config={spec}: no file {path}{hint}')


def _name_suggestion(name: str) -> str:
    """Return the clause that names the named config most like `name`, or all of them."""
    names = list(named_configs.summaries())
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f'did you mean configs/{close[0]}.py?'
    files = [f'configs/{other}.py' for other in names]
    return f'expected a file or one of {", ".join(files)}'


def _get_config_function(spec: str, path: str, file: pathlib.Path) -> Any:
    """Return the get_config of a config file."""
    try:
        # The file may do anything, and so raise anything.
        module = named_configs.run_file(file)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f'--config={spec}: {path} cannot be run ({type(error).__name__}: '
            f'{_one_line(error)}){_line_of(file, error)}; correct that file'
        ) from error
    get_config = getattr(module, 'get_config', None)
    if not callable(get_config):
        raise ConfigError(
            f'--config={spec}: {path} defines no get_config(); a config file has one, see '
            'configs/default.py'
        )
    return get_config


def _files_nearby(folder: pathlib.Path) -> str:
    """Return the clause that tells of the config files in a folder."""
    if not folder.is_dir():
        return f'folder {folder} does not exist'
    files = sorted(str(path) for path in folder.glob('*.py') if path.stem != '__init__')
    if not files:
        return f'folder {folder} has no Python files'
    return f'there are {", ".join(files)}'


def _line_of(file: pathlib.Path, error: BaseException) -> str:
    """Return ' at line N' of a config file that raised while it ran, '' where that is unknown."""
    # A SyntaxError says its line itself.
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if pathlib.Path(frame.filename) == file:
            return f' at line {frame.lineno}'
    return ''


def override(config: ConfigDict, assignments: Iterable[tuple[str, str]]) -> None:
    """Set fields in place, keeping each field's type.

    A group whose entries are named freely (OPEN) may be replaced as a whole:
    ('data.train', "{'mine': {'path': 'data/mine'}}").

    Args:
        config: The config to change.
        assignments: (dotted path, text) pairs, such as ('optimizer.schedule.peak', '1e-3'). Old
            names in RENAMED_FIELDS are accepted with a warning.

    Raises:
        ConfigError: There is no such field, or the text is no value of its type.
    """
    for given_path, text in assignments:
        path = _current_path(given_path)
        group, field = _find_field(config, path, f'--config.{path}={text}')
        if isinstance(group[field], ConfigDict):
            group[field] = _parse_group(path, text, group[field])
        else:
            group[field] = parse(text, group[field], f'config.{path}')


def assign(config: ConfigDict, path: str, value: Any, where: str) -> None:
    """Set a field in place, keeping its type, or those fields of a group that `value` holds.

    A group whose entries are named freely (OPEN) is replaced as a whole, and a field that it lacks
    is added to it.

    Args:
        config: The config to change.
        path: Dotted path of the field or group.
        value: Of the field; a mapping for a group.
        where: What messages begin with.

    Raises:
        ConfigError: There is no such field, or the value is not of its type.
    """
    group, field = _find_field(config, path, where, adds=_is_open(path.rpartition('.')[0]))
    is_group = isinstance(group.get(field), ConfigDict)
    is_mapping = isinstance(value, (Mapping, ConfigDict))
    if is_group and not is_mapping:
        raise ConfigError(
            f'{where}: {path} is a group of fields ({", ".join(group[field])}), expected a '
            f'dictionary of them, got {value!r}'
        )
    if is_group and not _is_open(path):
        for key, entry in value.items():
            assign(config, f'{path}.{key}', entry, where)
    elif is_mapping:
        group[field] = ConfigDict(_with_tuples(value))
    elif field in group:
        group[field] = _typed(value, group[field], f'{where}: {path}')
    else:
        group[field] = _with_tuples(value)


def _is_open(path: str) -> bool:
    """Return whether a group is one of OPEN, or inside one."""
    return any(path == group or path.startswith(f'{group}.') for group in OPEN)


def _find_field(
    config: ConfigDict, path: str, where: str, adds: bool = False
) -> tuple[ConfigDict, str]:
    """Return the group that holds the field at a dotted path, and the field's own name.

    Args:
        config: The whole config.
        path: The dotted path.
        where: What messages begin with.
        adds: Whether the group may lack the field.
    """
    keys = path.split('.')
    node: Any = config
    for depth, key in enumerate(keys):
        if not isinstance(node, ConfigDict):
            parent = '.'.join(keys[:depth])
            raise ConfigError(f'{where}: {parent} is a value, not a group')
        is_last = depth == len(keys) - 1
        if key not in node and not (adds and is_last):
            parent = '.'.join(['config', *keys[:depth]])
            raise ConfigError(f'{where}: {parent} has no field {key!r}; {_suggestion(key, node)}')
        # The last group on the way, kept for the assignment: ConfigDict has no parent links.
        group = node
        node = node.get(key)
    return group, keys[-1]


def _parse_group(path: str, text: str, current: ConfigDict) -> ConfigDict:
    """Return the entries in `text`, a dictionary that replaces a freely named group."""
    if path not in OPEN:
        raise ConfigError(
            f'--config.{path}={text}: {path} is a group of fields ({", ".join(current)}); name '
            'one of them'
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    # Also a text that is no literal at all ends up here.
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(
            f'--config.{path}={text}: {path} is a group of fields '
            f'({", ".join(current) or "none yet"}); name one of them, or replace it by a '
            'dictionary in quotes, such as "{\'name\': value}"'
        )
    try:
        # Sequences are tuples, as config files write them.
        return ConfigDict(_with_tuples(value))
    # Of names with dots, which would be paths.
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f'--config.{path}={text}: {_one_line(error)} Expected names of letters, digits, _ and '
            '-, such as "probe_video"; rename that entry'
        ) from error


def _current_path(path: str) -> str:
    """Return the path under which a field is found today; warn if it was renamed."""
    for old, new in RENAMED_FIELDS.items():
        if path == old or path.startswith(f'{old}.'):
            _warn_renamed(old, new)
            return new + path.removeprefix(old)
    return path


def _move_renamed(config: ConfigDict) -> None:
    """Move the fields of a stored config that were renamed, in place, with a warning for each."""
    for old, new in RENAMED_FIELDS.items():
        if not _has_field(config, old):
            continue
        _warn_renamed(old, new)
        value = _pop_field(config, old)
        if not _has_field(config, new):  # else the new name counts
            _put_field(config, new, value)


def _warn_renamed(old: str, new: str) -> None:
    # FutureWarning is the category shown to users by default, once for each text.
    warnings.warn(
        f'config.{old} was renamed: use config.{new}', category=FutureWarning, stacklevel=2
    )


def _has_field(config: ConfigDict, path: str) -> bool:
    node: Any = config
    for key in path.split('.'):
        if not isinstance(node, ConfigDict) or key not in node:
            return False
        node = node[key]
    return True


def _pop_field(config: ConfigDict, path: str) -> Any:
    """Remove the field, and its group where nothing else is left in it; return its value."""
    first, _, rest = path.partition('.')
    if not rest:
        value = config[first]
        del config[first]
        return value
    value = _pop_field(config[first], rest)
    if not config[first]:
        del config[first]
    return value


def _put_field(config: ConfigDict, path: str, value: Any) -> None:
    """Set the field, making the groups on the way to it."""
    first, _, rest = path.partition('.')
    if not rest:
        config[first] = value
        return
    if first not in config:
        config[first] = ConfigDict()
    _put_field(config[first], rest, value)


def parse(text: str, like: Any, where: str) -> Any:
    """Return `text` as a value of the type of `like`.

    Raises:
        ConfigError: It is none; the message names the field `where`.
    """
    # Strings need no quotes on the command line, and '1' for a string field stays a string.
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # As in YAML and JSON, beside Python's True and False.
        value = {'true': True, 'false': False}.get(text.lower(), text)
    return _typed(value, like, where)


def _typed(value: Any, like: Any, where: str) -> Any:
    """Return `value` converted to the type of `like` where nothing is lost, or raise."""
    # Python counts a bool as an int.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A field whose default is None may hold anything.
    if like is None:
        return value
    if isinstance(like, bool):
        fits = isinstance(value, bool)
    elif isinstance(like, float):
        fits = is_number
    elif isinstance(like, int):
        # A float is refused even where it is whole, such as 1e3.
        fits = is_number and isinstance(value, int)
    elif isinstance(like, (tuple, list)):
        fits = isinstance(value, (tuple, list))
    else:
        fits = isinstance(value, type(like))
    if not fits:
        raise ConfigError(
            f'{where}: expected {type(like).__name__}, such as {like!r}, '
            f'got {value!r} ({type(value).__name__})'
        )
    if isinstance(like, float):
        # An int given for a float would fix the field's type as int: ConfigDict refuses a later
        # 0.5.
        return float(value)
    if isinstance(like, (tuple, list)):
        return _with_tuples(value)
    return value


def check_fields(
    config: ConfigDict, schema: ConfigDict, where: str = 'config', path: str = ''
) -> None:
    """Check that `config` has the fields of `schema`, with their types, and no others.

    Numbers and sequences are converted in place to the schema's types.

    Args:
        config: The config, or a group of it.
        schema: The same of configs/default.py.
        where: Name of the group in messages.
        path: Dotted path of the group, '' for the whole config.

    Raises:
        ConfigError: Naming the first field that is unknown, missing or of another type.
    """
    for key, value in config.items():
        field_path = f'{path}.{key}' if path else key
        field_name = f'{where}.{key}'
        if key not in schema:
            raise ConfigError(f'{field_name}={value!r}: no such field; {_suggestion(key, schema)}')
        # Its entries are checked by whoever reads them.
        if field_path in OPEN:
            continue
        is_group = isinstance(schema[key], ConfigDict)
        if is_group != isinstance(value, ConfigDict):
            expected = 'group' if is_group else 'value'
            raise ConfigError(f'{field_name}={value!r}: expected a {expected}.')
        if is_group:
            check_fields(value, schema[key], field_name, field_path)
        else:
            config[key] = _typed(value, schema[key], field_name)
    # The other direction: what the schema has and the config lacks.
    for key in schema:
        if key not in config:
            raise ConfigError(
                f'{where} lacks the field {key!r}; start from configs/default.py, which has them '
                'all'
            )


def fill_missing(config: ConfigDict, defaults: ConfigDict, path: str = '') -> ConfigDict:
    """Fill in the fields of `defaults` that `config` lacks, in place.

    For the config of a run older than these fields; their defaults keep the behaviour of before.

    Args:
        config: The config, or a group of it.
        defaults: The same of configs/default.py.
        path: Dotted path of the group, '' for the whole config.

    Returns:
        `config`.
    """
    for key, default in defaults.items():
        field_path = f'{path}.{key}' if path else key
        if key not in config:
            config[key] = default
            continue
        are_groups = isinstance(default, ConfigDict) and isinstance(config[key], ConfigDict)
        # Open groups are taken as they are: an entry that is absent was left out on purpose.
        if are_groups and field_path not in OPEN:
            fill_missing(config[key], default, field_path)
    return config


def with_defaults(
    config: ConfigDict | Mapping[str, Any],
    defaults: ConfigDict | Mapping[str, Any],
    where: str,
) -> ConfigDict:
    """Return `defaults` overlaid with `config`.

    Raises:
        ConfigError: A field has no default, or another type than it; the message names it in the
            group `where`.
    """
    merged = ConfigDict(dict(defaults))
    for key, value in config.items():
        if key not in defaults:
            raise ConfigError(
                f'{where}.{key}={value!r}: no such field; {_suggestion(key, defaults)}'
            )
        if isinstance(value, ConfigDict):
            # Groups below are checked by whoever reads them; their types may differ from the
            # default's.
            merged[key] = value
        else:
            merged[key] = _typed(value, defaults[key], f'{where}.{key}')
    return merged


def choose(value: Value, options: Iterable[Value], where: str) -> Value:
    """Return `value` if it is one of `options`.

    Raises:
        ConfigError: It is not; the message names the field `where` and lists them.
    """
    options = list(options)
    if value not in options:
        names = ', '.join(str(option) for option in options)
        raise ConfigError(f'{where}={value!r}: choose one of {names}')
    return value


def check_range(value: float, low: float, high: float, where: str) -> None:
    """Check that a number lies in [low, high], and is finite whatever these are.

    Args:
        value: The number.
        low: Smallest one allowed; -inf for none.
        high: Largest one allowed; inf for none.
        where: Name of the field in the message.

    Raises:
        ConfigError: It does not.
    """
    # Not `value < low or value > high`, which is False for NaN.
    if low <= value <= high and math.isfinite(value):
        return
    if math.isfinite(low) and math.isfinite(high):
        expected = f'a number from {low:g} to {high:g}'
    elif math.isfinite(low):
        expected = f'a number of at least {low:g}'
    else:
        expected = 'a finite number'
    raise ConfigError(f'{where}={value:g}: expected {expected}.')


def check_values(config: ConfigDict) -> None:
    """Check each field by itself, whatever the others are.

    Raises:
        ConfigError: A field's value makes no sense.
    """
    _check_numbers(config)
    _check_names(config)
    for field, upper in INTERVALS.items():
        _check_interval(_field(config, field), upper, f'config.{field}')
    fps = config.model.inputs.video.fps
    # Not `fps <= 0`, which is False for NaN.
    if not 0 < fps < float('inf'):
        raise ConfigError(f'config.model.inputs.video.fps={fps:g}: expected a positive number.')
    _check_profile(config.profile)
    _check_augmented_views(config)
    # Configs of runs from before this field do not have it.
    flow = config.model.inputs.get('flow')
    if flow:
        _check_flow(flow)
    elif 'flow' in config.model.towers:
        raise ConfigError(
            'config.model.towers.flow reads optical flow and config.model.inputs.flow is empty; '
            'set it to flow() of configs/default.py, or leave the tower out'
        )
    for modality in config.data.mismatch:
        choose(modality, _given_inputs(config), 'config.data.mismatch')
    for field, options in CHOICES.items():
        choose(_field(config, field), options, f'config.{field}')


def _check_flow(flow: ConfigDict) -> None:
    """Check config.model.inputs.flow, which is a group without fields or has them all."""
    where = 'config.model.inputs.flow'
    for name in flow:
        if name not in FLOW_FIELDS:
            raise ConfigError(f'{where}.{name}: no such field; {_suggestion(name, FLOW_FIELDS)}')
    for name, example in FLOW_FIELDS.items():
        if name not in flow:
            raise ConfigError(
                f'{where} lacks the field {name!r}; start from flow() of configs/default.py, which '
                'has them all'
            )
        flow[name] = _typed(flow[name], example, f'{where}.{name}')
        # Not `flow[name] <= 0`, which is False for NaN.
        if not 0 < flow[name] <= LARGEST_COUNT:
            raise ConfigError(f'{where}.{name}={flow[name]:g}: expected a positive number.')
    choose(flow.channels, (2, 3), f'{where}.channels')


def _field(config: ConfigDict, path: str) -> Any:
    node: Any = config
    for key in path.split('.'):
        node = node[key]
    return node


def _check_numbers(config: ConfigDict) -> None:
    for field, minimum in COUNTS.items():
        value = _field(config, field)
        if value < minimum:
            expected = 'a positive number' if minimum else 'a positive number, or 0 for none'
            raise ConfigError(f'config.{field}={value}: expected {expected}.')
        if value > LARGEST_COUNT:
            raise ConfigError(
                f'config.{field}={value}: expected a number of at most {LARGEST_COUNT}.'
            )
    for field, (low, high) in RANGES.items():
        check_range(_field(config, field), low, high, f'config.{field}')
    for field in SHARES:
        value = _field(config, field)
        if not 0 <= value <= 1:
            raise ConfigError(f'config.{field}={value:g}: expected a number from 0 to 1.')


def _check_names(config: ConfigDict) -> None:
    """Check the names that a config gives freely to entries: some of them become file names."""
    for group in NAMED_ENTRIES:
        for name in _field(config, group):
            if not re.fullmatch(r'\w[\w-]*', name):
                raise ConfigError(
                    f'config.{group} has an entry named {name!r}: expected letters, digits, _ and '
                    '-, such as "probe_video"; rename it'
                )


def _check_interval(interval: tuple[Any, ...], upper: float, where: str) -> None:
    are_two = len(interval) == 2 and all(isinstance(end, (int, float)) for end in interval)
    if are_two and 0 < interval[0] <= interval[1] <= upper:
        return
    bound = f' and at most {upper}' if upper < float('inf') else ''
    raise ConfigError(
        f'{where}={interval}: expected two numbers, smaller one first, above 0{bound}.'
    )


def _given_inputs(config: ConfigDict) -> list[str]:
    """Names of the model's inputs that are described."""
    return [name for name, spec in config.model.inputs.items() if spec]


def _check_augmented_views(config: ConfigDict) -> None:
    """Check the sets of augmentation of single streams: their streams, fields and values."""
    where = 'config.augment.views'
    views = _pairs(config.augment.views, where, "('video.second', {'blur': 0.1})")
    for stream, changes in views.items():
        others = _pairs(
            config.data.views, 'config.data.views', "('video.second', {'kind': 'clip'})"
        )
        choose(stream, (*_given_inputs(config), *others), f'{where}: the stream')
        changed = config.copy_and_resolve_references()
        changed.augment.views = ()
        # Unknown fields and other types are found here, values out of range below.
        changed.augment = with_defaults(dict(changes), changed.augment, f'{where}: {stream}')
        try:
            check_values(changed)
        except ConfigError as error:
            raise ConfigError(f'{where}: {stream}: {error}') from None


def _pairs(value: Any, where: str, example: str) -> dict[str, Any]:
    """Return the dictionary that a field of (name, dictionary) pairs stands for."""
    try:
        return {name: dict(entry) for name, entry in dict(value).items()}
    except (TypeError, ValueError):
        raise ConfigError(f'{where}: expected pairs such as ({example},), got {value!r}.') from None


def _check_profile(steps: tuple[Any, ...]) -> None:
    if not steps:
        return
    are_two = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not are_two or not 0 < steps[0] <= steps[1]:
        raise ConfigError(
            f'config.profile={steps}: expected the (first, last) step to be traced, such as '
            '(20, 22), or () for none.'
        )


def check_batch(config: ConfigDict, devices: int, processes: int) -> tuple[int, ...]:
    """Check that the batch divides over microbatches, processes and data-parallel devices.

    Args:
        config: The whole config.
        devices: Devices of all processes together.
        processes: Processes.

    Returns:
        The shape of this config's mesh.

    Raises:
        ConfigError: It does not divide, the mesh is impossible, or `check_values` finds a mistake.
    """
    # Imported late: a config is read before JAX is, whose platform it may choose.
    from vatt_jax.parallel import sharding

    try:
        shape = sharding.mesh_shape(config.mesh, devices)
    except sharding.ShardingError as error:
        raise ConfigError(str(error)) from error
    check_values(config)
    data_parallel = shape[0] * shape[1]  # replica, fsdp
    # Each microbatch must divide over the data-parallel devices by itself. The axes model and seq
    # share rows, so they do not count.
    unit = data_parallel * config.accumulate
    if config.batch_size % unit:
        smaller = max(1, config.batch_size // unit) * unit
        raise ConfigError(
            f'config.batch_size={config.batch_size} does not divide over {data_parallel} '
            f'data-parallel devices × config.accumulate={config.accumulate} microbatches; '
            f'{smaller} or {smaller + unit} would'
        )
    # Each process reads its own rows of the batch.
    if config.batch_size % processes:
        raise ConfigError(
            f'config.batch_size={config.batch_size} does not divide over {processes} processes'
        )
    return shape


def to_json(config: ConfigDict) -> str:
    """Return the config as JSON text."""
    return json.dumps(config.to_dict(), indent=1)


def from_json(text: str) -> ConfigDict:
    """Return the config that `to_json` wrote.

    Lists become tuples, as configs write them. Renamed fields get their new names, with a warning.
    """
    # JSON knows lists only, where configs write tuples.
    config = ConfigDict(_with_tuples(json.loads(text)))
    _move_renamed(config)
    return config


def stored(workdir: str | pathlib.Path) -> ConfigDict | None:
    """Return the resolved config stored with a run, None when the folder holds no run.

    Raises:
        ConfigError: The file cannot be read.
    """
    file = RunFolder(pathlib.Path(workdir)).config
    try:
        if not file.exists():
            return None
    # A folder above that may not be looked into, a name that is too long or holds a null byte.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'--workdir={workdir}: expected a folder that can be read, got {error}; choose another '
            '--workdir'
        ) from error
    try:
        # A phase names earlier ones, wherever the run lies now.
        return phase_folders.with_folders(from_json(file.read_text()), file.parent)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f'{file} cannot be read ({type(error).__name__}: {error}); move it elsewhere and '
            'name the config with --config, or choose another --workdir'
        ) from error


def differing_fields(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Return the dotted names of the fields in which two configs differ."""
    fields_a = dict(flatten(a))
    fields_b = dict(flatten(b))
    differing = []
    # A field that only one of them has counts as None in the other.
    for name in fields_a.keys() | fields_b.keys():
        # One of the two may come from JSON, with lists for tuples.
        if _with_tuples(fields_a.get(name)) != _with_tuples(fields_b.get(name)):
            differing.append(name)
    return sorted(differing)


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every field; `prefix` goes before each path."""
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from flatten(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def _with_tuples(value: Any) -> Any:
    """Return the value with tuples for lists, however deep inside."""
    if isinstance(value, (list, tuple)):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, (dict, ConfigDict)):
        return {key: _with_tuples(item) for key, item in value.items()}
    return value


def _one_line(text: Any) -> str:
    """Return a library's message on one line."""
    return ' '.join(str(text).split())


def _suggestion(key: str, fields: Iterable[str]) -> str:
    """Return the clause that names the field most like `key`, or all of them."""
    fields = list(fields)
    # cutoff 0.5, below difflib's 0.6: a far-fetched suggestion is still better than a long list.
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    if close:
        return f'did you mean {close[0]!r}?'
    return f'it has {", ".join(fields) or "no fields"}'


def fail(message: str) -> None:
    """Print one sentence to standard error and leave with code 2; never a traceback."""
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads of data pipelines and checkpointers must not keep a failed run alive, and atexit hooks
    # have nothing to save.
    os._exit(2)
