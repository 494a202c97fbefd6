"""A classifier on frozen features, and on two features that need no learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import CHANGES, Result, View, over_windows
from vatt_jax.evals.solvers import SEVERAL, SOLVERS

DEFAULTS = {
    'type': 'linear_probe',
    'stream': 'video',  # whose pooled backbone feature (before the common spaces)
    'label': 'class',
    'train': 'train',
    'test': 'test',  # splits
    'folds': (),  # ((label, class), …): for each, clips of `train` with that class are tested, others learnt from; scores are averaged
    'train_limit': 2400,
    'test_limit': 768,
    'windows': 1,  # of each tested clip, spaced linearly over it (VATT: 4, MMV: 10); scores are averaged
    'passes': 0,  # over the clips to learn from, with windows, crops and flips drawn anew as in training (MMV: 10). 0: their middle windows
    'standardise': False,  # features to mean 0 and variance 1 over what is learnt from (MMV's SVM); logistic and mlp always do
    'solver': 'logistic',  # entry of evals/solvers.py: logistic | head (VATT's code) | svm (VATT, MMV) | mlp (MMV on AudioSet; several labels too)
    'strengths': (),  # of regularisation (scikit-learn's C), chosen on a fifth of the training part; (): the solver's own
    'epochs': 1000,  # head, mlp
    'change': '',  # a change of the input, for both parts
    'baseline': True,
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """x: [N W D], features of each window. labels: name -> [N …]. valid: bool [N], the stream is there."""

    x: np.ndarray
    labels: dict[str, np.ndarray]
    valid: np.ndarray


class LinearProbe:
    """Accuracy of a classifier on frozen features, with a 95 % bootstrap interval over test clips; mAP, AUC and d' where the label is multi-hot."""

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, DEFAULTS, where)
        choose(self.config.solver, SOLVERS, f'{where}.solver')
        if self.config.passes < 0:
            raise ConfigError(
                f'{where}.passes={self.config.passes}: a number of passes is wanted, or 0 for middle windows'
            )
        if self.config.passes > 1 and len(self.config.strengths) > 1:
            raise ConfigError(
                f'{where}.strengths={tuple(self.config.strengths)} with passes={self.config.passes}: the part that would choose among '
                'them holds other windows of the clips learnt from; give one strength, or passes=0'
            )

    def examples(
        self, view: View, split: str, limit: int, windows: int, passes: int = 0
    ) -> Examples:
        """Features of `passes` augmented passes where it is not 0, else of `windows` windows."""
        c = self.config
        if passes:
            parts = [
                view.features(split, limit=limit, change=c.change, draw=f'probe {i}')
                for i in range(passes)
            ]
        else:
            parts = over_windows(view, split, windows, limit=limit, change=c.change)
        if c.stream not in parts[0]['pooled']:
            raise ConfigError(
                f'linear probe: stream {c.stream!r} is not among {", ".join(parts[0]["pooled"])}'
            )
        return Examples(
            np.stack([f['pooled'][c.stream] for f in parts], 1),
            parts[0]['labels'],
            parts[0]['valid'][c.stream],
        )

    def parts(self, view: View) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """(x [N D], y [N] or [N P], x_test [N W D], y_test) for each fold; every pass over a clip is an example to learn from."""
        c = self.config
        several = c.solver in SEVERAL
        flat = lambda x, y: (x.reshape(-1, x.shape[-1]), np.repeat(y, x.shape[1], 0))
        learnt = self.examples(view, c.train, c.train_limit, 1, c.passes)
        if not c.folds:
            tested = self.examples(view, c.test, c.test_limit, c.windows)
            yield (
                *flat(*_labelled(learnt, c.label, several=several)),
                *_labelled(tested, c.label, several=several),
            )
            return
        tested = (
            learnt
            if c.windows == 1 and not c.passes
            else self.examples(view, c.train, c.train_limit, c.windows)
        )
        for name, kind in c.folds:
            classes = view.data.info['labels'].get(name, [])
            if kind not in classes or name not in learnt.labels or learnt.labels[name].ndim != 1:
                raise ConfigError(
                    f'linear probe: folds has ({name!r}, {kind!r}); the classes of that label are {", ".join(classes) or "none"}'
                )
            fold = learnt.labels[name]
            inside = fold == classes.index(kind)
            yield (
                *flat(*_labelled(learnt, c.label, (fold >= 0) & ~inside, several)),
                *_labelled(tested, c.label, inside, several),
            )

    def run(self, view: View) -> Result:
        c = self.config
        rights, shares, strengths, pairs, train, several = [], [], [], [], 0, []
        for x, y, x_test, y_test in self.parts(view):
            classes = y.shape[1] if y.ndim == 2 else int(max(y.max(), y_test.max())) + 1
            if c.standardise:
                x, x_test = _standardised(x, x_test)
            scores, strength = SOLVERS[c.solver](x, y, x_test, classes, c, view.seed)
            train += len(y)
            if y.ndim == 2:
                several.append((scores.mean(1), y_test))
                continue
            predicted = scores.mean(1).argmax(-1)
            rights.append(predicted == y_test)
            shares.append((np.bincount(y_test) / len(y_test)).max())
            strengths.append(strength)
            pairs.append(np.stack([y_test, predicted], 1))
        if several:
            scores, y_test = map(np.concatenate, zip(*several))
            scalars, artifacts = statistics.multi_label(scores, y_test, view.seed)
            return Result(scalars, {**artifacts, 'train': train, 'test': len(y_test)})
        pairs = np.concatenate(pairs)
        confusion = np.zeros((pairs.max() + 1,) * 2, np.int32)
        np.add.at(confusion, tuple(pairs.T), 1)
        scalars = {'accuracy': float(np.mean([r.mean() for r in rights]))}
        if strengths[0] is not None:
            scalars['C'] = float(np.mean(strengths))
        return Result(
            scalars,
            {
                'accuracy/interval': statistics.bootstrap(np.concatenate(rights), seed=view.seed),
                'accuracy/chance': float(np.mean(shares)),
                'confusion': confusion,
                'classes': view.data.info['labels'].get(c.label, []),
                'train': train,
                'test': len(pairs),
            },
        )


class SimpleProbe(LinearProbe):
    """The same probe on features nobody had to learn: mean and deviation of each colour channel over the clip, and the log of the
    mean magnitude spectrum of its sound. What a representation adds must be seen above these."""

    def __init__(self, config, where: str = 'config.evals'):
        super().__init__({'baseline': False, **config}, where)
        if self.config.windows != 1 or self.config.passes:
            raise ConfigError(
                f'{where}: windows={self.config.windows}, passes={self.config.passes}; a simple probe sees middle windows: set 1 and 0'
            )

    def examples(self, view, split, limit, windows, passes=0):
        c = self.config
        xs, labels, keep = [], [], []
        batches = view.data.one_pass(split, view.batch_size, process=view.process, limit=limit)
        from vatt_jax.inference.encoder import gather_rows

        for batch in map(CHANGES[c.change], batches) if c.change else batches:
            if c.stream not in batch:
                raise ConfigError(f'simple probe: the data has no stream {c.stream!r}')
            if c.label not in batch.get('labels', {}):
                raise ConfigError(
                    f'simple probe: label {c.label!r} is not among {", ".join(batch.get("labels", {})) or "no labels"} of the data'
                )
            data = batch[c.stream]['data']
            row = {
                'x': mean_color(data) if c.stream.startswith('video') else mean_spectrum(data),
                'ok': batch['valid'] & batch[c.stream]['valid'],
            }
            row |= {f'labels/{k}': v for k, v in batch['labels'].items()}
            row = gather_rows(row, tuple(row))
            xs.append(row.pop('x')), keep.append(row.pop('ok')), labels.append(row)
        found = {
            k.removeprefix('labels/'): np.concatenate([row[k] for row in labels]) for k in labels[0]
        }
        return Examples(np.concatenate(xs)[:, None], found, np.concatenate(keep))


def _standardised(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the means and deviations of x [N D]; a feature that is constant there stays."""
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale = lambda x: ((x - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    return scale(x), scale(x_test)


def _labelled(
    examples: Examples, name: str, part: np.ndarray | None = None, several: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(features [N W D], labels [N]) of the examples of `part` (bool [N]; None: all) that have both. several: labels may be multi-hot, [N P]."""
    if name not in examples.labels:
        raise ConfigError(
            f'linear probe: label {name!r} is not among {", ".join(examples.labels) or "no labels"} of the data'
        )
    y = np.asarray(examples.labels[name])
    if y.ndim != 1:
        if not several:
            raise ConfigError(
                f'linear probe: label {name!r} is multi-hot; a single class per example is wanted, or solver={SEVERAL[0]!r}'
            )
        use = examples.valid & (y > 0).any(-1) & (True if part is None else part)
        if use.sum() < 2:
            raise ConfigError(
                f'linear probe: label {name!r} has {int(use.sum())} labelled examples; two are needed'
            )
        return np.asarray(examples.x, np.float32)[use], (y[use] > 0).astype(np.float32)
    use = examples.valid & (y >= 0)
    use = use if part is None else use & part
    if use.sum() < 2 or len(np.unique(y[use])) < 2:
        raise ConfigError(
            f'linear probe: label {name!r} has {int(use.sum())} labelled examples of {len(np.unique(y[use]))} classes; two are needed'
        )
    return np.asarray(examples.x, np.float32)[use], y[use].astype(np.int64)


def mean_color(frames: np.ndarray) -> np.ndarray:
    """uint8 [B T H W 3] -> float32 [B 6]."""
    x = frames.astype(np.float32).reshape(len(frames), -1, 3)
    return np.concatenate([x.mean(1), x.std(1)], -1)


def mean_spectrum(samples: np.ndarray, bands: int = 128) -> np.ndarray:
    """int16 [B S] -> float32 [B bands]: log of the magnitude spectrum averaged over windows of 2·bands samples."""
    n = 2 * bands
    x = (
        samples[:, : samples.shape[1] // n * n].astype(np.float32).reshape(len(samples), -1, n)
        / 32768
    )
    return np.log(1e-3 + np.abs(np.fft.rfft(x * np.hanning(n)))[..., 1:].mean(1)).astype(np.float32)
