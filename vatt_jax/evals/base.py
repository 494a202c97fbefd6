"""What an evaluator is, and the features they share.

An evaluator is a subclass of `Evaluator`, registered in `vatt_jax/evals/__init__.py` and configured
by an entry of `config.evals`. The same object runs during training and by `--mode=eval`. Evaluators
ask `view` for features; equal requests are computed once per evaluation, so adding an evaluator on
the same split costs no second pass.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Shaped

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.evals.changes import change_of
from vatt_jax.inference.feature_extractor import FeatureExtractor, Stage, compute_features
from vatt_jax.inputs import tokenizer
from vatt_jax.inputs.batch import modality_of


@dataclasses.dataclass
class Result:
    """What an evaluator found.

    Attributes:
      scalars: name -> number (logged as `<evaluator>/<name>`).
      artifacts: name -> NumPy array or JSON-able value for the report (saved with the evaluation,
        never logged).
      remarks: sentences about the numbers that are said with them (neither saved nor logged).
    """

    scalars: dict[str, float]
    artifacts: dict[str, Any] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Sentences:
    """Sentences in the common spaces.

    Attributes:
      embeddings: space -> [N E], of unit length.
      is_known: bool [N]: whether any word is one of the vocabulary.
    """

    embeddings: dict[str, Float[np.ndarray, 'N E']]
    is_known: Bool[np.ndarray, ' N']


class FeatureView:
    """Features of dataset splits under one encoder.

    They are computed on first use and remembered while the evaluation lasts.

    Attributes:
      encoder: the frozen model.
      data: the data object of docs/architecture.md.
      batch_size: global.
      process: (index, count) of this host among all.
      seed: of everything that evaluators draw.
      open_run: run folder -> the frozen model of that run.
    """

    def __init__(
        self,
        encoder: FeatureExtractor,
        data: Any,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        seed: int = 0,
        open_run: Callable[[str], FeatureExtractor] | None = None,
    ) -> None:
        self.encoder = encoder
        self.data = data
        self.batch_size = batch_size
        self.process = process
        self.seed = seed
        self.open_run = open_run
        # Never emptied: a FeatureView lives as long as one evaluation.
        self._computed: dict[str, dict[str, Any]] = {}
        self._of_runs: dict[str, FeatureView] = {}

    def of_run(self, run: str) -> FeatureView:
        """The same data under the model of another run.

        Args:
          run: one of those that `Evaluator.other_runs` names.
        """
        if run not in self._of_runs:
            assert self.open_run is not None, 'a view of one model alone'
            self._of_runs[run] = FeatureView(
                self.open_run(run), self.data, self.batch_size, self.process, self.seed
            )
        return self._of_runs[run]

    def features(
        self,
        split: str,
        *,
        by: str = 'segments',
        views: Mapping[str, Any] | None = None,
        change: str = '',
        limit: int | None = None,
        keep: tuple[str, ...] = (),
        maps: tuple[str, ...] = (),
        stages: tuple[Stage, ...] = (),
        window: Mapping[str, Any] | None = None,
        draw: str = '',
    ) -> dict[str, Any]:
        """Features of a split.

        Args:
          split: name of the split.
          by: what an example is; see the data object.
          views: extra streams, as config.data.views.
          change: see `changes.change_of`; '': none.
          limit: number of examples, the first of the split; None: all.
          keep: see `feature_extractor.compute_features`.
          maps: see `feature_extractor.compute_features`.
          stages: see `feature_extractor.compute_features`.
          window: see `one_pass` of the data object.
          draw: windows, crops and flips as in training, other ones for every name; '': the middle
            ones.

        Returns:
          See `feature_extractor.compute_features`.
        """
        # JSON as key, because views and windows are dicts, which do not hash. `default=dict` is for
        # ConfigDicts; tuples and lists give the same key.
        request = [split, by, views, change, limit, keep, maps, stages, window, draw]
        key = json.dumps(request, sort_keys=True, default=dict)
        if key not in self._computed:
            batches = self.data.one_pass(
                split,
                self.batch_size,
                process=self.process,
                by=by,
                views=views,
                limit=limit,
                window=window,
                augment=bool(draw),
                draw=draw,
            )
            # After loading and before the device stage: frames are still uint8, sound int16.
            if change:
                batches = map(change_of(change), batches)
            self._computed[key] = compute_features(self.encoder, batches, keep, maps, stages)
        return self._computed[key]

    def sentences(self, texts: Sequence[str]) -> Sentences:
        """Embeddings of sentences that are none of the data's.

        Args:
          texts: N of them; every process gives the same.

        Raises:
          ConfigError: the data have no tokenizer.
        """
        spec = self.data.info.get('tokenizer')
        if not spec:
            raise ConfigError('config.evals: the data have no tokenizer; leave this evaluator out')
        encode = tokenizer.from_spec(spec)
        words = encode.encode(list(texts), self.encoder.config.model.inputs.text.words)  # [N L]
        unknown = getattr(encode, 'unknown', tokenizer.UNKNOWN)
        is_known = ((words != tokenizer.PAD) & (words != unknown)).any(-1)

        index, count = self.process
        local_size = self.batch_size // count
        parts = []
        for begin in range(0, len(texts), self.batch_size):
            rows = np.arange(begin + index * local_size, begin + (index + 1) * local_size)
            is_real = rows < len(texts)
            data = np.where(is_real[:, None], words[np.minimum(rows, len(texts) - 1)], 0)[:, None]
            stream = {'data': data, 'mask': (data != 0).any(-1), 'valid': is_real}
            features = self.encoder({'text': stream, 'position': rows, 'valid': is_real})
            spaces = features['spaces']
            parts.append({name: x['text'][:, 0] for name, x in spaces.items() if 'text' in x})
        embeddings = {}
        for name in parts[0]:
            # The last batch is padded.
            embeddings[name] = np.concatenate([part[name] for part in parts])[: len(texts)]
        return Sentences(embeddings, is_known)


# What every message about a missing split, label, stream or space ends with.
REMEDY = (
    'name another, or leave this evaluator out of config.evals '
    "(--config.evals=\"{'NAME': {'type': …}}\" replaces them all)"
)
# Checked for every evaluator that has them.
POSITIVE_FIELDS = (
    'limit',
    'query_limit',
    'gallery_limit',
    'train_limit',
    'test_limit',
    'windows',
    'crops',
    'epochs',
    'iterations',
    'shots',
)


class Evaluator:
    """A question to frozen encoders, answered in numbers.

    Attributes:
      DEFAULTS: the fields of its config entry.
      config: the resolved entry of `config.evals`.
      where: path of the entry, for messages.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        self.config = with_defaults(config, self.DEFAULTS, where)
        self.where = where

    def check(self, data: Any, outputs: Any) -> None:
        """Check the config entry against the data and the model before anything is computed.

        Args:
          data: the data object of docs/architecture.md.
          outputs: the model's Outputs; abstract ones do.

        Raises:
          ConfigError: for a number out of range, or for a split, label, stream or space that the
            data or the model lack.
        """
        c = self.config
        for field in POSITIVE_FIELDS:
            # The default of 1 passes: not every evaluator has the field.
            if c.get(field, 1) < 1:
                raise ConfigError(
                    f'{self.where}.{field}: expected a positive number, got {c[field]}.'
                )
        # 0 clusters: as many as classes; 0 captions: all; negative seconds: before.
        for field, low in (('clusters', 0), ('captions', 0), ('seconds', -math.inf)):
            check_range(c.get(field, 0), low, math.inf, f'{self.where}.{field}')
        for strength in c.get('strengths', ()):
            # `not > 0` instead of `<= 0`, which NaN would pass.
            if not isinstance(strength, (int, float)) or not strength > 0:
                raise ConfigError(
                    f'{self.where}.strengths: expected positive numbers, got {c.strengths}.'
                )
        for field in ('split', 'train', 'test'):
            if field in c and not data.size(c[field], 'segments'):
                raise ConfigError(
                    f'{self.where}.{field}={c[field]!r}: the data have no such split; {REMEDY}'
                )
        labels = data.info.get('labels', {})
        if 'label' in c and c.label not in labels:
            raise ConfigError(
                f'{self.where}.label={c.label!r}: the data have '
                f'{", ".join(labels) or "no labels"}; {REMEDY}'
            )

    def other_runs(self) -> dict[str, tuple[str, ...]]:
        """Fields that name another run whose model is read too -> the streams that it encodes."""
        return {}

    def run(self, view: FeatureView) -> Result:
        """Evaluate the encoder behind `view`."""
        raise NotImplementedError


def check_spaces(pairs: Iterable[tuple[str, str, str]], outputs: Any, where: str) -> None:
    """Raise ConfigError unless the model embeds both streams of each pair in the pair's space.

    Args:
      pairs: (query, gallery, space) each.
      outputs: the model's Outputs; abstract ones do.
      where: path of the evaluator's entry.
    """
    spaces = {
        # By modality: views such as audio.shifted go through the projection of their modality, but
        # are not in the batch that the model is built with.
        space: {modality_of(stream) for stream in streams}
        for space, streams in outputs.spaces.items()
    }
    for query, gallery, space in pairs:
        if {modality_of(query), modality_of(gallery)} <= spaces.get(space, set()):
            continue
        descriptions = [f'{name}: {", ".join(sorted(found))}' for name, found in spaces.items()]
        raise ConfigError(
            f'{where}: {query} and {gallery} do not meet in space {space!r}; '
            f'spaces are {"; ".join(descriptions) or "none"}; {REMEDY}'
        )


def single_class_labels(features: Mapping[str, Any], name: str, evaluator: str) -> np.ndarray:
    """int [N]: the label `name` of each example, -1 where it has none.

    Raises:
      ConfigError: if the data have no such label, or examples may have several of its classes.
    """
    labels = features['labels']
    # [N] for one class, multi-hot [N P] for several.
    if name not in labels or labels[name].ndim != 1:
        available = [key for key, values in labels.items() if values.ndim == 1]
        raise ConfigError(
            f'{evaluator}: label {name!r} is not among the single-class labels of the data '
            f'({", ".join(available) or "none"})'
        )
    return labels[name]


def has_label(labels: Shaped[np.ndarray, 'N ...']) -> Bool[np.ndarray, ' N']:
    """Whether examples have a class; -1, or a multi-hot row of zeros, is none."""
    if labels.ndim == 1:
        return labels >= 0
    return np.asarray((labels > 0).any(-1))


def count_unlabelled(
    result: Result, label: str, labelled: Mapping[str, Bool[np.ndarray, ' _']]
) -> None:
    """Adds to a result how many clips were left out because they have no label.

    Args:
      result: gets the number `unlabelled`, and a remark for each split that has any.
      label: its name.
      labelled: split -> which of its clips have the label.
    """
    result.artifacts['unlabelled'] = 0
    for split, is_labelled in labelled.items():
        count = int((~is_labelled).sum())
        result.artifacts['unlabelled'] += count
        if count:
            result.remarks.append(
                f'{count} of {len(is_labelled)} clips of split {split!r} have no label {label!r} '
                'and are left out'
            )


def features_over_windows(
    view: FeatureView, split: str, windows: int, crops: int = 1, **request: Any
) -> list[dict[str, Any]]:
    """`view.features` of several windows and crops of each example.

    Args:
      view: where features come from.
      split: name of the split.
      windows: number of windows, spaced linearly from an example's first to its last; 1: the middle
        one, if there is one crop too.
      crops: number of squares spaced along the frame's longer side (VATT: 4 windows, 3 crops); 1:
        the middle one.
      **request: other arguments of `view.features`.

    Returns:
      windows · crops features, all of the same examples in the same order.
    """
    if windows < 1 or crops < 1:
        raise ConfigError(
            f'config.evals: expected positive numbers, got windows={windows}, crops={crops}.'
        )
    if windows == crops == 1:
        # Without `window`, so that the request equals that of other evaluators and is shared with
        # them.
        return [view.features(split, **request)]
    # One pass over the data for each: clips are decoded anew, and memory holds features only.
    parts = []
    for number in range(windows):
        for crop in range(crops):
            window: dict[str, Any] = {'kind': 'window', 'number': number, 'of': windows}
            if crops > 1:
                window['crop'] = crop / (crops - 1)  # 0: one end of the longer side, 1: the other
            parts.append(view.features(split, window=window, **request))
    return parts
