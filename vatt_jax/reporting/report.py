"""report/index.html of a run folder: one file that needs no server."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Shaped, UInt8

from vatt_jax.config import ConfigError
from vatt_jax.reporting import charts, clips, confusions, data_uris, headline
from vatt_jax.reporting import detections as found_boxes
from vatt_jax.reporting import heat_maps as found_heat
from vatt_jax.reporting.charts import Chart
from vatt_jax.reporting.confusions import Confusion
from vatt_jax.reporting.finished_run import DAMAGE, FinishedRun
from vatt_jax.reporting.results_table import rows, table
from vatt_jax.run_folder import RunFolder

__all__ = ['build', 'rows', 'table']

# The page is mailed and kept beside the run: all of it, clips included, in this many bytes.
MOST_BYTES = 10_000_000
# Tiles with a clip have a few more tags than those without one.
BYTES_OF_A_TILE = 500
# Clips along each side of a similarity matrix.
MATRIX_CLIPS = 128
# Clusters whose clips are shown at once; the rest unfold.
OPEN_CLUSTERS = 8
# Tables with more rows get a field that filters them.
FEW_ROWS = 30
# Of a caption under a clip, in characters.
LONGEST_CAPTION = 160

PAGE = pathlib.Path(__file__).parent / 'page'


def build(workdir: str | os.PathLike, others: Sequence[str | os.PathLike] = ()) -> pathlib.Path:
    """Writes <workdir>/report/index.html from what the run folder holds.

    Args:
        workdir: the run folder.
        others: further run folders to show beside it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: one of the folders holds no run, a file in it cannot be read, or a file stands
            where the page's folder belongs.
    """
    run, beside = FinishedRun(workdir), [FinishedRun(other) for other in others]
    sources, unreadable = _clip_sources(run.evaluation_folder)
    context = _context(run, beside, sources)
    context['warnings'] += unreadable
    # Without clips first: what the rest leaves of MOST_BYTES is theirs.
    bare = _render(context, {})
    num_clips = sum(len(source.indices) for source in sources.values())
    budget = MOST_BYTES - len(bare) - BYTES_OF_A_TILE * _num_tiles(context)
    encoded = clips.encode_all(sources, budget) if num_clips else {}
    path = RunFolder(run.path).report
    write_page(path, _render(context, encoded))
    return path


def write_page(path: pathlib.Path, page: bytes) -> None:
    """Writes a page whole or not at all, and makes its folder.

    Raises:
        ConfigError: a file stands where the folder belongs.
    """
    # Renamed into place: a browser that reloads never shows half a page.
    temporary = path.with_suffix('.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f'{path.parent}: expected a folder for the report, got a file; move it away'
        ) from error
    temporary.write_bytes(page)
    os.replace(temporary, path)


def _num_tiles(context: Mapping[str, Any]) -> int:
    """How many times a clip is shown; the same one may be shown often."""
    count = 0
    for group in context['retrievals']:
        for query in group['queries']:
            count += len(query['tiles']) + 1
    for cluster in context['clusters']['galleries']:
        count += len(cluster['tiles'])
    return count


def _render(context: Mapping[str, Any], encoded: Mapping[str, clips.Clip]) -> bytes:
    """The page in UTF-8. encoded: the clips that it shows."""
    films = {name: clip.film for name, clip in encoded.items() if clip.film}
    script = (PAGE / 'script.js').read_text(encoding='utf-8')
    page = (
        environment()
        .get_template('page.html')
        .render(
            **context,
            clips=encoded,
            films=films,
            script=script,
            # The browser runs this script and no other, whatever else may have slipped into the
            # page.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=(PAGE / 'style.css').read_text(encoding='utf-8'),
        )
    )
    # File names that are not UTF-8 come as lone surrogates, which have no encoding.
    return page.encode('utf-8', 'replace')


def environment() -> jinja2.Environment:
    """What reads the templates."""
    # Autoescape: captions, names and classes are a user's words, which no browser may read as
    # markup. StrictUndefined: a name misspelt in the template is an error, not an empty text.
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters['percent'] = _percent
    made.filters['shortened'] = _shortened
    return made


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %'


def _shortened(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_CAPTION else f'{text[: LONGEST_CAPTION - 1]}…'


def _context(
    run: FinishedRun, beside: Sequence[FinishedRun], sources: Mapping[str, clips.Source]
) -> dict[str, Any]:
    """What the template shows; empty where a run has nothing of the kind."""
    header, body = rows(run, beside)
    return {
        'title': run.config['name'],
        'numbers': headline.numbers(run),
        'warnings': headline.warnings(run),
        'next_steps': headline.next_steps(run),
        'facts': _facts(run),
        'files': _files(run),
        'header': header,
        'body': body,
        'charts': _charts(run, beside),
        'chart': charts,
        'retrievals': _retrievals(sources.get('retrieval')),
        'clusters': _clusters(run, sources.get('cluster')),
        'similarities': _similarities(run),
        'confusions': _confusions(run),
        'heat_maps': _heat_maps(run),
        'detections': _detections(run),
        'timings': run.timings,
        'config': json.dumps(run.config, indent=1),
        'can_encode_films': clips.can_encode_films(),
        'few_rows': FEW_ROWS,
        'open_clusters': OPEN_CLUSTERS,
    }


# ---- the run


def _facts(run: FinishedRun) -> dict[str, str]:
    """Name of a fact -> what it is."""
    config, made = run.config, run.provenance
    facts = {
        'training': f'{run.step} of {config["steps"]} steps, {config["batch_size"]} clips each',
        'objective': config['objective']['name'],
        'seed': str(config['seed']),
        'skipped': f'{run.done.get("skipped_steps", 0)} steps',
        'unreadable': f'{run.done.get("corrupt_records", 0)} records',
    }
    if made:
        hardware = f'{made["devices"]} × {made["device"]}, {made["processes"]} process(es)'
        facts['trained on'] = f'{hardware}, {made["cpu_cores"]} CPU cores, {made["platform"]}'
        facts['started'] = made['started'].replace('T', ' ').replace('+00:00', ' UTC')
        versions = [f'{name} {version}' for name, version in made['versions'].items()]
        facts['versions'] = ', '.join(versions)
    if made.get('commit'):
        # '+': with changes.
        facts['commit'] = made['commit'].replace('+', ' and uncommitted changes')
    order = run.done.get('order', '')
    if order:
        # Twelve digits tell two runs apart at a glance; done.json has them all.
        facts['order of examples'] = order[:12]
    today = datetime.datetime.now(datetime.UTC)
    facts['report made'] = f'{today:%Y-%m-%d %H:%M} UTC'
    return facts


def _files(run: FinishedRun) -> dict[str, str]:
    """Name of a file or folder of the run -> its path from the page."""
    folder = RunFolder(run.path)
    found = {
        'checkpoint': run.checkpoint,
        'evaluation': run.evaluation_folder,
        'curves': folder.metrics,
        'config': folder.config,
        'TensorBoard': folder.tensorboard,
    }
    files = {}
    for name, path in found.items():
        if path is not None and path.exists():
            files[name] = os.path.relpath(path, folder.report.parent)
    return files


def _charts(run: FinishedRun, beside: Sequence[FinishedRun]) -> list[Chart]:
    drawn = [charts.line_chart('Loss', _lines(run, 'loss', 'loss/'))]
    if beside:
        losses: list[charts.Line] = [
            (other.name, _curve(other, 'loss')) for other in (run, *beside)
        ]
        drawn.append(charts.line_chart('Loss, runs side by side', losses))
    for name in run.results:
        # Runs that are evaluated once have a point, not a curve.
        prefix = f'eval/{name}/'
        lines = [line for line in _lines(run, '', prefix) if len(line[1]) > 1]
        shown = [
            line for line in lines if line[0].endswith(('R@10', 'accuracy', 'NMI', 'mAP', 'AP50'))
        ]
        drawn.append(charts.line_chart(f'Evaluation: {name.replace("_", " ")}', shown))
    titles = {
        'lr': 'Learning rate',
        'grad_norm': 'Gradient norm',
        'clips_per_s': 'Clips per second',
        'data_wait': 'Share of time that waited for data',
    }
    for key, title in titles.items():
        drawn.append(charts.line_chart(title, [(title, _curve(run, key))]))
    return [chart for chart in drawn if chart is not None]


def _lines(run: FinishedRun, key: str, prefix: str) -> list[charts.Line]:
    """The curve of `key` and of everything that begins with `prefix`, by name."""
    names = set()
    for line in run.metrics:
        names |= {name for name in line if name == key or name.startswith(prefix)}
    lines: list[charts.Line] = []
    for name in sorted(names):
        shown = name if name == key else name.removeprefix(prefix)
        lines.append((shown.replace('_to_', ' → '), _curve(run, name)))
    return lines


def _curve(run: FinishedRun, key: str) -> list[tuple[float, Any]]:
    return [(line['step'], line[key]) for line in run.metrics if key in line]


# ---- what the newest evaluation left to look at


def _clip_sources(folder: pathlib.Path | None) -> tuple[dict[str, clips.Source], list[str]]:
    """({kind of gallery: its clips}, what is said of files that cannot be read)."""
    sources: dict[str, clips.Source] = {}
    unreadable: list[str] = []
    if folder is None:
        return sources, unreadable
    for name, file in (('retrieval', 'gallery.npz'), ('cluster', 'clusters.npz')):
        try:
            source = clips.open_source(folder / file)
        except DAMAGE as error:
            # Pictures are not worth losing the numbers for.
            unreadable.append(
                f'{folder / file} cannot be read ({error}), so its clips are not shown; '
                '--mode=eval makes it anew.'
            )
            continue
        if source is not None:
            sources[name] = source
    return sources, unreadable


def _retrievals(source: clips.Source | None) -> list[dict[str, Any]]:
    """What a few queries found, in groups by the kind of query."""
    if source is None:
        return []
    entries = source.document['entries']
    groups = []
    # Each kind of query once, in the order of the entries.
    for kind in dict.fromkeys(entry['query'] for entry in entries):
        queries: dict[int, dict[str, Any]] = {}
        for entry in entries:
            # By clip: evaluations of small galleries may hold a query several times.
            if entry['query'] == kind:
                queries.setdefault(entry['index'], _query(entry, source.document['clips']))
        groups.append({'kind': kind, 'queries': list(queries.values())})
    return groups


def _query(entry: Mapping[str, Any], clip_texts: Mapping[str, Any]) -> dict[str, Any]:
    """One query and the clips that came first, its own clip last where it is not among them."""
    own = entry['index']
    tiles = []
    for place, index in enumerate(entry['top'], 1):
        tiles.append(_tile(index, str(place), clip_texts, is_own=index == own))
    rank = f'{entry["rank"]:g}'
    if own not in entry['top']:
        tiles.append(_tile(own, rank, clip_texts, is_own=True))
    text = clip_texts[str(own)]
    return {
        'text': text['caption'] or ' / '.join(text['sentences'] or ()) or text['id'],
        'rank': rank,
        'clip': f'retrieval-{own}',
        'tiles': tiles,
    }


def _tile(index: int, rank: str, clip_texts: Mapping[str, Any], is_own: bool) -> dict[str, Any]:
    # npz and JSON have text keys only.
    text = clip_texts[str(index)]
    return {
        'clip': f'retrieval-{index}',
        'rank': rank,
        'caption': text['caption'] or text['id'],
        'is_own': is_own,
    }


def _clusters(run: FinishedRun, source: clips.Source | None) -> dict[str, Any]:
    """The surest clips of the largest clusters, and a table of all clusters of every evaluator."""
    galleries = []
    evaluator = ''
    if source is not None:
        evaluator = source.document['evaluator']
        for cluster in source.document['clusters']:
            tiles = []
            for place, index in enumerate(cluster['clips'], 1):
                caption = f'clip {place} of {cluster["name"]}'
                tiles.append({'clip': f'cluster-{index}', 'rank': str(place), 'caption': caption})
            galleries.append({'name': cluster['name'], 'tiles': tiles})
    tables = []
    for name, result in run.results.items():
        contingency = result.artifacts.get('contingency')
        if contingency is not None and run.is_plain(name, ('clustering',)):
            tables.append(
                {
                    'title': name.replace('_', ' '),
                    'rows': _cluster_rows(contingency, result.artifacts.get('classes') or []),
                }
            )
    return {'evaluator': evaluator, 'galleries': galleries, 'tables': tables}


def _cluster_rows(
    contingency: Shaped[np.ndarray, 'P C'], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Each cluster that has clips: how many, and of which classes. contingency: clips."""
    sizes = contingency.sum(1)
    largest = np.argsort(-sizes, kind='stable')[: confusions.LISTED_CLASSES]
    found = []
    for cluster in largest.tolist():
        if not sizes[cluster]:
            continue
        shares = contingency[cluster] / sizes[cluster]
        names = []
        for kind in np.argsort(-shares, kind='stable')[:3].tolist():
            if shares[kind] > 0:
                # Classes without a name are numbered.
                name = class_names[kind] if kind < len(class_names) else str(kind)
                names.append(f'{name} ({100 * shares[kind]:.0f} %)')
        found.append(
            {
                'name': f'cluster {cluster}',
                'clips': int(sizes[cluster]),
                'purity': float(shares.max()),
                'classes': ', '.join(names),
            }
        )
    return found


def _similarities(run: FinishedRun) -> list[dict[str, str]]:
    """Pictures of the similarity matrices of the retrieval evaluations."""
    retrievals = [name for name in run.results if run.is_plain(name, ('retrieval',))]
    found = []
    for name in retrievals:
        for key, matrix in run.results[name].artifacts.items():
            # Into video only: the other direction is the transpose.
            if not key.endswith('/similarity') or not key.partition('_to_')[2].startswith('video'):
                continue
            title = key.split('/')[0].replace('_to_', ' → ')
            if len(retrievals) > 1:
                title = f'{name.replace("_", " ")}: {title}'
            # A network that diverged has similarities that are not numbers.
            shown = np.nan_to_num(np.asarray(matrix, np.float32)[:MATRIX_CLIPS, :MATRIX_CLIPS])
            found.append(
                {
                    'title': title,
                    'summary': _similarity_summary(shown),
                    'picture': data_uris.png(_matrix_picture(shown)),
                }
            )
    return found


def _similarity_summary(matrix: Shaped[np.ndarray, 'N N']) -> str:
    diagonal = float(np.diagonal(matrix).mean())
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    elsewhere = float(others.mean()) if len(others) else 0.0
    return (
        f'{len(matrix)} clips; mean cosine {diagonal:.2f} between what belongs together (the '
        f'diagonal), {elsewhere:.2f} elsewhere'
    )


def _matrix_picture(matrix: Shaped[np.ndarray, 'N N']) -> UInt8[np.ndarray, 'N N 3']:
    """From white, the least similar, to blue."""
    # Full contrast whatever the temperature; 1e-6 for a matrix of one value.
    x = (matrix - matrix.min()) / max(1e-6, float(matrix.max() - matrix.min()))
    # White (255, 255, 255) at 0, (30, 100, 195) at 1.
    return np.stack([255 - 225 * x, 255 - 155 * x, 255 - 60 * x], -1).astype(np.uint8)


def _confusions(run: FinishedRun) -> list[Confusion]:
    found = []
    for name, result in run.results.items():
        # A clustering has a table only where its clusters were matched to classes; simple probes
        # are controls.
        counts = result.artifacts.get('confusion')
        if counts is None or not run.is_plain(name, ('linear_probe', 'clustering')):
            continue
        classes = result.artifacts.get('classes') or []
        shown = confusions.confusion(name.replace('_', ' '), counts, classes)
        if shown is not None:
            found.append(shown)
    return found


def _heat_maps(run: FinishedRun) -> list[dict[str, Any]]:
    shown = []
    for name, result in run.results.items():
        # Pixels and values are in files of their own, which may be lost.
        is_there = {'heat_pictures', 'heat_pixels', 'heat_values'} <= set(result.artifacts)
        if run.is_plain(name, ('localisation',)) and is_there:
            shown.append(found_heat.heat_maps(name.replace('_', ' '), result.artifacts))
    return shown


def _detections(run: FinishedRun) -> list[dict[str, Any]]:
    shown = []
    for name, result in run.results.items():
        # Pixels are in a file of their own, which may be lost.
        if run.is_plain(name, ('detection',)) and 'pixels' in result.artifacts:
            shown.append(found_boxes.detections(name.replace('_', ' '), result.artifacts))
    return shown
