"""report/index.html of a run folder, one file that needs no server, and the same table for the terminal."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import pathlib
import struct
import wave
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vatt_jax import config as configs
from vatt_jax import evals
from vatt_jax.config import ConfigError

COLORS = ('#2563eb', '#dc2626', '#059669', '#d97706', '#7c3aed', '#0891b2')


def build(workdir: str | os.PathLike, others: Sequence[str | os.PathLike] = ()) -> pathlib.Path:
    """Writes <workdir>/report/index.html from what the run folder holds and returns its path. others: run folders to show beside it."""
    run, beside = Run(workdir), [Run(o) for o in others]
    body = [
        f'<h1>{_text(run.config["name"])}</h1>',
        _facts(run),
        '<h2>Results</h2>',
        _html_table(rows(run, beside)),
        NOTE,
        '<h2>Curves</h2>',
        _curves(run, beside),
        _gallery(run),
        _clusters(run),
        _similarity(run),
        _confusion(run),
        _stages(run),
        f'<details><summary>Config</summary><pre>{_text(json.dumps(run.config, indent=1))}</pre></details>',
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>'
        f'{_text(run.config["name"])}</title><style>{STYLE}</style><main>{"".join(body)}</main></html>'
    )
    path = run.path / 'report' / 'index.html'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(page, encoding='utf-8')
    os.replace(temporary, path)
    return path


class Run:
    """What a run folder holds, read once. results, baseline: {} where there was no evaluation."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        stored = configs.stored(self.path)
        if stored is None:
            raise ConfigError(
                f'{self.path} holds no run (no config.json); train first, or name another folder'
            )
        self.config = stored.to_dict()
        read = lambda name: (
            json.loads((self.path / name).read_text()) if (self.path / name).exists() else {}
        )
        self.timings, self.done = read('timings.json'), read('done.json')
        lines = (
            (self.path / 'metrics.jsonl').read_text().splitlines()
            if (self.path / 'metrics.jsonl').exists()
            else []
        )
        self.metrics = [d for d in map(_json, lines) if d]
        folders = sorted((self.path / 'evals').glob('step_*/results.json'))
        self.folder = folders[-1].parent if folders else None
        self.results = evals.load(self.folder) if self.folder else {}
        random = self.path / 'evals' / 'random_init'
        self.baseline = evals.load(random) if (random / 'results.json').exists() else {}

    @property
    def name(self) -> str:
        return f'{self.config["name"]}, seed {self.config["seed"]}'


def rows(run: Run, beside: Sequence[Run] = ()) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the results table: every scalar that has an interval or a chance, as one cell for each run."""
    header = [
        '',
        'pretrained',
        '95 % interval',
        *[f'{r.name}' for r in beside],
        'random init',
        'chance',
    ]
    out = []
    for name, result in run.results.items():
        told = [
            k
            for k in result.scalars
            if f'{k}/interval' in result.artifacts or f'{k}/chance' in result.artifacts
        ]
        for key in told:
            value, interval, chance = (
                result.scalars[key],
                result.artifacts.get(f'{key}/interval'),
                result.artifacts.get(f'{key}/chance'),
            )
            show = _number if 'rank' in key else _nats if 'entropy' in key else _percent
            cell = lambda results, name=name, key=key, show=show: (
                show(results[name].scalars[key])
                if name in results and key in results[name].scalars
                else '–'
            )
            shown = '–' if interval is None else f'{show(interval[0])} … {show(interval[1])}'
            out.append(
                [
                    _label(name, key, len(told) == 1),
                    show(value),
                    shown,
                    *[cell(r.results) for r in beside],
                    cell(run.baseline),
                    '–' if chance is None else show(chance),
                ]
            )
    return header, out


def table(
    workdir: str | os.PathLike, others: Sequence[str | os.PathLike] = (), width: int = 0
) -> str:
    """The results table as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    header, body = rows(Run(workdir), [Run(o) for o in others])
    out = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        out.add_column(name, justify='left' if i == 0 else 'right', no_wrap=i == 0)
    for row in body:
        out.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=width or 110 + 16 * len(others)).print(out)
    return text.getvalue().rstrip()


def _label(name: str, key: str, alone: bool) -> str:
    *pair, last = key.split('/')
    words = ' '.join(
        [name.replace('_', ' '), *[p.replace('_to_', ' → ').replace('_', ' ') for p in pair]]
    )
    return words if last == 'accuracy' and alone else f'{words} {last.replace("_", " ")}'


def _percent(x: float) -> str:
    return f'{100 * x:.1f} %'


def _number(x: float) -> str:
    return f'{x:.1f}'


def _nats(x: float) -> str:
    return f'{x:.2f} nats'


def _json(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # a line that a kill cut short


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


# ---- sections


def _facts(run: Run) -> str:
    c = run.config
    order = run.done.get('order', '')
    facts = [
        f'{run.done.get("step", "–")} steps of {c["batch_size"]} clips',
        f'seed {c["seed"]}',
        f'objective {c["objective"]["name"]}',
        f'{run.done.get("skipped_steps", 0)} steps skipped',
        f'{run.done.get("corrupt_records", 0)} unreadable records',
        *([f'order {order[:12]}'] if order else []),
    ]
    return f'<p class="facts">{_text(" · ".join(facts))}</p>'


def _html_table(content: tuple[list[str], list[list[str]]]) -> str:
    header, body = content
    if not body:
        return '<p>No evaluation yet: run with --mode=eval.</p>'
    head = ''.join(f'<th>{_text(h)}</th>' for h in header)
    lines = ''.join('<tr>' + ''.join(f'<td>{_text(c)}</td>' for c in row) + '</tr>' for row in body)
    return f'<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _curves(run: Run, beside: Sequence[Run]) -> str:
    names = sorted({k for m in run.metrics for k in m if k == 'loss' or k.startswith('loss/')})
    charts = []
    lines = [(n, [(m['step'], m[n]) for m in run.metrics if n in m]) for n in names]
    charts.append(_chart('loss', lines))
    if beside:
        curve = lambda r: (r.name, [(m['step'], m['loss']) for m in r.metrics if 'loss' in m])
        charts.append(_chart('loss, runs side by side', [curve(r) for r in (run, *beside)]))
    for key, title in (
        ('lr', 'learning rate'),
        ('grad_norm', 'gradient norm'),
        ('clips_per_s', 'clips per second'),
    ):
        charts.append(
            _chart(title, [(title, [(m['step'], m[key]) for m in run.metrics if key in m])])
        )
    return f'<div class="charts">{"".join(charts)}</div>'


def _chart(title: str, lines: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """One SVG line chart; points that are not finite are left out."""
    lines = [
        (n, [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)])
        for n, points in lines
    ]
    points = [p for _, ps in lines for p in ps]
    if not points:
        return ''
    width, height, left, bottom = 430, 230, 66, 26
    x_high = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1
    low, high = low - pad, high + pad
    at = lambda x, y: (
        f'{left + x / x_high * (width - left - 10):.1f},{12 + (high - y) / (high - low) * (height - bottom - 12):.1f}'
    )
    parts = []
    for i in range(5):
        y = low + (high - low) * i / 4
        px, py = at(0, y).split(',')
        parts.append(
            f'<line x1="{px}" y1="{py}" x2="{width - 10}" y2="{py}" class="grid"/><text x="{left - 6}" y="{float(py) + 4}" '
            f'text-anchor="end">{y:.3g}</text>'
        )
    for x in (0, x_high / 2, x_high):
        px = at(x, low).split(',')[0]
        parts.append(
            f'<text x="{px}" y="{height - 8}" text-anchor="{"end" if x == x_high else "middle"}">{x:.0f}</text>'
        )
    for (_, ps), color in zip(lines, COLORS):
        parts.append(
            f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{" ".join(at(*p) for p in ps)}"/>'
        )
    legend = (
        ''.join(
            f'<span style="color:{color}">— {_text(n)}</span> '
            for (n, _), color in zip(lines, COLORS)
        )
        if len(lines) > 1
        else ''
    )
    return (
        f'<figure><figcaption>{_text(title)} {legend}</figcaption><svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}'
        '</svg></figure>'
    )


def _gallery(run: Run) -> str:
    path = run.folder / 'gallery.npz' if run.folder else None
    if path is None or not path.exists():
        return ''
    with np.load(path) as arrays:
        document = json.loads(str(arrays['entries']))
        strips = {
            k.split('/')[1]: _png(np.concatenate(list(_some(arrays[k], 4)), 1))
            for k in arrays.files
            if k.startswith('frames/')
        }
        sounds = {
            k.split('/')[1]: _wav(arrays[k], document['rate'])
            for k in arrays.files
            if k.startswith('audio/')
        }
    clips, out = document['clips'], []
    for query in dict.fromkeys(e['query'] for e in document['entries']):
        blocks = []
        for e in (e for e in document['entries'] if e['query'] == query):
            own = str(e['index'])
            asked = (
                f'<audio controls preload="none" src="{sounds[own]}"></audio>'
                if query == 'audio' and own in sounds
                else ''
            )
            said = clips[own]['caption'] or ' / '.join(clips[own]['sentences'])
            asked += f'<q>{_text(said)}</q> <small>own clip came at rank {e["rank"]:g}</small>'
            cells = ''.join(
                f'<div class="clip{" right" if i == e["index"] else ""}"><img alt="" src="{strips[str(i)]}"><small>'
                f'{_text(clips[str(i)]["caption"] or clips[str(i)]["id"])}</small></div>'
                for i in e['top']
                if str(i) in strips
            )
            blocks.append(
                f'<section class="query"><p>{asked}</p><div class="found">{cells}</div></section>'
            )
        out.append(f'<h3>{_text(query)} → video</h3>{"".join(blocks)}')
    return (
        '<h2>Retrievals</h2><p>Queries spaced evenly over the held-out gallery; the five nearest clips, four frames each, the nearest '
        f'first. A green frame is the clip the query belongs to.</p>{"".join(out)}'
    )


def _clusters(run: Run) -> str:
    path = run.folder / 'clusters.npz' if run.folder else None
    if path is None or not path.exists():
        return ''
    with np.load(path) as arrays:
        document = json.loads(str(arrays['entries']))
        strips = {
            int(k.split('/')[1]): _png(np.concatenate(list(_some(arrays[k], 4)), 1))
            for k in arrays.files
            if k.startswith('frames/')
        }
    out = []
    for c in document['clusters']:
        cells = ''.join(
            f'<div class="clip"><img alt="" src="{strips[i]}"></div>'
            for i in c['clips']
            if i in strips
        )
        out.append(
            f'<section class="query"><p>{_text(c["name"])}</p><div class="found">{cells}</div></section>'
        )
    return (
        f'<h2>Clusters</h2><p>The five clips that the model is surest of, for the largest clusters ({_text(document["evaluator"])}). In brackets '
        f'the class that the best one-to-one matching gives the cluster.</p>{"".join(out)}'
    )


def _similarity(run: Run) -> str:
    out = []
    for name, result in run.results.items():
        for key, matrix in result.artifacts.items():
            if (
                key.endswith('/similarity')
                and key.partition('_to_')[2].startswith('video')
                and name == 'retrieval'
            ):
                x = np.asarray(matrix, np.float32)[:128, :128]
                x = (x - x.min()) / max(1e-6, float(x.max() - x.min()))
                image = np.stack([255 - 225 * x, 255 - 155 * x, 255 - 60 * x], -1).astype(np.uint8)
                out.append(
                    f'<figure><figcaption>{_text(key.split("/")[0].replace("_to_", " → "))}</figcaption><img class="matrix" alt="" '
                    f'src="{_png(image)}"></figure>'
                )
    return (
        (
            '<h2>Similarity</h2><p>The first 128 clips of the gallery, query by row: what belongs together is the diagonal.</p><div class="charts">'
            f'{"".join(out)}</div>'
        )
        if out
        else ''
    )


def _confusion(run: Run) -> str:
    out = []
    for name, result in run.results.items():
        matrix, classes = result.artifacts.get('confusion'), result.artifacts.get('classes') or []
        wanted = name.startswith('probe') or 'cluster_class' in result.artifacts
        if matrix is None or not wanted or len(matrix) > 40 or 'simple' in name or 'single' in name:
            continue
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        names = [classes[i] if i < len(classes) else str(i) for i in range(len(matrix))]
        lines = ''.join(
            f'<tr><th>{_text(n)}</th>'
            + ''.join(
                f'<td title="{_text(n)} taken for {_text(m)}: {count}" style="background:rgba(37,99,235,{s:.2f})">{count or ""}</td>'
                for m, s, count in zip(names, row, counts)
            )
            + '</tr>'
            for n, row, counts in zip(names, share, matrix.tolist())
        )
        out.append(
            f'<figure><figcaption>{_text(name.replace("_", " "))}: true class by row, predicted by column in the same order</figcaption>'
            f'<table class="confusion">{lines}</table></figure>'
        )
    return f'<h2>Confusions</h2>{"".join(out)}' if out else ''


def _stages(run: Run) -> str:
    if not run.timings:
        return ''
    lines = ''.join(
        f'<tr><td>{_text(k)}</td><td>{v / 60:.1f} min</td></tr>' for k, v in run.timings.items()
    )
    return f'<h2>Time</h2><table>{lines}</table>'


# ---- pictures and sounds as data URIs


def _some(frames: np.ndarray, n: int) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, n).astype(int)]


def _png(image: np.ndarray) -> str:
    """uint8 [H W 3] -> data URI. PNG is a zlib stream in three chunks, so no picture library is needed."""
    h, w, _ = image.shape
    raw = np.concatenate([np.zeros((h, 1), np.uint8), image.reshape(h, w * 3)], 1).tobytes()
    chunk = lambda kind, data: (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    )
    data = (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(raw, 9))
        + chunk(b'IEND', b'')
    )
    return 'data:image/png;base64,' + base64.b64encode(data).decode()


def _wav(samples: np.ndarray, rate: int) -> str:
    """int16 [S] -> data URI."""
    out = io.BytesIO()
    with wave.open(out, 'wb') as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(rate)
        f.writeframes(samples.astype('<i2').tobytes())
    return 'data:audio/wav;base64,' + base64.b64encode(out.getvalue()).decode()


NOTE = (
    '<p class="facts">Intervals are bootstrap percentiles over the held-out clips. Ties share their places, so a constant embedding scores '
    'chance. “random init” is the same network before training; “chance” is what guessing gives.</p>'
)
STYLE = """
body{margin:0;background:#fff;color:#1f2937;font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:32px 0 8px;border-bottom:1px solid #e5e7eb}h3{font-size:16px;margin:20px 0 4px}
.facts,small,figcaption{color:#6b7280;font-size:13px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:3px 12px;text-align:right;border-bottom:1px solid #f3f4f6}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:1px solid #9ca3af;font-weight:600}
td:nth-child(2){font-weight:600}td:nth-child(3){white-space:nowrap}
.charts{display:flex;flex-wrap:wrap;gap:16px}figure{margin:0}.charts figure{width:420px;max-width:100%}svg{width:100%}
svg text{font-size:11px;fill:#6b7280}.grid{stroke:#e5e7eb}
.matrix{width:100%;image-rendering:pixelated;border:1px solid #e5e7eb}
.query{margin:10px 0 16px}.query p{margin:0 0 4px}.query audio{height:28px;vertical-align:middle;margin-right:8px}
.found{display:flex;flex-wrap:wrap;gap:8px}.clip{width:200px}.clip img{width:100%;image-rendering:pixelated;border:3px solid transparent;
box-sizing:border-box}.clip.right img{border-color:#16a34a}.clip small{display:block;line-height:1.25}
.confusion{margin-bottom:16px}.confusion td{font-weight:400;padding:1px 4px;width:22px;text-align:center;font-size:12px}
.confusion th{font-weight:400;font-size:12px;padding:1px 8px}
pre{background:#f9fafb;padding:12px;overflow:auto;font-size:12px}
"""
