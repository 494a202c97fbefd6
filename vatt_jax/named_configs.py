"""The named configs: the folder `configs` of a clone, `vatt_jax.configs` of an installed wheel.

A config file says `from configs import default` in either, wherever the file itself lies.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterator

# What config files import the named configs from.
PACKAGE = 'configs'


def folder() -> pathlib.Path:
    """The folder that holds the named configs."""
    library = pathlib.Path(__file__).parent
    # A wheel has them inside the library, a clone beside it.
    installed = library / PACKAGE
    return installed if installed.is_dir() else library.parent / PACKAGE


def summaries() -> dict[str, str]:
    """Name of each named config -> the first line of its docstring.

    The files are read, not run: running them imports JAX.
    """
    found = {}
    for file in sorted(folder().glob('*.py')):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        # Files without it are read by configs (machines.py), and are none themselves.
        if 'get_config' in functions:
            first_line, _, _ = (ast.get_docstring(tree) or '').partition('\n')
            found[file.stem] = first_line
    return found


def could_be_name(path: str) -> bool:
    """Whether a path has the form of a named config: [configs/]NAME[.py]."""
    given = pathlib.PurePath(path)
    is_here = given.parent in (pathlib.PurePath('.'), pathlib.PurePath(PACKAGE))
    return is_here and given.suffix in ('', '.py')


def find(path: str) -> pathlib.Path | None:
    """Return the file of a named config.

    Args:
        path: 'demo', 'demo.py', 'configs/demo' or 'configs/demo.py'.

    Returns:
        Its file, or None where no config has that name.
    """
    name = pathlib.PurePath(path).stem
    if could_be_name(path) and name in summaries():
        return folder() / f'{name}.py'
    return None


def module(name: str) -> types.ModuleType:
    """Return a file of the named configs as a module: `default`, `machines`."""
    with importable():
        return importlib.import_module(f'{PACKAGE}.{name}')


def run_file(file: pathlib.Path) -> types.ModuleType:
    """Run a config file, which may lie anywhere. To be called within `importable`.

    Args:
        file: ends in .py.

    Returns:
        Its module, which is not left in sys.modules: two config files of one name do not clash.
    """
    # As a module of the package, so that a copy of a named config may keep its relative imports;
    # under a name that none of them has, so that configs/demo.py is not taken for this file.
    name = f'{PACKAGE}._file'
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    loaded = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that defines them.
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.modules.pop(name, None)
    return loaded


@contextlib.contextmanager
def importable(file: pathlib.Path | None = None) -> Iterator[None]:
    """Within it, `configs` is the package of the named configs.

    Another package of that name, of the user's own program, is put back afterwards.

    Args:
        file: a config file. If its folder is called `configs` too, the files beside it come before
            the named configs, as they would in a program of their own.
    """
    folders = [str(folder())]
    if file is not None:
        beside = os.path.dirname(os.path.abspath(file))
        if os.path.basename(beside) == PACKAGE and beside not in folders:
            folders.insert(0, beside)
    present = sys.modules.get(PACKAGE)
    if present is not None and list(getattr(present, '__path__', ())) == folders:
        # A clone whose root is on the path: there is one package, and it stays.
        yield
        return
    others = _take_out()
    sys.modules[PACKAGE] = _make_package(folders)
    try:
        yield
    finally:
        _take_out()
        sys.modules.update(others)


def _take_out() -> dict[str, types.ModuleType]:
    """Remove the package `configs` and its modules from sys.modules, and return them."""
    names = [name for name in sys.modules if name.partition('.')[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}


def _make_package(folders: list[str]) -> types.ModuleType:
    """A package whose modules are the files of these folders."""
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = folders
    return importlib.util.module_from_spec(spec)
