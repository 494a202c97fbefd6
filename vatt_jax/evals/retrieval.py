"""Zero-shot retrieval: does the right clip come first among N? (VATT paper, section 4.4.)"""

from __future__ import annotations

import numpy as np

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Result, View, over_windows

DEFAULTS = {
    'type': 'retrieval',
    'split': 'test',
    'limit': 512,  # clips in the gallery: the first of the split, so the gallery is fixed by the config
    'pairs': (
        ('text', 'video', 'vat'),
        ('video', 'text', 'vat'),
        ('audio', 'video', 'va'),
        ('video', 'audio', 'va'),
    ),  # query, gallery, space
    'change': '',  # a change of the input, such as single_frame (evals/base.py)
    'views': (),  # extra streams, as config.data.views: (('audio.shifted', {'kind': 'shift', 'seconds': 1.0}),)
    'baseline': True,  # also evaluate the random initialisation (controls need not)
    'windows': 1,  # of each clip, spaced linearly over it (VATT: 4)
    'pool': 'embeddings',  # over windows: embeddings (mean of those before normalisation) | similarities (mean of cosines)
}
POOLS = ('embeddings', 'similarities')


class Retrieval:
    """R@1, R@5, R@10 in [0, 1] and median rank (1 is best) for each pair, with 95 % bootstrap intervals over queries.

    A query stream `text` is the clip's annotated caption where the data has one (`text.caption`), else the normalised mean of its
    candidate sentences. Clips that lack either side are left out and counted. Ties share their places. With several windows both sides
    are pooled over those that have the modality, in either of VATT's ways.
    """

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, DEFAULTS, where)
        choose(self.config.pool, POOLS, f'{where}.pool')

    def run(self, view: View) -> Result:
        c = self.config
        parts = over_windows(
            view, c.split, c.windows, limit=c.limit, views=dict(c.views) or None, change=c.change
        )
        f = parts[0]
        scalars, artifacts = {}, {}
        for query, gallery, space in c.pairs:
            q, q_valid = _pooled(parts, space, query, c.pool)
            g, g_valid = _pooled(parts, space, gallery, c.pool)
            use = np.flatnonzero(q_valid & g_valid)
            if len(use) < 2:
                raise ConfigError(
                    f'retrieval {query} → {gallery}: only {len(use)} of {len(q)} clips of split {c.split!r} have both'
                )
            similarity = q[use] @ g[use].T
            rank = statistics.ranks(similarity)
            name = f'{query}_to_{gallery}'
            n = len(use)
            for k in (1, 5, 10):
                hit = statistics.hits(similarity, k)
                scalars[f'{name}/R@{k}'] = float(hit.mean())
                artifacts[f'{name}/R@{k}/interval'] = statistics.bootstrap(hit, seed=view.seed)
                artifacts[f'{name}/R@{k}/chance'] = min(1.0, k / n)
            scalars[f'{name}/median_rank'] = float(np.median(rank) + 1)
            artifacts[f'{name}/median_rank/interval'] = statistics.bootstrap(
                rank + 1, np.median, view.seed
            )
            artifacts[f'{name}/median_rank/chance'] = (n + 1) / 2
            artifacts[f'{name}/similarity'] = similarity.astype(np.float16)
            artifacts[f'{name}/clips'] = f['index'][use]
            artifacts[f'{name}/top'] = f['index'][use][
                np.argsort(-similarity, 1, kind='stable')[:, :5]
            ]
            artifacts[f'{name}/rank'] = rank + 1
            scalars[f'{name}/clips'] = float(n)
        return Result(scalars, artifacts)


class Sync:
    """Share of clips whose video is nearer to its own sound than to its own sound `seconds` away; chance is one half, ties are half."""

    DEFAULTS = {
        'type': 'sync',
        'split': 'test',
        'limit': 512,
        'seconds': 1.0,
        'space': 'va',
        'baseline': True,
    }

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, self.DEFAULTS, where)

    def run(self, view: View) -> Result:
        c = self.config
        f = view.features(
            c.split, limit=c.limit, views={'audio.shifted': {'kind': 'shift', 'seconds': c.seconds}}
        )
        (seen, use), *heard = (
            _stream(f, c.space, name) for name in ('video', 'audio', 'audio.shifted')
        )
        for _, valid in heard:
            use = use & valid
        if not use.any():
            raise ConfigError(
                f'sync: none of {len(use)} clips of split {c.split!r} has video and sound'
            )
        own, other = ((seen * x).sum(-1)[use] for x, _ in heard)
        right = (own > other) + 0.5 * (own == other)
        return Result(
            {'accuracy': float(right.mean())},
            {
                'accuracy/interval': statistics.bootstrap(right, seed=view.seed),
                'accuracy/chance': 0.5,
            },
        )


def _pooled(parts, space: str, name: str, pool: str) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings [N E], valid bool [N]) of a stream over windows. Dot products of two pooled sides are the cosine of the mean embeddings, or the
    mean over all pairs of windows of their cosines: cosines are linear in each unit vector, so these are averaged and not normalised again."""
    if len(parts) == 1:
        return _stream(parts[0], space, name)
    total, count = 0.0, 0.0
    for f in parts:
        x, valid = _stream(f, space, name)
        if pool == 'embeddings':
            x = x * _length(f, space, name)[:, None]
        total, count = total + np.where(valid[:, None], x, 0), count + valid
    mean = total / np.maximum(count, 1)[:, None]
    if pool == 'embeddings':
        mean = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return mean, count > 0


def _stream(f, space: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings [N E], valid bool [N]) of a stream in a common space."""
    members = f['spaces'].get(space, {})
    name = _actual(members, name)
    if name not in members:
        raise ConfigError(
            f'config.evals asks for stream {name!r} in space {space!r}, which has {", ".join(members) or "nothing"}'
        )
    x, valid = members[name], f['valid'][name]
    if x.ndim == 3:  # candidates [N K E]
        mask = f['mask'][name][..., None]
        x = np.where(mask, x, 0).sum(1)
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return x, valid


def _length(f, space: str, name: str) -> np.ndarray:
    """float [N]: length of the stream's embeddings before they were normalised; 1 for sentences, which are normalised one by one."""
    members = f['lengths'][space]
    length = members[_actual(members, name)]
    return length if length.ndim == 1 else np.ones(len(length))


def _actual(members, name: str) -> str:
    return 'text.caption' if name == 'text' and 'text.caption' in members else name
