"""What a user of trained encoders calls: vatt_jax.load(checkpoint).embed(video=…, audio=…,
text=…), and on the same model `similarity`, `classify` and `predict`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int16, Int32, UInt8
from ml_collections import ConfigDict

from vatt_jax import objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.importers import safetensors_folder
from vatt_jax.inference import arrays, feature_extractor, media_files, zero_shot
from vatt_jax.inference.arrays import FILES
from vatt_jax.inference.read_ahead import read_ahead
from vatt_jax.inputs import tokenizer
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint

# Which tower encodes a kind of input, where it is not called the same.
TOWERS = {'image': 'video'}
# How `repr` describes the inputs of each tower.
DESCRIPTIONS = {
    'video': '{frames} frames of {size}×{size} at {fps:g} fps',
    'audio': '{samples} samples at {rate} Hz',
    'text': 'sentences of up to {words} words',
}
# Files that are decoded side by side, where the machine has the cores.
MOST_FILES = 4
ON_ERROR = ('raise', 'skip')


def load(path: str | os.PathLike) -> Model:
    """The newest model of a run folder, or that of one checkpoint or safetensors folder.

    Averaged parameters where the run kept them. The checkpoint carries config, tokenizer and class
    names, so nothing else is needed.

    Args:
        path: the folder, or hf://owner/name[@revision] for a repository of the Hugging Face hub.

    Raises:
        ConfigError: no model can be read there.
    """
    if os.fspath(path).startswith('hf://'):
        from vatt_jax.exchange import hub

        path = hub.download(os.fspath(path))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1))
    path = pathlib.Path(path)
    if safetensors_folder.is_model_folder(path):
        config, variables, info = safetensors_folder.load_model(path, mesh)
        heads = None
    else:
        config, variables, info = checkpoint.load_model(path, mesh, objective=True)
        heads = variables.pop('objective')
    return Model(config, variables, info, mesh, heads, path)


@dataclasses.dataclass(frozen=True)
class _Request:
    """How inputs are read and encoded; the arguments of `Model.embed` of the same names."""

    call: str
    batch_size: int
    rate: Any
    windows: int | None
    stride: float | None
    on_error: str
    quiet: bool
    # Whether the sound of media files is encoded beside their pictures.
    takes_sound: bool = False

    @property
    def has_windows(self) -> bool:
        return self.windows is not None or self.stride is not None

    def where(self, name: str, value: Any = None, number: int | None = None) -> str:
        """The call and argument, for messages; `number` of an item of a list."""
        if isinstance(value, FILES):
            return f'{self.call}({name}={os.fsdecode(value)!r})'
        item = '' if number is None else f'[{number}]'
        return f'{self.call}({name}{item}=…)'


def _request(call: str, takes_sound: bool = False, **options: Any) -> _Request:
    """A request of checked options, which are the fields of `_Request`.

    Raises:
        ConfigError: one of them is of another kind or out of range.
    """
    _check_count('batch_size', options['batch_size'], call)
    if options['windows'] is not None:
        _check_count('windows', options['windows'], call)
    stride = options['stride']
    if stride is not None and not (arrays.is_number(stride) and 0 < stride < float('inf')):
        raise ConfigError(f'{call}(stride={stride!r}): expected a positive number of seconds')
    on_error = options['on_error']
    if on_error not in ON_ERROR:
        raise ConfigError(f'{call}(on_error={on_error!r}): expected one of {", ".join(ON_ERROR)}')
    return _Request(call, takes_sound=takes_sound, **options)


def _check_count(name: str, value: Any, call: str) -> None:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < 1:
        raise ConfigError(f'{call}({name}={value!r}): expected a whole number of 1 or more')


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One window of an item, as the encoder takes it.

    Attributes:
        start: seconds from the item's beginning.
        data: modality -> array.
        error: why there is nothing.
    """

    start: float
    data: Mapping[str, np.ndarray]
    error: str = ''


@dataclasses.dataclass
class _Rows:
    """Features of one modality, a row for each window of each item.

    Attributes:
        features: name -> [N ...].
        item: int32 [N], number of the item.
        start: float32 [N], seconds.
        valid: bool [N].
        is_single: whether a single item was given.
        tells_valid: whether some rows may be of nothing.
    """

    features: dict[str, np.ndarray]
    item: np.ndarray
    start: np.ndarray
    valid: np.ndarray
    is_single: bool
    tells_valid: bool = False

    def as_output(self, has_windows: bool) -> dict[str, np.ndarray]:
        """The features with what tells their rows apart."""
        out = dict(self.features)
        if self.tells_valid:
            out['valid'] = self.valid
        if has_windows:
            out['start'] = self.start
            if not self.is_single:
                out['item'] = self.item
        elif self.is_single:
            out = {key: rows[0] for key, rows in out.items()}
        return out


class Model:
    """A trained model.

    Args:
        config: the run's resolved config.
        variables: {'params', 'batch_stats'}.
        info: {'tokenizer', 'labels', …} of the data it was trained on.
        mesh: the devices it runs on.
        heads: parameters of the objective; those of a fine-tuned model are its classifier.
        path: the folder it was loaded from; its evaluation goes into model cards.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        info: Mapping[str, Any],
        mesh: Mesh,
        heads: Mapping[str, Any] | None = None,
        path: pathlib.Path | None = None,
    ):
        self.config, self.info, self.variables = config, info, variables
        self.path = path
        self.inputs = {name: dict(spec) for name, spec in config.model.inputs.items()}
        self.tokenizer = None
        if info.get('tokenizer'):
            self.tokenizer = tokenizer.from_spec(info['tokenizer'])
        self._classifier = None
        if heads and config.objective.name == 'classification':
            self._classifier = objectives.build(config.objective)
        self._encoder = feature_extractor.FeatureExtractor(
            config, variables, mesh, self._classifier, heads, {}
        )
        # What the user has been told: once is enough.
        self._told: set[str] = set()

    def __repr__(self) -> str:
        count = sum(np.size(x) for x in jax.tree.leaves(self.variables['params']))
        towers = []
        for name, spec in self.inputs.items():
            if name in self._encoder.modalities:
                towers.append(f'{name}: {DESCRIPTIONS[name].format(**spec)}')
        return f'<{self.config.name}: {count / 1e6:.2f} M parameters; {"; ".join(towers)}>'

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the model has trained towers for."""
        return self._encoder.modalities

    def export(self, folder: str | os.PathLike, licence: str = '') -> list[str]:
        """Writes each tower with its preprocessing as a program that JAX alone runs.

        The folder's `load.py` reads it without this package; README.md is a model card.

        Args:
            folder: to make.
            licence: of the weights, for the model card.

        Returns:
            The names of the files.

        Raises:
            ConfigError: the folder is there and not empty, or cannot be written.
        """
        from vatt_jax.exchange import artifact, model_card

        run = model_card.run_folder_of(self.path.absolute()) if self.path else None
        return artifact.write(
            folder, self.config, self.variables, self.info, self.modalities, run, licence
        )

    def push_to_hub(
        self,
        repository: str,
        licence: str = '',
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Uploads the checkpoint and a model card to the Hugging Face hub.

        Args:
            repository: owner/name; made where it is not there.
            licence: of the weights, for the model card.
            private: whether a new repository is only its owner's.
            token: of the hub; None: that of `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: the model was not loaded from a folder, or the hub refuses.
        """
        from vatt_jax.exchange import hub

        return hub.push(self, repository, licence, private, token)

    def paths(self) -> list[str]:
        """Parameter paths, as the patterns of config.optimizer and config.init_skip see them."""
        return jax.tree.leaves(optim.paths(self.variables['params']))

    # ---- what users ask

    def embed(
        self,
        video: Any = None,
        audio: Any = None,
        text: Any = None,
        image: Any = None,
        *,
        rate: Any = None,
        batch_size: Any = 32,
        windows: Any = None,
        stride: Any = None,
        on_error: str = 'raise',
        quiet: bool = False,
    ) -> dict[str, dict[str, np.ndarray]]:
        """Embeddings of clips, sounds, sentences and pictures.

        Of a clip longer than the model's window the middle is taken, unless `windows` or `stride`
        ask for several; a shorter one repeats, as in training.

        Args:
            video: RGB frames [T H W 3] at the model's own rate (`inputs['video']['fps']`), a batch
                [B T H W 3], or a list of clips of any T, H, W. uint8, or floats in [0, 1] or
                0…255; grey [T H W], RGBA [T H W 4] and [T 3 H W] too. A list of pictures (arrays,
                PIL) is one clip, resized to its first frame; one picture is a clip that shows
                nothing else. A path or a list of paths of media files is decoded (video extra) in
                constant memory; its sound is embedded too, from the same window, unless `audio` is
                given.
            audio: samples [S] at `rate` Hz: integers of 8, 16 or 32 bits or floats in [-1, 1]; a
                batch [B S], a list, or paths. Channels [S C] are mixed down. A pair of samples and
                rate, as readers of sound files return it, is one sound.
            text: a sentence or a list of sentences.
            image: pixels [H W 3], a batch [B H W 3], a list of pictures (arrays, PIL) or paths: the
                clip that shows nothing else. A deflated model (run.py --mode=deflate) computes one
                frame for it, a video model all of its own.
            rate: samples a second of `audio` (default `inputs['audio']['rate']`; others need the
                video extra).
            batch_size: items encoded at a time.
            windows: of each clip and sound so many windows, evenly from the first to the last; with
                `stride` at most so many.
            stride: seconds from the beginning of one window to the next.
            on_error: 'raise', or 'skip' an item that cannot be read: its rows are zeros, `valid`
                tells which, and a warning says why.
            quiet: no progress bar. There is one in terminals and notebooks, for several files.

        Returns:
            {modality: {'pooled': [B D], <common space>: [B E] of unit length}}, float32; without B
            where a single item was given. 'valid' bool [B] beside them where rows may be of
            nothing: the sound of several files or windows of them, and all that
            `on_error='skip'` covers. With
            `windows` or `stride` B counts windows, 'start' float32 [B] holds their seconds and, of
            lists, 'item' int32 [B] the number of the item.

        Raises:
            ConfigError: the model lacks a modality, or an input is of another kind or shape.
        """
        given = _given(video=video, audio=audio, text=text, image=image)
        takes_sound = audio is None and 'audio' in self._encoder.modalities
        options = {
            'rate': rate,
            'batch_size': batch_size,
            'windows': windows,
            'stride': stride,
            'on_error': on_error,
            'quiet': quiet,
        }
        request = _request('embed', takes_sound, **options)
        embedded = {}
        for name, rows in self._encode_inputs(given, request).items():
            rows.features = {k: v for k, v in rows.features.items() if k != 'logits'}
            embedded[name] = rows.as_output(request.has_windows and name in ('video', 'audio'))
        return embedded

    def similarity(
        self, a: Any, b: Any, space: str | None = None
    ) -> Float[np.ndarray, '...'] | np.float32:
        """Cosines of embeddings, in [-1, 1].

        Args:
            a: one modality of what `embed` returned, such as out['text'], or an array [A E].
            b: the same of what it is compared with.
            space: the common space; None: the only one that both have.

        Returns:
            float32 [A B], without A or B where a single item was given. -inf in rows and columns
            that are not valid, so that they come last in any ranking.

        Raises:
            ConfigError: both have no such space, or several and none is named.
        """
        x, y = _compared(a, b, space)
        cosines = _unit(np.atleast_2d(x)) @ _unit(np.atleast_2d(y)).T
        is_valid = _valid_rows(a, x)[:, None] & _valid_rows(b, y)
        cosines = np.where(is_valid, cosines, -np.inf)
        if y.ndim == 1:
            cosines = cosines[:, 0]
        return cosines[0] if x.ndim == 1 else cosines

    def classify(
        self,
        video: Any = None,
        audio: Any = None,
        image: Any = None,
        *,
        names: Any = None,
        templates: Any = zero_shot.TEMPLATES,
        space: str | None = None,
        rate: Any = None,
        batch_size: Any = 32,
        windows: Any = None,
        stride: Any = None,
        on_error: str = 'raise',
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Which of some classes a clip, sound or picture shows.

        With `names` zero-shot: the class whose sentences are nearest in a common space with text.
        Without, by the classifier of a fine-tuned model, see `predict`.

        Args:
            video: see `embed`. One of `video`, `audio` and `image` is given.
            audio: see `embed`.
            image: see `embed`.
            names: of P classes. Underscores and capitals inside a name separate its words.
            templates: sentences in which {} stands for the name; a class is the mean of its own.
            space: the common space; None: the only one with text.
            rate: see `embed`; the others too.
            batch_size: see `embed`.
            windows: see `embed`; a row for each window.
            stride: see `embed`.
            on_error: see `embed`.
            quiet: see `embed`.

        Returns:
            {'names': the P names, 'scores': float32 [B P], cosines or a classifier's
            probabilities, 'predicted': the best name of each row}, without B where a single item
            was given; 'valid', 'start' and 'item' as of `embed`.

        Raises:
            ConfigError: as of `embed`; or the model has no text, or without `names` no classifier.
        """
        options = {
            'rate': rate,
            'batch_size': batch_size,
            'windows': windows,
            'stride': stride,
            'on_error': on_error,
            'quiet': quiet,
        }
        given = _given(video=video, audio=audio, image=image)
        if names is None:
            return self._predict('classify', given, options)
        name = self._one_input(given, 'classify')
        if 'text' not in self._encoder.modalities:
            raise ConfigError(
                'classify(names=…): this model has no text tower; leave names out to read the '
                'classifier of a fine-tuned model'
            )
        sentences = zero_shot.prompts(names, templates, 'classify')
        names = zero_shot.check_names(names, 'classify')
        request = _request('classify', **options)
        rows = self._encode_inputs(given, request)[name]
        texts = self._encode_text(sentences, request, request.where('names'))
        spaces = {key: {'text'} for key in texts if key not in ('pooled', 'logits')}
        for key in set(spaces) & set(rows.features):
            spaces[key].add(TOWERS.get(name, name))
        space = zero_shot.common_space(spaces, TOWERS.get(name, name), space, 'classify')
        classes = zero_shot.class_embeddings(texts[space], len(names))
        rows.features = {'scores': rows.features[space] @ classes.T}
        return _as_classes(rows, names, name, request)

    def predict(
        self,
        video: Any = None,
        audio: Any = None,
        image: Any = None,
        *,
        rate: Any = None,
        batch_size: Any = 32,
        windows: Any = None,
        stride: Any = None,
        on_error: str = 'raise',
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Class scores of a fine-tuned model.

        Args:
            video: see `embed`; given is what the model was fine-tuned on.
            audio: see `embed`.
            image: see `embed`.
            rate: see `embed`; the others too.
            batch_size: see `embed`.
            windows: see `embed`; a row for each. Published figures average `logits` over them.
            stride: see `embed`.
            on_error: see `embed`.
            quiet: see `embed`.

        Returns:
            {'names': the P class names, 'logits': float32 [B P], 'scores': float32 [B P],
            probabilities (of each class for itself where a clip may have several), 'predicted':
            the most probable name of each row}, without B where a single item was given; 'valid',
            'start' and 'item' as of `embed`.

        Raises:
            ConfigError: as of `embed`; or the model was not fine-tuned.
        """
        options = {
            'rate': rate,
            'batch_size': batch_size,
            'windows': windows,
            'stride': stride,
            'on_error': on_error,
            'quiet': quiet,
        }
        return self._predict('predict', _given(video=video, audio=audio, image=image), options)

    def _predict(
        self, call: str, given: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = self._one_input(given, call)
        if self._classifier is None and self.config.objective.name == 'classification':
            raise ConfigError(
                f'{call}({name}=…): this folder holds the fine-tuned model without its classifier; '
                'load the run folder or one of its checkpoints'
            )
        if self._classifier is None:
            raise ConfigError(
                f'{call}({name}=…): this model has no classifier, it was trained with the '
                f'objective {self.config.objective.name!r}; fine-tune it (docs/finetune.md), or '
                'name the classes: classify(…, names=[…])'
            )
        objective = self._classifier.config
        stream = objective.stream.split('.')[0]
        if TOWERS.get(name, name) != stream:
            raise ConfigError(
                f'{call}({name}=…): this model was fine-tuned on {stream}; pass {stream}=…'
            )
        request = _request(call, **options)
        rows = self._encode_inputs(given, request)[name]
        logits = rows.features['logits']
        if objective.form == 'softmax':
            scores = np.asarray(jax.nn.softmax(logits, -1))
        else:
            scores = np.asarray(jax.nn.sigmoid(logits))
        rows.features = {'scores': scores, 'logits': logits}
        names = list(self.info.get('labels', {}).get(objective.label, ()))
        if len(names) != logits.shape[-1]:
            # An import without --classes.
            names = [str(number) for number in range(logits.shape[-1])]
        return _as_classes(rows, names, name, request)

    def _one_input(self, given: Mapping[str, Any], call: str) -> str:
        if len(given) != 1:
            raise ConfigError(
                f'{call}(): expected one of video=, audio= and image=, '
                f'got {" and ".join(given) or "none"}'
            )
        return next(iter(given))

    def _tell(self, key: str, message: str) -> None:
        """Warns the user, once for each key."""
        if key not in self._told:
            self._told.add(key)
            _warn(message)

    # ---- inputs -> rows of features

    def _encode_inputs(self, given: Mapping[str, Any], request: _Request) -> dict[str, _Rows]:
        """Rows of every input; those of the sound of media files come as `audio`."""
        self._check_towers(given, request.call)
        # All are looked at before any is encoded: that may take hours.
        listed = {name: self._listed(name, value, request) for name, value in given.items()}
        results: dict[str, _Rows] = {}
        for name, (items, is_single, rate) in listed.items():
            if name == 'text':
                results[name] = self._text_rows(items, is_single, request)
                continue
            asked = request if rate is None else dataclasses.replace(request, rate=rate)
            results.update(self._item_rows(name, items, is_single, asked))
        return results

    def _check_towers(self, given: Mapping[str, Any], call: str) -> None:
        if not given:
            raise ConfigError(
                f'{call}() was given nothing; name at least one of video=, audio=, text=, image='
            )
        for name in given:
            tower = TOWERS.get(name, name)
            if tower not in self._encoder.modalities:
                raise ConfigError(
                    f'{call}({name}=…): this model has no {tower} tower; '
                    f'it has {", ".join(self._encoder.modalities)}'
                )

    def _listed(self, name: str, value: Any, request: _Request) -> tuple[list[Any], bool, Any]:
        """(items, whether a single one was given, the rate of a sound that came with it)."""
        where = request.where(name)
        rate = None
        if name == 'video':
            items, is_single = arrays.list_videos(value, where)
        elif name == 'image':
            items, is_single = arrays.list_images(value, where)
        elif name == 'audio':
            items, is_single, rate = arrays.list_sounds(value, where, self._tell)
            if rate is not None and request.rate is not None and rate != request.rate:
                raise ConfigError(
                    f'{request.call}(audio=(samples, {rate}), rate={request.rate}): expected one '
                    'rate; leave rate= out'
                )
        else:
            items, is_single = _list_texts(value, where)
        if not items:
            raise ConfigError(f'{request.call}({name}=[]): the list is empty')
        paths = [item for item in items if isinstance(item, FILES) and name != 'text']
        missing = media_files.missing_files(paths, request.call, name)
        if missing and request.on_error == 'raise':
            raise ConfigError(missing)
        return items, is_single, rate

    def _text_rows(self, items: Sequence[Any], is_single: bool, request: _Request) -> _Rows:
        features = self._encode_text(items, request, request.where('text'))
        count = len(items)
        return _Rows(
            features,
            np.arange(count, dtype=np.int32),
            np.zeros(count, np.float32),
            np.ones(count, bool),
            is_single,
        )

    def _encode_text(
        self, sentences: Sequence[Any], request: _Request, where: str
    ) -> dict[str, np.ndarray]:
        prepared = self._words(sentences, where)
        return self._encode('text', list(prepared), request.batch_size)

    def _item_rows(
        self, name: str, items: Sequence[Any], is_single: bool, request: _Request
    ) -> dict[str, _Rows]:
        """Rows of clips, sounds or pictures, encoded while the next ones are read."""
        has_files = any(isinstance(item, FILES) for item in items)
        takes_sound = name == 'video' and has_files and request.takes_sound
        readers = []
        for number, item in enumerate(items):
            where = request.where(name, item, None if is_single else number)
            readers.append(functools.partial(self._pieces, name, item, request, where, takes_sound))
        bar = _progress_bar(len(items), request.has_windows, has_files and not request.quiet)
        collected: list[tuple[int, _Piece]] = []
        item_numbers: list[int] = []
        starts: list[float] = []
        errors: list[str] = []
        parts: dict[str, list[_Part]] = {name: []}
        if takes_sound:
            parts['audio'] = []

        def encode_collected() -> None:
            pieces = [piece for _, piece in collected]
            for modality, encoded in parts.items():
                encoded.append(self._encode_present(modality, pieces, request.batch_size))
            collected.clear()

        with bar as advance:
            for number, piece in _in_turn(readers, has_files):
                advance(number)
                item_numbers.append(number)
                starts.append(piece.start)
                if piece.error:
                    errors.append(piece.error)
                collected.append((number, piece))
                if len(collected) == request.batch_size:
                    encode_collected()
            if collected:
                encode_collected()
        if errors:
            _warn(_summary(errors, len(items)))

        results = {}
        for modality, encoded in parts.items():
            joined = _joined(encoded)
            if joined is None and modality == name:
                raise ConfigError(errors[0])
            if joined is None:
                continue
            features, is_valid = joined
            results[modality] = _Rows(
                features,
                np.array(item_numbers, np.int32),
                np.array(starts, np.float32),
                is_valid,
                is_single,
                # A single window is as its key says: without sound there is no `audio`.
                tells_valid=request.on_error == 'skip'
                or (modality != name and (request.has_windows or not is_single)),
            )
        return results

    def _encode_present(self, modality: str, pieces: Sequence[_Piece], batch_size: int) -> _Part:
        present = [i for i, piece in enumerate(pieces) if modality in piece.data]
        if not present:
            return len(pieces), present, {}
        encoded = self._encode(modality, [pieces[i].data[modality] for i in present], batch_size)
        return len(pieces), present, encoded

    def _encode(self, name: str, items: list[np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
        """{'pooled' or space: [B …]} of prepared items of one kind."""
        shapes = sorted({item.shape for item in items})
        if len(shapes) == 1:
            return self._encode_alike(name, items, batch_size)
        # Clips that the device resizes and clips that it does not.
        features: dict[str, np.ndarray] = {}
        for shape in shapes:
            rows = [i for i, item in enumerate(items) if item.shape == shape]
            alike = self._encode_alike(name, [items[i] for i in rows], batch_size)
            for key, value in alike.items():
                if key not in features:
                    features[key] = np.zeros((len(items), *value.shape[1:]), value.dtype)
                features[key][rows] = value
        return features

    def _encode_alike(
        self, name: str, items: list[np.ndarray], batch_size: int
    ) -> dict[str, np.ndarray]:
        """The same, of items of one shape."""
        # Powers of two: few sizes, so few compilations.
        batch_size = min(batch_size, 1 << (len(items) - 1).bit_length())
        tower = TOWERS.get(name, name)
        parts = []
        for begin in range(0, len(items), batch_size):
            chunk = items[begin : begin + batch_size]
            stream = _stream(name, np.stack(chunk), batch_size)
            batch = {tower: stream, 'position': np.arange(batch_size), 'valid': stream['valid']}
            features = self._encoder(batch)
            named = {'pooled': features['pooled'][tower]}
            for space, members in features['spaces'].items():
                if tower in members:
                    named[space] = members[tower]
            for logits in features['predictions'].values():
                named['logits'] = logits
            rows = {key: value[: len(chunk)] for key, value in named.items()}
            if name == 'text':
                # One candidate sentence each: [B 1 E] -> [B E].
                rows = {key: value[:, 0] for key, value in rows.items()}
            parts.append(rows)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    # ---- one item -> its windows, as the encoder takes them

    def _pieces(
        self, name: str, item: Any, request: _Request, where: str, takes_sound: bool
    ) -> Iterator[_Piece]:
        """Windows of one item. Called in a thread of its own where files are read."""
        reader: Callable[..., Iterator[_Piece]]
        if name == 'video':
            reader = functools.partial(self._video_pieces, takes_sound=takes_sound)
        elif name == 'audio':
            reader = self._audio_pieces
        else:
            reader = self._image_pieces
        try:
            yield from reader(item, request, where)
        except ConfigError as error:
            if request.on_error == 'raise':
                raise
            yield _Piece(0.0, {}, str(error))

    def _video_pieces(
        self, item: Any, request: _Request, where: str, takes_sound: bool
    ) -> Iterator[_Piece]:
        spec = self.inputs['video']
        if not isinstance(item, FILES):
            clip = arrays.frames(item, where)
            scale = arrays.pixel_scale([clip], where)
            begins = arrays.window_begins(
                len(clip), spec['frames'], spec['fps'], request.windows, request.stride
            )
            for begin in begins:
                frames = arrays.to_uint8(clip[begin : begin + spec['frames']], scale)
                yield _Piece(begin / spec['fps'], {'video': self._clip(list(frames))})
            return
        audio = self.inputs['audio'] if takes_sound else None
        for window in media_files.video_windows(
            item, where, spec, audio, request.windows, request.stride
        ):
            data: dict[str, np.ndarray] = {'video': self._clip(window.frames or [])}
            if window.samples is not None and len(window.samples):
                data['audio'] = self._sound_window(window.samples)
            yield _Piece(window.start, data)

    def _clip(self, frames: list[UInt8[np.ndarray, '_ _ 3']]) -> UInt8[np.ndarray, 'T H W 3']:
        """Frames of a window as the tower takes them."""
        height, width = frames[0].shape[:2]
        size = self.inputs['video']['size']
        # What is larger or smaller goes in at twice the size of the model: the device does the
        # rest, as in training.
        side = size if min(height, width) == size else 2 * size
        squares = []
        for frame in frames:
            if frame.shape[:2] != (height, width):
                # The resolution changes in the middle.
                frame = arrays.resized(frame, height, width)
            if (height, width) != (size, size):
                frame = arrays.central_square(frame, side)
            squares.append(frame)
        return arrays.fill_window(np.stack(squares), self.inputs['video']['frames'])

    def _image_pieces(self, item: Any, request: _Request, where: str) -> Iterator[_Piece]:
        if isinstance(item, FILES):
            pixels = media_files.read_picture(item, where, self.inputs['video']['size'])
        else:
            raw = arrays.picture(item, where)
            pixels = arrays.to_uint8(raw, arrays.pixel_scale([raw], where))
        yield _Piece(0.0, {'image': self._clip([pixels])})

    def _audio_pieces(self, item: Any, request: _Request, where: str) -> Iterator[_Piece]:
        spec = self.inputs['audio']
        if isinstance(item, FILES):
            # Decoded at the model's rate.
            for window in media_files.sound_windows(
                item, where, spec, request.windows, request.stride
            ):
                if window.samples is not None:
                    yield _Piece(window.start, {'audio': self._sound_window(window.samples)})
            return
        samples = arrays.samples(item, where, self._tell)
        if request.rate is not None:
            samples = arrays.resampled(samples, request.rate, spec['rate'], where)
        for begin in arrays.window_begins(
            len(samples), spec['samples'], spec['rate'], request.windows, request.stride
        ):
            window_samples = self._sound_window(samples[begin : begin + spec['samples']])
            yield _Piece(begin / spec['rate'], {'audio': window_samples})

    def _sound_window(self, samples: Int16[np.ndarray, ' S']) -> Int16[np.ndarray, ' S2']:
        return arrays.fill_window(samples, self.inputs['audio']['samples'])

    def _words(self, sentences: Sequence[Any], where: str) -> Int32[np.ndarray, 'N 1 L']:
        """The numbers of N sentences, one candidate each."""
        for sentence in sentences:
            if not isinstance(sentence, str):
                raise ConfigError(f'{where}: expected strings, got {type(sentence).__name__}')
        if self.tokenizer is None:
            raise ConfigError(
                f'{where}: this checkpoint carries no tokenizer; import it again with '
                '--vocabulary=FILE'
            )
        length = self.inputs['text']['words']
        # One more, to see whether any is cut off.
        numbers = self.tokenizer.encode(list(sentences), length + 1)
        is_cut = numbers[:, length] != tokenizer.PAD
        if is_cut.any():
            self._tell(
                'cut',
                f'{where}: {is_cut.sum()} of {len(sentences)} sentences have more than the '
                f'{length} words that this model reads; the rest is left out, first of '
                f'{sentences[is_cut.argmax()][:200]!r}',
            )
        numbers = numbers[:, :length]
        self._tell_unknown(sentences, numbers, where)
        return numbers[:, None]

    def _tell_unknown(
        self, sentences: Sequence[str], numbers: Int32[np.ndarray, 'N L'], where: str
    ) -> None:
        unknown = getattr(self.tokenizer, 'unknown', tokenizer.UNKNOWN)
        is_word = numbers != tokenizer.PAD
        is_unknown = is_word.any(-1) & ((numbers == unknown) | ~is_word).all(-1)
        if is_unknown.any():
            self._tell(
                'unknown words',
                f'{where}: {is_unknown.sum()} of {len(sentences)} sentences have no word of the '
                f'vocabulary, first {sentences[is_unknown.argmax()][:200]!r}; sentences of as many '
                'unknown words have one embedding, whatever they say',
            )


# Of a batch of windows: how many there were, which of them the modality has, their features.
_Part = tuple[int, list[int], dict[str, np.ndarray]]


def _warn(message: str) -> None:
    """Warns with the line of the user's own code."""
    frame: Any = sys._getframe()
    level = 1
    while frame.f_back and frame.f_globals.get('__name__', '').startswith('vatt_jax'):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def _given(**inputs: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


def _list_texts(value: Any, where: str) -> tuple[list[Any], bool]:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        return [value], True
    if isinstance(value, (bytes, Mapping)) or not np.iterable(value):
        raise ConfigError(
            f'{where}: expected strings, got {type(value).__name__}; pass a sentence or a list'
        )
    return list(value), False


def _in_turn(
    readers: Sequence[Callable[[], Iterator[_Piece]]], has_files: bool
) -> Iterator[tuple[int, _Piece]]:
    """(number of the reader, piece) of all readers, one after the other."""
    if has_files:
        files = min(MOST_FILES, os.cpu_count() or 1)
        yield from read_ahead(readers, files)
        return
    for number, reader in enumerate(readers):
        for piece in reader():
            yield number, piece


@contextlib.contextmanager
def _progress_bar(count: int, has_windows: bool, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `count` items; yields what is called with the number of the item under way."""
    console = rich.console.Console(stderr=True)
    is_terminal = console.is_terminal or console.is_jupyter
    if not (is_shown and is_terminal and (count > 1 or has_windows)):
        yield lambda number: None
        return
    progress = rich.progress.Progress(
        rich.progress.TextColumn('{task.completed:.0f}/{task.total:.0f} files'),
        rich.progress.BarColumn(),
        rich.progress.TextColumn('{task.fields[windows]} windows'),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with progress:
        task = progress.add_task('', total=count, windows=0)
        num_windows = 0

        def advance(number: int) -> None:
            nonlocal num_windows
            num_windows += 1
            progress.update(task, completed=number, windows=num_windows)

        yield advance


def _summary(errors: Sequence[str], count: int) -> str:
    more = '' if len(errors) <= 3 else ', …'
    return f'{len(errors)} of {count} items were left out: {"; ".join(errors[:3])}{more}'


def _joined(parts: Sequence[_Part]) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """(features [N …], valid [N]) of all batches, zeros where there was nothing; None if all."""
    known: dict[str, np.ndarray] = {}
    for _, _, features in parts:
        known = known or features
    if not known:
        return None
    valid = []
    joined: dict[str, list[np.ndarray]] = {key: [] for key in known}
    for count, present, features in parts:
        is_valid = np.zeros(count, bool)
        is_valid[present] = True
        valid.append(is_valid)
        for key, example in known.items():
            rows = np.zeros((count, *example.shape[1:]), example.dtype)
            if present:
                rows[present] = features[key]
            joined[key].append(rows)
    features = {key: np.concatenate(rows) for key, rows in joined.items()}
    return features, np.concatenate(valid)


def _as_classes(rows: _Rows, names: list[str], name: str, request: _Request) -> dict[str, Any]:
    """What `classify` and `predict` return."""
    out: dict[str, Any] = rows.as_output(request.has_windows and name != 'image')
    predicted: list[str | None] = []
    for scores, is_valid in zip(rows.features['scores'], rows.valid):
        # An item that could not be read is of no class.
        predicted.append(names[scores.argmax()] if is_valid else None)
    is_one = out['scores'].ndim == 1
    return {'names': names, 'predicted': predicted[0] if is_one else predicted, **out}


def _compared(a: Any, b: Any, space: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of both sides in one space."""
    sides = []
    for name, side in (('a', a), ('b', b)):
        if isinstance(side, Mapping) and 'pooled' not in side:
            raise ConfigError(
                f'similarity({name}=…): expected one modality of what embed returned, such as '
                f"out['video'], or an array [N E], got a dict of {', '.join(map(str, side))}"
            )
        sides.append(side)
    mappings = [set(side) for side in sides if isinstance(side, Mapping)]
    if mappings and space is None:
        shared = set.intersection(*mappings) - {'pooled', 'valid', 'start', 'item'}
        if len(shared) != 1:
            raise ConfigError(
                'similarity(space=None): expected one common space of both, '
                f'got {", ".join(sorted(shared)) or "none"}; name one with space='
            )
        (space,) = shared
    x, y = (_in_space(side, space, name) for side, name in zip(sides, 'ab'))
    if x.shape[-1] != y.shape[-1]:
        raise ConfigError(
            f'similarity: expected embeddings of one width, got {list(x.shape)} and {list(y.shape)}'
        )
    return x, y


def _in_space(side: Any, space: str | None, name: str) -> np.ndarray:
    if isinstance(side, Mapping):
        spaces = [key for key in side if key not in ('valid', 'start', 'item')]
        if space not in spaces:
            raise ConfigError(
                f'similarity(space={space!r}): {name} has {", ".join(spaces)}; name one that '
                'both have'
            )
        side = side[space]
    x = arrays.as_array(side, f'similarity({name}=…)')
    if x.ndim not in (1, 2):
        raise ConfigError(f'similarity({name}=…): expected [N E] or [E], got {list(x.shape)}')
    return x.astype(np.float32)


def _valid_rows(side: Any, x: np.ndarray) -> Bool[np.ndarray, ' N']:
    if isinstance(side, Mapping) and 'valid' in side:
        return np.atleast_1d(side['valid'])
    return np.ones(len(np.atleast_2d(x)), bool)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def _stream(name: str, data: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """The stream of a batch of `rows` examples, the last ones padding."""
    padding = np.zeros((rows - len(data), *data.shape[1:]), data.dtype)
    is_valid = np.arange(rows) < len(data)
    data = np.concatenate([data, padding])
    stream = {'data': data, 'valid': is_valid}
    if TOWERS.get(name, name) == 'video':
        # The whole frame, as fractions: y0 x0 y1 x1.
        stream['box'] = np.tile(np.array([0, 0, 1, 1], np.float32), (rows, 1))
        stream['flip'] = np.zeros(rows, bool)
    if name == 'text':
        stream['mask'] = (data != 0).any(-1)
    return stream
