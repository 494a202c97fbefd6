"""A classifier on frozen features, and on two features that need no learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import several_streams, statistics
from vatt_jax.evals.base import (
    Evaluator,
    FeatureView,
    Result,
    count_unlabelled,
    features_over_windows,
    has_label,
    modality_of,
)
from vatt_jax.evals.changes import change_of
from vatt_jax.evals.solvers import SEVERAL, SOLVERS, strengths_of
from vatt_jax.inference.feature_extractor import gather_rows
from vatt_jax.inputs.modalities import PICTURES, kind_of


@dataclasses.dataclass(frozen=True)
class Examples:
    """Features of a split.

    Attributes:
      x: [N W D], features of each window; those of several streams side by side.
      labels: name -> [N …].
      valid: bool [N], all streams are there.
      widths: D of each stream; (): there is one.
    """

    x: np.ndarray
    labels: dict[str, np.ndarray]
    valid: np.ndarray
    widths: tuple[int, ...] = ()


class Fold(NamedTuple):
    """What one classifier learns from and is tested on.

    Attributes:
      x: [N D]; every pass over a clip is an example to learn from.
      y: int [N], or [N P] of 0 and 1 for several labels.
      x_test: [M W D].
      y_test: [M], or [M P].
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class LinearProbe(Evaluator):
    """Accuracy of a classifier on frozen features, with a 95 % bootstrap interval over test clips.

    mAP, AUC and d' where the label is multi-hot. Clips without the label or without the stream are
    left out; how many have no label is said.
    """

    DEFAULTS = {
        'type': 'linear_probe',
        # Whose pooled backbone feature (before the common spaces).
        'stream': 'video',
        # Each stream has a classifier of its own; their probabilities are averaged.
        **several_streams.BESIDE,
        'label': 'class',
        # Splits.
        'train': 'train',
        'test': 'test',
        # ((label, class), …): for each, clips of `train` with that class are tested, others learnt
        # from; scores are averaged.
        'folds': (),
        'train_limit': 2400,
        'test_limit': 768,
        # Of each tested clip, spaced linearly over it (VATT: 4, MMV: 10); scores are averaged.
        'windows': 1,
        # Over the clips to learn from, with windows, crops and flips drawn anew as in training
        # (MMV: 10). 0: their middle windows.
        'passes': 0,
        # Features to mean 0 and variance 1 over what is learnt from (MMV's SVM); logistic and mlp
        # always do.
        'standardise': False,
        # Entry of evals/solvers.py: logistic | head (VATT's code) | svm (VATT, MMV) | mlp (MMV on
        # AudioSet; several labels too)
        'solver': 'logistic',
        # Of regularisation (scikit-learn's C), chosen on a fifth of the training part; (): the
        # solver's own.
        'strengths': (),
        # head, mlp
        'epochs': 1000,
        # A change of the input, for both parts.
        'change': '',
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(several_streams.with_baseline(config), where)
        c = self.config
        choose(c.solver, SOLVERS, f'{where}.solver')
        several_streams.check_entry(c, where)
        if c.passes < 0:
            raise ConfigError(
                f'{where}.passes: expected a number of passes, or 0 for middle windows, got '
                f'{c.passes}.'
            )
        strengths = strengths_of(c.solver, c.strengths)
        if c.passes > 1 and len(strengths) > 1:
            raise ConfigError(
                f'{where}.strengths: expected at most one strength with passes={c.passes}, got '
                f'{strengths}: the part that would choose among them holds other windows '
                'of the clips learnt from. Give one strength, or passes=0.'
            )

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        several_streams.check_encoded(self.config, outputs, self.where)

    def other_runs(self) -> dict[str, tuple[str, ...]]:
        return several_streams.other_runs(self.config)

    def examples(
        self, view: FeatureView, split: str, limit: int, windows: int, passes: int = 0
    ) -> Examples:
        """Features of `passes` augmented passes where it is not 0, else of `windows` windows."""
        c = self.config

        def request(source: FeatureView, _: tuple[str, ...]) -> list[dict[str, Any]]:
            if not passes:
                return features_over_windows(source, split, windows, limit=limit, change=c.change)
            # The name of the draw keys the random windows, so probes with equal passes share
            # features.
            draws = [f'probe {i}' for i in range(passes)]
            return [source.features(split, limit=limit, change=c.change, draw=d) for d in draws]

        found = several_streams.features(view, c, request)
        several_streams.check_computed(found, 'pooled', 'linear probe')
        by_stream = []
        for stream, parts in found:
            by_stream.append(np.stack([part['pooled'][stream] for part in parts], 1))  # [N W D]
        return Examples(
            np.concatenate(by_stream, -1),
            found[0].windows[0]['labels'],
            several_streams.all_valid(found),
            tuple(x.shape[-1] for x in by_stream),
        )

    def parts(self, view: FeatureView) -> tuple[Examples, Examples]:
        """The clips to learn from and those to test on, before any are left out."""
        c = self.config
        # Learnt from one window (or random ones), tested on several, as published.
        train = self.examples(view, c.train, c.train_limit, 1, c.passes)
        if not c.folds:
            return train, self.examples(view, c.test, c.test_limit, c.windows)
        # Both parts of a fold are clips of the split `train`.
        if c.windows == 1 and not c.passes:
            # The middle windows, for both: one pass over the data.
            return train, train
        return train, self.examples(view, c.train, c.train_limit, c.windows)

    def folds(self, view: FeatureView, train: Examples, test: Examples) -> Iterator[Fold]:
        """What to learn from and to test on: one fold, or one for each entry of `folds`."""
        c = self.config
        several = c.solver in SEVERAL
        if not c.folds:
            yield _fold(
                *_labelled(train, c.label, several=several),
                *_labelled(test, c.label, several=several),
            )
            return

        for name, kind in c.folds:
            classes = view.data.info['labels'].get(name, [])
            if kind not in classes or name not in train.labels or train.labels[name].ndim != 1:
                raise ConfigError(
                    f'linear probe: folds has ({name!r}, {kind!r}); the classes of that label are '
                    f'{", ".join(classes) or "none"}'
                )
            fold_labels = train.labels[name]
            is_tested = fold_labels == classes.index(kind)
            # Clips without a fold (-1) belong to neither part.
            is_learnt_from = (fold_labels >= 0) & ~is_tested
            yield _fold(
                *_labelled(train, c.label, is_learnt_from, several),
                *_labelled(test, c.label, is_tested, several),
            )

    def run(self, view: FeatureView) -> Result:
        c = self.config
        num_train = 0
        targets = []
        scores = []
        scores_by_stream = []
        strengths: list[Any] = []
        train, test = self.parts(view)
        for fold in self.folds(view, train, test):
            x, y, x_test, y_test = fold
            if y.ndim == 2:
                num_classes = y.shape[1]
            else:
                num_classes = int(max(y.max(), y_test.max())) + 1
            # Anew for each fold, from what it learns from: nothing of its test clips leaks in.
            if c.standardise:
                x, x_test = _standardised(x, x_test)
            stream_scores, strength = self._solve(
                Fold(x, y, x_test, y_test), train.widths, num_classes, view.seed
            )
            scores.append(stream_scores.mean(0))  # [M P]
            scores_by_stream.append(stream_scores)
            targets.append(y_test)
            strengths.append(strength)
            # Examples, not clips: every pass counts.
            num_train += len(y)

        if targets[0].ndim == 2:
            all_targets = np.concatenate(targets)
            scalars, artifacts = statistics.multi_label(
                np.concatenate(scores), all_targets, view.seed
            )
            artifacts = {**artifacts, 'train': num_train, 'test': len(all_targets)}
            return self._with_unlabelled(Result(scalars, artifacts), train, test)
        scalars, artifacts = _accuracy(targets, scores, view.seed)
        if strengths[0] is not None:
            # The mean over folds, each of which chose for itself.
            scalars['C'] = float(np.mean(strengths))
        if c.beside:
            # What each stream reaches alone. Pairs: two networks may read streams of one name.
            alone = _accuracies_alone(targets, scores_by_stream)
            artifacts['accuracy/streams'] = list(zip((c.stream, *c.beside), alone, strict=True))
        artifacts['classes'] = view.data.info['labels'].get(c.label, [])
        artifacts['train'] = num_train
        artifacts['test'] = sum(len(y_test) for y_test in targets)
        return self._with_unlabelled(Result(scalars, artifacts), train, test)

    def _solve(
        self, fold: Fold, widths: tuple[int, ...], num_classes: int, seed: int
    ) -> tuple[Float[np.ndarray, 'streams M P'], Any]:
        """(scores of each stream's own classifier, the mean of their strengths or None)."""
        c = self.config
        ends = np.cumsum(widths)[:-1]
        columns = zip(np.split(fold.x, ends, -1), np.split(fold.x_test, ends, -1), strict=True)
        scores = []
        strengths: list[Any] = []
        for x, x_test in columns:
            window_scores, strength = SOLVERS[c.solver](
                x, fold.y, x_test, num_classes, c, seed
            )  # [M W P]
            scores.append(window_scores.mean(1))
            strengths.append(strength)
        mean_strength = None if strengths[0] is None else float(np.mean(strengths))
        return np.stack(scores), mean_strength

    def _with_unlabelled(self, result: Result, train: Examples, test: Examples) -> Result:
        """The result with how many clips had no label."""
        c = self.config
        # With folds, both are clips of one split.
        parts = {c.train: train} if c.folds else {c.train: train, c.test: test}
        labelled = {}
        for split, examples in parts.items():
            labelled[split] = has_label(examples.labels[c.label])[examples.valid]
        count_unlabelled(result, c.label, labelled)
        return result


class SimpleProbe(LinearProbe):
    """The same probe on features nobody had to learn.

    They are mean and deviation of each colour channel over the clip, and the log of the mean
    magnitude spectrum of its sound. What a representation adds must be seen above these.
    """

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        # These features do not depend on the model, so a second run on the untrained one would give
        # the same; an entry may still ask for it.
        super().__init__({'baseline': False, **config}, where)
        c = self.config
        if c.windows != 1 or c.passes:
            raise ConfigError(
                f'{where}: expected windows=1 and passes=0 (a simple probe sees middle windows), '
                f'got windows={c.windows} and passes={c.passes}.'
            )
        if c.beside:
            raise ConfigError(
                f'{where}.beside: expected none (a simple probe sees one stream), got '
                f'{tuple(c.beside)}.'
            )

    def check(self, data: Any, outputs: Any) -> None:
        # Not LinearProbe's: this probe reads the input, so the model need not encode the stream.
        Evaluator.check(self, data, outputs)

    def examples(
        self, view: FeatureView, split: str, limit: int, windows: int, passes: int = 0
    ) -> Examples:
        c = self.config
        batches = view.data.one_pass(split, view.batch_size, process=view.process, limit=limit)
        if c.change:
            batches = map(change_of(c.change), batches)
        features = []
        valid = []
        labels: dict[str, list[np.ndarray]] = {}
        for batch in batches:
            self._check_batch(batch)
            data = batch[c.stream]['data']
            # `data` is uint8 [B T H W C] or int16 [B S].
            is_video = kind_of(modality_of(c.stream)) == PICTURES
            columns = {
                'x': mean_color(data) if is_video else mean_spectrum(data),
                'valid': batch['valid'] & batch[c.stream]['valid'],
            }
            for name, values in batch['labels'].items():
                columns[f'labels/{name}'] = values
            # Every host gets the rows of all.
            columns = gather_rows(columns, tuple(columns))
            features.append(columns['x'])
            valid.append(columns['valid'])
            for name in batch['labels']:
                labels.setdefault(name, []).append(columns[f'labels/{name}'])
        # Rows that fill up the last batch stay, as not valid.
        x = np.concatenate(features)[:, None]  # [N 1 D]
        all_labels = {name: np.concatenate(values) for name, values in labels.items()}
        return Examples(x, all_labels, np.concatenate(valid))

    def _check_batch(self, batch: Any) -> None:
        """Raise ConfigError if the data lack the stream or the label."""
        c = self.config
        if c.stream not in batch:
            raise ConfigError(f'simple probe: the data has no stream {c.stream!r}')
        labels = batch.get('labels', {})
        if c.label not in labels:
            raise ConfigError(
                f'simple probe: label {c.label!r} is not among {", ".join(labels) or "no labels"} '
                'of the data'
            )


def _accuracy(
    targets: list[np.ndarray], scores: list[np.ndarray], seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(scalars, artifacts) of the folds' scores [M P] against their classes [M]."""
    correct = []
    chances = []
    pairs = []
    for y_test, fold_scores in zip(targets, scores):
        predicted = fold_scores.argmax(-1)
        correct.append(predicted == y_test)
        # Chance: always the most frequent class.
        chances.append((np.bincount(y_test) / len(y_test)).max())
        pairs.append(np.stack([y_test, predicted], 1))
    all_pairs = np.concatenate(pairs)  # [M 2]
    num_classes = all_pairs.max() + 1
    confusion = np.zeros((num_classes, num_classes), np.int32)
    # [class, predicted]; `add.at` counts repeated pairs, `+=` would not.
    np.add.at(confusion, tuple(all_pairs.T), 1)
    # Mean of the folds, as published; the interval below is over all their clips.
    scalars = {'accuracy': float(np.mean([is_correct.mean() for is_correct in correct]))}
    artifacts = {
        'accuracy/interval': statistics.bootstrap(np.concatenate(correct), seed=seed),
        'accuracy/chance': float(np.mean(chances)),
        'confusion': confusion,
    }
    return scalars, artifacts


def _accuracies_alone(targets: list[np.ndarray], scores: list[np.ndarray]) -> list[float]:
    """The mean accuracy over folds of each stream's scores [streams M P]."""
    by_fold = []
    for y_test, stream_scores in zip(targets, scores, strict=True):
        by_fold.append((stream_scores.argmax(-1) == y_test).mean(-1))  # [streams]
    return [float(accuracy) for accuracy in np.mean(by_fold, 0)]


def _fold(
    x: Float[np.ndarray, 'N W D'],
    y: Shaped[np.ndarray, 'N ...'],
    x_test: Float[np.ndarray, 'M W2 D'],
    y_test: Shaped[np.ndarray, 'M ...'],
) -> Fold:
    """A fold in which every window to learn from is an example of its own."""
    num_windows = x.shape[1]
    flat_x = x.reshape(-1, x.shape[-1])  # [N·W D]
    # Same order as the reshape: the windows of a clip are consecutive.
    return Fold(flat_x, np.repeat(y, num_windows, 0), x_test, y_test)


def _standardised(
    x: Float[np.ndarray, 'N D'], x_test: Float[np.ndarray, 'M W D']
) -> tuple[Float[np.ndarray, 'N D'], Float[np.ndarray, 'M W D']]:
    """Both with the means and deviations of x; a feature that is constant there stays."""
    # float32 sums over many rows lose digits.
    mean = x.mean(0, dtype=np.float64)
    deviation = x.std(0, dtype=np.float64)
    scale = np.where(deviation > 0, deviation, 1)
    standard = ((x - mean) / scale).astype(np.float32)
    standard_test = ((x_test - mean) / scale).astype(np.float32)
    return standard, standard_test


def _labelled(
    examples: Examples, name: str, part: np.ndarray | None = None, several: bool = False
) -> tuple[Float[np.ndarray, 'N W D'], Shaped[np.ndarray, 'N ...']]:
    """The examples that have both the stream and the label.

    Args:
      examples: of a split.
      name: of the label.
      part: bool [N], the examples to take; None: all.
      several: whether labels may be multi-hot.

    Returns:
      (features [N W D], labels [N] or, multi-hot, [N P]).
    """
    if name not in examples.labels:
        raise ConfigError(
            f'linear probe: label {name!r} is not among '
            f'{", ".join(examples.labels) or "no labels"} of the data'
        )
    x = np.asarray(examples.x, np.float32)
    y = np.asarray(examples.labels[name])
    # A copy, since it is changed in place.
    is_used = np.array(examples.valid, bool)
    if part is not None:
        is_used &= part
    if y.ndim != 1:
        if not several:
            raise ConfigError(
                f'linear probe: label {name!r} is multi-hot; expected a single class per example, '
                f'or solver={SEVERAL[0]!r}'
            )
        is_used &= has_label(y)
        if is_used.sum() < 2:
            raise ConfigError(
                f'linear probe: label {name!r} has {int(is_used.sum())} labelled examples; two are '
                'needed'
            )
        return x[is_used], (y[is_used] > 0).astype(np.float32)
    is_used &= has_label(y)
    num_classes = len(np.unique(y[is_used]))
    if is_used.sum() < 2 or num_classes < 2:
        raise ConfigError(
            f'linear probe: label {name!r} has {int(is_used.sum())} labelled examples of '
            f'{num_classes} classes; two are needed'
        )
    return x[is_used], y[is_used].astype(np.int64)


def mean_color(frames: Shaped[np.ndarray, 'B T H W C']) -> Float[np.ndarray, 'B 2*C']:
    """Mean and deviation of each channel: uint8 [B T H W C] -> float32 [B 2C]."""
    pixels = frames.astype(np.float32).reshape(len(frames), -1, frames.shape[-1])  # [B T·H·W C]
    return np.concatenate([pixels.mean(1), pixels.std(1)], -1)


def mean_spectrum(
    samples: Shaped[np.ndarray, 'B S'], bands: int = 128
) -> Float[np.ndarray, 'B bands']:
    """Log of the magnitude spectrum averaged over windows: int16 [B S] -> float32 [B bands]."""
    # A real transform of 2n samples gives n + 1 bins; without the constant, n.
    length = 2 * bands
    num_samples = samples.shape[1] // length * length  # whole windows only
    windows = samples[:, :num_samples].astype(np.float32).reshape(len(samples), -1, length)
    # int16 to [-1, 1); the Hann window keeps the cut ends from leaking into all bins.
    spectrum = np.fft.rfft(windows / 32768 * np.hanning(length))
    # Without the constant; 1e-3 bounds the logarithm of silence.
    magnitude = np.abs(spectrum)[..., 1:].mean(1)  # [B bands]
    return np.log(1e-3 + magnitude).astype(np.float32)
