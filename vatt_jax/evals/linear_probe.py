"""A classifier on frozen features, and on two features that need no learning."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import CHANGES, Result, View, over_windows
from vatt_jax.evals.solvers import SOLVERS

DEFAULTS = {
    'type': 'linear_probe',
    'stream': 'video',      # whose pooled backbone feature (before the common spaces)
    'label': 'class',
    'train': 'train', 'test': 'test',     # splits
    'folds': (),            # ((label, class), …): for each, clips of `train` with that class are tested, others learnt from; scores are averaged
    'train_limit': 2400, 'test_limit': 768,
    'windows': 1,           # of each tested clip, spaced linearly over it (VATT: 4); scores are averaged. Training sees the middle one
    'solver': 'logistic',   # entry of evals/solvers.py: logistic | head | svm (the last two as VATT's code has them)
    'strengths': (),        # of regularisation (scikit-learn's C), chosen on a fifth of the training part; (): the solver's own
    'epochs': 1000,         # head
    'change': '',           # a change of the input, for both parts
    'baseline': True,
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """x: [N W D], features of each window. labels: name -> [N …]. valid: bool [N], the stream is there."""
    x: np.ndarray
    labels: dict[str, np.ndarray]
    valid: np.ndarray


class LinearProbe:
    """Accuracy of a classifier on frozen features, with a 95 % bootstrap interval over test clips."""

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, DEFAULTS, where)
        choose(self.config.solver, SOLVERS, f'{where}.solver')

    def examples(self, view: View, split: str, limit: int, windows: int) -> Examples:
        c = self.config
        parts = over_windows(view, split, windows, limit=limit, change=c.change)
        if c.stream not in parts[0]['pooled']:
            raise ConfigError(f'linear probe: stream {c.stream!r} is not among {", ".join(parts[0]["pooled"])}')
        return Examples(np.stack([f['pooled'][c.stream] for f in parts], 1), parts[0]['labels'], parts[0]['valid'][c.stream])

    def parts(self, view: View) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """(x [N D], y [N], x_test [N W D], y_test [N]) for each fold."""
        c = self.config
        learnt = self.examples(view, c.train, c.train_limit, 1)
        if not c.folds:
            tested = self.examples(view, c.test, c.test_limit, c.windows)
            x, y = _labelled(learnt, c.label)
            yield x[:, 0], y, *_labelled(tested, c.label)
        tested = learnt if c.windows == 1 or not c.folds else self.examples(view, c.train, c.train_limit, c.windows)
        for name, kind in c.folds:
            classes = view.data.info['labels'].get(name, [])
            if kind not in classes or name not in learnt.labels or learnt.labels[name].ndim != 1:
                raise ConfigError(f'linear probe: folds has ({name!r}, {kind!r}); the classes of that label are {", ".join(classes) or "none"}')
            fold = learnt.labels[name]
            inside = fold == classes.index(kind)
            x, y = _labelled(learnt, c.label, (fold >= 0) & ~inside)
            yield x[:, 0], y, *_labelled(tested, c.label, inside)

    def run(self, view: View) -> Result:
        c = self.config
        rights, shares, strengths, pairs, train = [], [], [], [], 0
        for x, y, x_test, y_test in self.parts(view):
            classes = int(max(y.max(), y_test.max())) + 1
            scores, strength = SOLVERS[c.solver](x, y, x_test, classes, c, view.seed)
            predicted = scores.mean(1).argmax(-1)
            rights.append(predicted == y_test)
            shares.append((np.bincount(y_test) / len(y_test)).max())
            strengths.append(strength)
            pairs.append(np.stack([y_test, predicted], 1))
            train += len(y)
        pairs = np.concatenate(pairs)
        confusion = np.zeros((pairs.max() + 1,) * 2, np.int32)
        np.add.at(confusion, tuple(pairs.T), 1)
        scalars = {'accuracy': float(np.mean([r.mean() for r in rights]))}
        if strengths[0] is not None:
            scalars['C'] = float(np.mean(strengths))
        return Result(scalars, {
            'accuracy/interval': statistics.bootstrap(np.concatenate(rights), seed=view.seed), 'accuracy/chance': float(np.mean(shares)),
            'confusion': confusion, 'classes': view.data.info['labels'].get(c.label, []), 'train': train, 'test': len(pairs)})


class SimpleProbe(LinearProbe):
    """The same probe on features nobody had to learn: mean and deviation of each colour channel over the clip, and the log of the
    mean magnitude spectrum of its sound. What a representation adds must be seen above these."""

    def __init__(self, config, where: str = 'config.evals'):
        super().__init__({'baseline': False, **config}, where)
        if self.config.windows != 1:
            raise ConfigError(f'{where}.windows={self.config.windows}: a simple probe sees the middle window; set 1')

    def examples(self, view, split, limit, windows):
        c = self.config
        xs, labels, keep = [], [], []
        batches = view.data.one_pass(split, view.batch_size, process=view.process, limit=limit)
        from vatt_jax.encoder import gather_rows
        for batch in map(CHANGES[c.change], batches) if c.change else batches:
            if c.stream not in batch:
                raise ConfigError(f'simple probe: the data has no stream {c.stream!r}')
            if c.label not in batch.get('labels', {}):
                raise ConfigError(f'simple probe: label {c.label!r} is not among {", ".join(batch.get("labels", {})) or "no labels"} of the data')
            data = batch[c.stream]['data']
            row = {'x': mean_color(data) if c.stream.startswith('video') else mean_spectrum(data), 'ok': batch['valid'] & batch[c.stream]['valid']}
            row |= {f'labels/{k}': v for k, v in batch['labels'].items()}
            row = gather_rows(row, tuple(row))
            xs.append(row.pop('x')), keep.append(row.pop('ok')), labels.append(row)
        found = {k.removeprefix('labels/'): np.concatenate([row[k] for row in labels]) for k in labels[0]}
        return Examples(np.concatenate(xs)[:, None], found, np.concatenate(keep))


def _labelled(examples: Examples, name: str, part: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(features [N W D], labels [N]) of the examples of `part` (bool [N]; None: all) that have both."""
    if name not in examples.labels:
        raise ConfigError(f'linear probe: label {name!r} is not among {", ".join(examples.labels) or "no labels"} of the data')
    y = np.asarray(examples.labels[name])
    if y.ndim != 1:
        raise ConfigError(f'linear probe: label {name!r} is multi-hot; a single class per example is wanted')
    use = examples.valid & (y >= 0)
    use = use if part is None else use & part
    if use.sum() < 2 or len(np.unique(y[use])) < 2:
        raise ConfigError(f'linear probe: label {name!r} has {int(use.sum())} labelled examples of {len(np.unique(y[use]))} classes; two are needed')
    return np.asarray(examples.x, np.float32)[use], y[use].astype(np.int64)


def mean_color(frames: np.ndarray) -> np.ndarray:
    """uint8 [B T H W 3] -> float32 [B 6]."""
    x = frames.astype(np.float32).reshape(len(frames), -1, 3)
    return np.concatenate([x.mean(1), x.std(1)], -1)


def mean_spectrum(samples: np.ndarray, bands: int = 128) -> np.ndarray:
    """int16 [B S] -> float32 [B bands]: log of the magnitude spectrum averaged over windows of 2·bands samples."""
    n = 2 * bands
    x = samples[:, :samples.shape[1] // n * n].astype(np.float32).reshape(len(samples), -1, n) / 32768
    return np.log(1e-3 + np.abs(np.fft.rfft(x * np.hanning(n)))[..., 1:].mean(1)).astype(np.float32)
