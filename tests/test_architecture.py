"""Imports only go down the floors of docs/architecture.md: none runs upward or in a circle."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# From the ground up. Files of one floor may import those below, and one another where that makes
# no circle (test_no_two_files_import_each_other).
FLOORS = (
    (
        'vatt_jax.rng',
        'vatt_jax.parallel',
        'vatt_jax.command_line',
        'vatt_jax.config',
        'vatt_jax.named_configs',
        'vatt_jax.run_folder',
        'vatt_jax.phase_folders',
        'vatt_jax.phases',
        'vatt_jax.object_store',
        'vatt_jax.extras',
        'vatt_jax.terminal',
    ),
    ('vatt_jax.inputs',),
    ('vatt_jax.losses', 'vatt_jax.clustering'),
    ('vatt_jax.models',),
    ('vatt_jax.detection',),
    ('vatt_jax.objectives',),
    ('vatt_jax.optim', 'vatt_jax.inference', 'vatt_jax.performance'),
    ('vatt_jax.evals',),
    ('vatt_jax.training', 'vatt_jax.reporting'),
    (
        'vatt_jax.importers',
        'vatt_jax.exchange',
        'vatt_jax.adaptation',
        'vatt_jax.planning',
        'vatt_jax.api',
        'vatt_jax.search',
        'vatt_jax.socratic',
    ),
    ('vatt_jax.modes', 'vatt_jax.launch'),
    ('vatt_jax.cli', 'vatt_jax.evolve', 'vatt_jax.__main__'),
)


def module_name(path: pathlib.Path) -> str:
    """'vatt_jax.losses.nce' of its file; a package of its __init__."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] == '__init__':
        parts = parts[:-1]
    return '.'.join(parts)


def modules() -> dict[str, pathlib.Path]:
    """{module: file} of this project's libraries."""
    files = [*ROOT.glob('vatt_jax/**/*.py'), *ROOT.glob('data_pipelines/**/*.py')]
    return {module_name(path): path for path in files}


def imports(path: pathlib.Path, at_top_only: bool) -> set[str]:
    """Modules of this project that a file imports, at its top or anywhere."""
    tree = ast.parse(path.read_text())
    known = modules()
    found = set()
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            # 'package.module.Name' imports package.module
            while name and name not in known:
                name = name.rpartition('.')[0]
            if name:
                found.add(name)
    return found


def floor_of(module: str) -> int:
    """The floor that a module stands on, 0 for the lowest."""
    for number, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(f'{room}.') for room in rooms):
            return number
    raise AssertionError(f'{module} is on no floor; add its folder to FLOORS and to the docs')


LIBRARY = sorted(name for name in modules() if name.startswith('vatt_jax.'))


@pytest.mark.parametrize('module', LIBRARY)
def test_imports_go_down(module):
    for imported in imports(modules()[module], at_top_only=False):
        if imported.startswith('vatt_jax.'):
            assert floor_of(imported) <= floor_of(module), f'{module} imports {imported}'


@pytest.mark.parametrize('module', LIBRARY)
def test_the_library_needs_neither_data_nor_configs_nor_tensorflow(module):
    tree = ast.parse(modules()[module].read_text())
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            top = name.split('.')[0]
            forbidden = ('data_pipelines', 'configs', 'tensorflow', 'tensorflow_datasets', 'run')
            assert top not in forbidden, f'{module} imports {name}'


def test_no_two_files_import_each_other():
    """Follows the imports at the tops of files; a circle would be one of them."""
    graph = {name: imports(path, at_top_only=True) for name, path in modules().items()}
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 'open', f'circle: {" -> ".join((*trail, name))}'
        if name in state:
            return
        state[name] = 'open'
        # A package's __init__ gathers what its own files hold.
        for imported in sorted(graph[name] - {name}):
            visit(imported, (*trail, name))
        state[name] = 'done'

    for name in graph:
        visit(name, ())
