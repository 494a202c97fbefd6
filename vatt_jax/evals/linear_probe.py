"""A linear classifier on frozen features, and on two features that need no learning."""
from __future__ import annotations

import warnings

import numpy as np

from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import CHANGES, Result, View

DEFAULTS = {
    'type': 'linear_probe',
    'stream': 'video',      # whose pooled backbone feature (before the common spaces)
    'label': 'class',
    'train': 'train', 'test': 'test',     # splits
    'train_limit': 2400, 'test_limit': 768,
    'strengths': (0.01, 0.1, 1.0),        # of regularisation (scikit-learn's C), chosen on a fifth of the training part
    'change': '',           # a change of the input, for both parts
    'baseline': True,
}


class LinearProbe:
    """Accuracy of multinomial logistic regression on standardised features, with a 95 % bootstrap interval over test clips."""

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, DEFAULTS, where)

    def inputs(self, view: View, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(features [N D], labels [N]) of the examples that have both."""
        c = self.config
        f = view.features(split, limit=limit, change=c.change)
        if c.stream not in f['pooled']:
            raise ConfigError(f'linear probe: stream {c.stream!r} is not among {", ".join(f["pooled"])}')
        return _labelled(f['pooled'][c.stream], f['labels'], f['valid'][c.stream], c.label)

    def run(self, view: View) -> Result:
        c = self.config
        x, y = self.inputs(view, c.train, c.train_limit)
        x_test, y_test = self.inputs(view, c.test, c.test_limit)
        predicted, strength = fit_predict(x, y, x_test, c.strengths, view.seed)
        right = predicted == y_test
        classes = np.unique(np.concatenate([y, y_test]))
        confusion = np.zeros((classes.max() + 1,) * 2, np.int32)
        np.add.at(confusion, (y_test, predicted), 1)
        shares = np.bincount(y_test) / len(y_test)
        return Result({'accuracy': float(right.mean()), 'C': float(strength)},
                      {'accuracy/interval': statistics.bootstrap(right, seed=view.seed), 'accuracy/chance': float(shares.max()),
                       'confusion': confusion, 'classes': view.data.info['labels'].get(c.label, []),
                       'train': len(y), 'test': len(y_test)})


class SimpleProbe(LinearProbe):
    """The same probe on features nobody had to learn: mean and deviation of each colour channel over the clip, and the log of the
    mean magnitude spectrum of its sound. What a representation adds must be seen above these."""

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, {**DEFAULTS, 'type': 'simple_probe', 'baseline': False}, where)

    def inputs(self, view, split, limit):
        c = self.config
        xs, ys, keep = [], [], []
        batches = view.data.one_pass(split, view.batch_size, process=view.process, limit=limit)
        from vatt_jax.encoder import gather_rows
        for batch in map(CHANGES[c.change], batches) if c.change else batches:
            if c.stream not in batch:
                raise ConfigError(f'simple probe: the data has no stream {c.stream!r}')
            if c.label not in batch.get('labels', {}):
                raise ConfigError(f'simple probe: label {c.label!r} is not among {", ".join(batch.get("labels", {})) or "no labels"} of the data')
            data = batch[c.stream]['data']
            row = {'x': mean_color(data) if c.stream.startswith('video') else mean_spectrum(data), 'y': batch['labels'][c.label],
                   'ok': batch['valid'] & batch[c.stream]['valid']}
            row = gather_rows(row, tuple(row))
            xs.append(row['x']), ys.append(row['y']), keep.append(row['ok'])
        return _labelled(np.concatenate(xs), {c.label: np.concatenate(ys)}, np.concatenate(keep), c.label)


def mean_color(frames: np.ndarray) -> np.ndarray:
    """uint8 [B T H W 3] -> float32 [B 6]."""
    x = frames.astype(np.float32).reshape(len(frames), -1, 3)
    return np.concatenate([x.mean(1), x.std(1)], -1)


def mean_spectrum(samples: np.ndarray, bands: int = 128) -> np.ndarray:
    """int16 [B S] -> float32 [B bands]: log of the magnitude spectrum averaged over windows of 2·bands samples."""
    n = 2 * bands
    x = samples[:, :samples.shape[1] // n * n].astype(np.float32).reshape(len(samples), -1, n) / 32768
    return np.log(1e-3 + np.abs(np.fft.rfft(x * np.hanning(n)))[..., 1:].mean(1)).astype(np.float32)


def _labelled(x, labels, valid, name):
    if name not in labels:
        raise ConfigError(f'linear probe: label {name!r} is not among {", ".join(labels) or "no labels"} of the data')
    y = np.asarray(labels[name])
    if y.ndim != 1:
        raise ConfigError(f'linear probe: label {name!r} is multi-hot; a single class per example is wanted')
    use = valid & (y >= 0)
    if use.sum() < 2 or len(np.unique(y[use])) < 2:
        raise ConfigError(f'linear probe: label {name!r} has {int(use.sum())} labelled examples of {len(np.unique(y[use]))} classes; two are needed')
    return np.asarray(x, np.float32)[use], y[use].astype(np.int64)


def fit_predict(x, y, x_test, strengths, seed: int) -> tuple[np.ndarray, float]:
    """(predicted labels of x_test, the chosen C)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    make = lambda c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)  # 200 iterations are enough to rank strengths
        best = strengths[0]
        if len(strengths) > 1:
            smallest = np.bincount(y)[np.bincount(y) > 0].min()
            stratify = y if smallest > 1 and len(y) >= 10 * len(np.unique(y)) else None
            parts = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=stratify)
            best = max(strengths, key=lambda c: make(c).fit(parts[0], parts[2]).score(parts[1], parts[3]))
        return make(best).fit(x, y).predict(x_test), best
