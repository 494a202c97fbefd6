"""The documentation names what there is: pages, files, commands, configs and their fields."""

import pathlib
import re
import shlex

import pytest
import yaml

from configs import default
from vatt_jax import config as configs
from vatt_jax.modes import flags

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))


def pages_of(nav):
    """The files that a navigation of mkdocs names."""
    for entry in nav:
        for page in entry.values():
            if isinstance(page, str):
                yield page
            else:
                yield from pages_of(page)


def test_every_page_is_in_the_navigation_and_there():
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
    in_navigation = sorted(pages_of(site['nav']))
    there = sorted(path.relative_to(ROOT / 'docs').as_posix() for path in PAGES[2:])
    assert in_navigation == there


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
        if not target.startswith(('http:', 'https:')):
            assert (page.parent / target).exists(), target


def commands():
    """(page, words) of each `python run.py` in a code block of the pages."""
    for page in PAGES:
        for block in re.findall(r'```\w*\n(.*?)```', page.read_text(), re.S):
            text = block.replace('\\\n', ' ')
            for line in text.splitlines():
                found = re.search(r'python run\.py(.*)', line)
                # An ellipsis or a word in capitals stands for what the reader puts in.
                if found and '…' not in line and '...' not in line:
                    words = shlex.split(found[1], comments=True)
                    yield pytest.param(words, id=f'{page.name} {" ".join(words)}'[:80])


@pytest.mark.parametrize('words', commands())
def test_commands_of_the_pages_are_taken(words):
    given, overrides = flags.parse(words)
    if given.config.startswith('configs/'):
        config = configs.load(given.config)
        configs.override(config, overrides)
        configs.check_fields(config, default.get_config())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook):
    nbclient = pytest.importorskip('nbclient', reason='the extra docs is not installed')
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    resources = {'metadata': {'path': str(notebook.parent)}}
    # A cell that raises, as one whose command fails, is an error here.
    nbclient.NotebookClient(content, timeout=3000, resources=resources).execute()


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_what_they_print(notebook):
    nbformat = pytest.importorskip('nbformat', reason='the extra docs is not installed')
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    for cell in content.cells:
        assert not cell.get('outputs')
        assert cell.get('execution_count') is None
