"""report/index.html of a run folder: one file that needs no server."""

from __future__ import annotations

import html
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vatt_jax.reporting import data_uris
from vatt_jax.reporting.charts import line_chart
from vatt_jax.reporting.finished_run import FinishedRun
from vatt_jax.reporting.results_table import Table, rows, table
from vatt_jax.run_folder import RunFolder

__all__ = ['build', 'rows', 'table']

# Frames of each clip that are shown.
STILLS = 4
# Clips along each side of a similarity matrix.
MATRIX_CLIPS = 128
# Larger confusion tables cannot be read.
MOST_CLASSES = 40


def build(workdir: str | os.PathLike, others: Sequence[str | os.PathLike] = ()) -> pathlib.Path:
    """Writes <workdir>/report/index.html from what the run folder holds.

    Args:
        workdir: the run folder.
        others: further run folders to show beside it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: one of the folders holds no run.
    """
    run, beside = FinishedRun(workdir), [FinishedRun(other) for other in others]
    title, config = _text(run.config['name']), _text(json.dumps(run.config, indent=1))
    # Each section is HTML or '', so that a run shows what it has.
    body = [
        f'<h1>{title}</h1>',
        _facts(run),
        '<h2>Results</h2>',
        _html_table(rows(run, beside)),
        NOTE,
        '<h2>Curves</h2>',
        _curves(run, beside),
        _gallery(run.evaluation_folder),
        _clusters(run.evaluation_folder),
        _similarity(run),
        _confusion(run),
        _stages(run),
        f'<details><summary>Config</summary><pre>{config}</pre></details>',
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<title>{title}</title><style>{STYLE}</style><main>{"".join(body)}</main></html>'
    )
    path = RunFolder(run.path).report
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a browser that reloads never shows half a page.
    temporary = path.with_suffix('.tmp')
    temporary.write_text(page, encoding='utf-8')
    os.replace(temporary, path)
    return path


def _text(value: Any) -> str:
    """Any value as text that a browser never reads as markup."""
    return html.escape(str(value), quote=True)


# ---- sections; '' where a run has nothing to show


def _facts(run: FinishedRun) -> str:
    config = run.config
    facts = [
        # done.json is absent while a run is under way.
        f'{run.done.get("step", "–")} steps of {config["batch_size"]} clips',
        f'seed {config["seed"]}',
        f'objective {config["objective"]["name"]}',
        f'{run.done.get("skipped_steps", 0)} steps skipped',
        f'{run.done.get("corrupt_records", 0)} unreadable records',
    ]
    order = run.done.get('order', '')
    if order:
        # Twelve digits tell two runs apart at a glance; done.json has them all.
        facts.append(f'order {order[:12]}')
    return f'<p class="facts">{_text(" · ".join(facts))}</p>'


def _html_table(content: Table) -> str:
    header, body = content
    if not body:
        return '<p>No evaluation yet: run with --mode=eval.</p>'
    head = ''.join(f'<th>{_text(name)}</th>' for name in header)
    lines = []
    for row in body:
        cells = ''.join(f'<td>{_text(cell)}</td>' for cell in row)
        lines.append(f'<tr>{cells}</tr>')
    return f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _curves(run: FinishedRun, beside: Sequence[FinishedRun]) -> str:
    # The total and its parts: which there are depends on the objective.
    losses = set()
    for line in run.metrics:
        losses |= {key for key in line if key == 'loss' or key.startswith('loss/')}
    charts = [line_chart('loss', [(name, _curve(run, name)) for name in sorted(losses)])]
    if beside:
        lines = [(other.name, _curve(other, 'loss')) for other in (run, *beside)]
        charts.append(line_chart('loss, runs side by side', lines))
    titles = {
        'lr': 'learning rate',
        'grad_norm': 'gradient norm',
        'clips_per_s': 'clips per second',
    }
    for key, title in titles.items():
        charts.append(line_chart(title, [(title, _curve(run, key))]))
    return f'<div class="charts">{"".join(charts)}</div>'


def _curve(run: FinishedRun, key: str) -> list[tuple[float, Any]]:
    return [(line['step'], line[key]) for line in run.metrics if key in line]


def _gallery(folder: pathlib.Path | None) -> str:
    """What a few queries found."""
    arrays = _evaluation_arrays(folder, 'gallery.npz')
    if arrays is None:
        return ''
    # JSON inside the npz, as a string array of no dimensions: no pickle is needed to read it.
    document = json.loads(str(arrays['entries']))
    stills = _stills(arrays)
    sounds = {}
    for index, samples in _members(arrays, 'audio'):
        sounds[index] = data_uris.wav(samples, document['rate'])
    sections = []
    # Each kind of query once, in the order of the entries.
    for query in dict.fromkeys(entry['query'] for entry in document['entries']):
        blocks = []
        for entry in document['entries']:
            if entry['query'] == query:
                sound = sounds.get(str(entry['index'])) if query == 'audio' else None
                blocks.append(_retrieval(entry, document['clips'], stills, sound))
        sections.append(f'<h3>{_text(query)} → video</h3>{"".join(blocks)}')
    return (
        '<h2>Retrievals</h2><p>Queries spaced evenly over the held-out gallery; the five nearest '
        'clips, four frames each, the nearest first. A green frame is the clip the query belongs '
        f'to.</p>{"".join(sections)}'
    )


def _retrieval(
    entry: Mapping[str, Any],
    clips: Mapping[str, Any],
    stills: Mapping[str, str],
    sound: str | None,
) -> str:
    """One query and the clips that came first.

    Args:
        entry: what a query found.
        clips: what is said of each clip.
        stills: data URI of each clip's frames.
        sound: data URI of the query's sound, where it is asked by sound.
    """
    own = clips[str(entry['index'])]
    query = f'<audio controls preload="none" src="{sound}"></audio>' if sound else ''
    # Clips without a caption still have their spoken sentences.
    spoken = own['caption'] or ' / '.join(own['sentences'])
    query += f'<q>{_text(spoken)}</q> <small>own clip came at rank {entry["rank"]:g}</small>'
    cells = []
    # npz and JSON have text keys only, hence str(index) throughout.
    for index in map(str, entry['top']):
        if index in stills:
            # A class of STYLE: the green frame.
            marked = ' right' if index == str(entry['index']) else ''
            name = _text(clips[index]['caption'] or clips[index]['id'])
            cells.append(
                f'<div class="clip{marked}"><img alt="" src="{stills[index]}">'
                f'<small>{name}</small></div>'
            )
    return (
        f'<section class="query"><p>{query}</p><div class="found">{"".join(cells)}</div></section>'
    )


def _clusters(folder: pathlib.Path | None) -> str:
    """The surest clips of the largest clusters."""
    arrays = _evaluation_arrays(folder, 'clusters.npz')
    if arrays is None:
        return ''
    document = json.loads(str(arrays['entries']))
    stills = _stills(arrays)
    sections = []
    for cluster in document['clusters']:
        cells = []
        for index in map(str, cluster['clips']):
            if index in stills:
                cells.append(f'<div class="clip"><img alt="" src="{stills[index]}"></div>')
        sections.append(
            f'<section class="query"><p>{_text(cluster["name"])}</p>'
            f'<div class="found">{"".join(cells)}</div></section>'
        )
    return (
        '<h2>Clusters</h2><p>The five clips that the model is surest of, for the largest clusters '
        f'({_text(document["evaluator"])}). In brackets the class that the best one-to-one '
        f'matching gives the cluster.</p>{"".join(sections)}'
    )


def _similarity(run: FinishedRun) -> str:
    """Pictures of the similarity matrices of the retrieval evaluations."""
    retrievals = [name for name in run.results if _is_plain(run, name, ('retrieval',))]
    figures = []
    for name in retrievals:
        for key, matrix in run.results[name].artifacts.items():
            # Into video only: the other direction is the transpose.
            if not key.endswith('/similarity') or not key.partition('_to_')[2].startswith('video'):
                continue
            title = key.split('/')[0].replace('_to_', ' → ')
            if len(retrievals) > 1:
                title = f'{name.replace("_", " ")}: {title}'
            picture = data_uris.png(_matrix_picture(matrix))
            figures.append(
                f'<figure><figcaption>{_text(title)}</figcaption>'
                f'<img class="matrix" alt="" src="{picture}"></figure>'
            )
    if not figures:
        return ''
    return (
        '<h2>Similarity</h2><p>The first 128 clips of the gallery, query by row: what belongs '
        f'together is the diagonal.</p><div class="charts">{"".join(figures)}</div>'
    )


def _is_plain(run: FinishedRun, name: str, types: Sequence[str]) -> bool:
    """Whether an evaluator is of one of these types and is no control.

    A control sees changed input, such as single frames, or other views of it.
    """
    entry = run.config['evals'].get(name, {})
    return entry.get('type') in types and not entry.get('change') and not entry.get('views')


def _matrix_picture(matrix: Any) -> np.ndarray:
    """uint8 [N N 3]: from white, the least similar, to blue."""
    x = np.asarray(matrix, np.float32)[:MATRIX_CLIPS, :MATRIX_CLIPS]
    # Full contrast whatever the temperature; 1e-6 for a matrix of one value.
    x = (x - x.min()) / max(1e-6, float(x.max() - x.min()))
    # White (255, 255, 255) at 0, (30, 100, 195) at 1.
    return np.stack([255 - 225 * x, 255 - 155 * x, 255 - 60 * x], -1).astype(np.uint8)


def _confusion(run: FinishedRun) -> str:
    """Tables of true and predicted classes."""
    figures = []
    for name, result in run.results.items():
        # A clustering has a table only where its clusters were matched to classes; simple probes
        # are controls.
        matrix = result.artifacts.get('confusion')
        is_shown = _is_plain(run, name, ('linear_probe', 'clustering'))
        if matrix is None or not is_shown or len(matrix) > MOST_CLASSES:
            continue
        figures.append(
            f'<figure><figcaption>{_text(name.replace("_", " "))}: true class by row, predicted '
            f'by column in the same order</figcaption><table class="confusion">'
            f'{_confusion_rows(matrix, result.artifacts.get("classes") or [])}</table></figure>'
        )
    return f'<h2>Confusions</h2>{"".join(figures)}' if figures else ''


def _confusion_rows(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """Rows of a table. matrix: counts [P P], true class by row. classes: names, maybe fewer."""
    # By true class, so that rare classes are as dark as frequent ones; empty rows stay 0.
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    numbers = [str(i) for i in range(len(matrix))]
    # Clusters and classes without a name are numbered.
    names = [*classes[: len(matrix)], *numbers[len(classes) :]]
    lines = []
    for true, row, counts in zip(names, shares, matrix.tolist(), strict=True):
        cells = []
        for predicted, share, count in zip(names, row, counts, strict=True):
            cells.append(
                f'<td title="{_text(true)} taken for {_text(predicted)}: {count}" '
                # The share is the opacity: a row's cells add up to one full blue.
                f'style="background:rgba(37,99,235,{share:.2f})">{count or ""}</td>'
            )
        lines.append(f'<tr><th>{_text(true)}</th>{"".join(cells)}</tr>')
    return ''.join(lines)


def _stages(run: FinishedRun) -> str:
    if not run.timings:
        return ''
    lines = []
    for stage, seconds in run.timings.items():
        lines.append(f'<tr><td>{_text(stage)}</td><td>{seconds / 60:.1f} min</td></tr>')
    return f'<h2>Time</h2><table>{"".join(lines)}</table>'


# ---- what the newest evaluation left for pictures


def _evaluation_arrays(folder: pathlib.Path | None, name: str) -> dict[str, np.ndarray] | None:
    if folder is None:
        return None
    path = folder / name
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays)


def _members(arrays: Mapping[str, np.ndarray], group: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every `group/name`."""
    for key, array in arrays.items():
        if key.startswith(f'{group}/'):
            yield key.split('/')[1], array


def _stills(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Clip -> data URI of a few of its frames, side by side."""
    strips = {}
    for index, frames in _members(arrays, 'frames'):
        # Evenly spaced, the first and the last frame among them.
        chosen = frames[np.linspace(0, len(frames) - 1, STILLS).astype(int)]  # [T H W 3]
        # One strip a clip, so one data URI.
        strips[index] = data_uris.png(np.concatenate(list(chosen), 1))
    return strips


NOTE = (
    '<p class="facts">Intervals are bootstrap percentiles over the held-out clips. Ties share '
    'their places, so a constant embedding scores chance. “random init” is the same network before '
    'training; “chance” is what guessing gives.</p>'
)
# Inline, as the page must be one file that opens without a server.
STYLE = """
body{margin:0;background:#fff;color:#1f2937;font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:32px 0 8px;border-bottom:1px solid #e5e7eb}
h3{font-size:16px;margin:20px 0 4px}
.facts,small,figcaption{color:#6b7280;font-size:13px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px;text-align:right;border-bottom:1px solid #f3f4f6}
th:first-child,td:first-child{text-align:left}
thead th{border-bottom:1px solid #9ca3af;font-weight:600}
td:nth-child(2){font-weight:600}td:nth-child(3){white-space:nowrap}
.charts{display:flex;flex-wrap:wrap;gap:16px}figure{margin:0}
.charts figure{width:420px;max-width:100%}svg{width:100%}
svg text{font-size:11px;fill:#6b7280}.grid{stroke:#e5e7eb}
.matrix{width:100%;image-rendering:pixelated;border:1px solid #e5e7eb}
.query{margin:10px 0 16px}.query p{margin:0 0 4px}
.query audio{height:28px;vertical-align:middle;margin-right:8px}
.found{display:flex;flex-wrap:wrap;gap:8px}.clip{width:200px}
.clip img{width:100%;image-rendering:pixelated;border:3px solid transparent;
box-sizing:border-box}.clip.right img{border-color:#16a34a}
.clip small{display:block;line-height:1.25}
.confusion{margin-bottom:16px}
.confusion td{font-weight:400;padding:1px 4px;width:22px;text-align:center;font-size:12px}
.confusion th{font-weight:400;font-size:12px;padding:1px 8px}
pre{background:#f9fafb;padding:12px;overflow:auto;font-size:12px}
"""
