"""What a user of trained encoders calls: vatt_jax.load(checkpoint).embed(video=…, audio=…,
text=…)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int16, UInt8
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import tokenizer
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint

FILES = (str, os.PathLike)
# Which tower encodes a kind of input, where it is not called the same.
TOWERS = {'image': 'video'}
# Axes of one item of each kind; one more is a batch.
ITEM_AXES = {'video': 4, 'audio': 1, 'text': 0, 'image': 3}
# How `repr` describes the inputs of each tower.
DESCRIPTIONS = {
    'video': '{frames} frames of {size}×{size} at {fps:g} fps',
    'audio': '{samples} samples at {rate} Hz',
    'text': 'sentences of up to {words} words',
}


def load(path: str | os.PathLike) -> Model:
    """The newest model of a run folder, or that of one checkpoint folder.

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
    config, variables, info = checkpoint.load_model(pathlib.Path(path), mesh)
    return Model(config, variables, info, mesh, pathlib.Path(path))


class Model:
    """A trained model.

    Args:
        config: the run's resolved config.
        variables: {'params', 'batch_stats'}.
        info: {'tokenizer', 'labels', …} of the data it was trained on.
        mesh: the devices it runs on.
        path: the folder it was loaded from; its evaluation goes into model cards.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        info: Mapping[str, Any],
        mesh: Mesh,
        path: pathlib.Path | None = None,
    ):
        self.config, self.info, self.variables = config, info, variables
        self.path = path
        self.inputs = {name: dict(spec) for name, spec in config.model.inputs.items()}
        self.tokenizer = None
        if info.get('tokenizer'):
            self.tokenizer = tokenizer.from_spec(info['tokenizer'])
        self._encoder = feature_extractor.FeatureExtractor(config, variables, mesh)

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

    def embed(
        self,
        video: Any = None,
        audio: Any = None,
        text: Any = None,
        image: Any = None,
        *,
        rate: int | None = None,
        batch_size: int = 32,
    ) -> dict[str, dict[str, np.ndarray]]:
        """Embeddings of clips, sounds, sentences and pictures.

        Of a clip longer than the model's window the middle is taken; a shorter one repeats, as in
        training.

        Args:
            video: uint8 frames [T H W 3] at the model's own rate (`inputs['video']['fps']`), a
                batch [B T H W 3], or a list of clips of any T, H, W. A path or a list of paths of
                media files is decoded (video extra); its sound is embedded too, from the same
                window, unless `audio` is given.
            audio: int16, or floats in [-1, 1], [S] at `rate` Hz, a batch [B S], a list, or paths.
            text: a sentence or a list of sentences.
            image: uint8 [H W 3], a batch [B H W 3] or a list: the clip that shows nothing else. A
                deflated model (run.py --mode=deflate) computes one frame for it, a video model all
                of its own.
            rate: samples a second of `audio` (default `inputs['audio']['rate']`; others need the
                video extra).
            batch_size: items encoded at a time.

        Returns:
            {modality: {'pooled': [B D], <common space>: [B E] of unit length}}, float32; without B
            where a single item was given.

        Raises:
            ConfigError: the model lacks a modality, or an input is of another kind or shape.
        """
        everything = {'video': video, 'audio': audio, 'text': text, 'image': image}
        given = {name: value for name, value in everything.items() if value is not None}
        self._check_towers(given)
        items, is_single = {}, {}
        for name, value in given.items():
            items[name], is_single[name] = _listed(name, value)
        if any(isinstance(clip, FILES) for clip in items.get('video', ())):
            self._decode_files(items, is_single)
        embedded = {}
        for name, values in items.items():
            if not values:
                raise ConfigError(f'embed({name}=[]): the list is empty')
            prepared = [self._prepare(name, value, rate) for value in values]
            features = self._encode(name, prepared, batch_size)
            if is_single[name]:
                features = {key: rows[0] for key, rows in features.items()}
            embedded[name] = features
        return embedded

    def _check_towers(self, given: Mapping[str, Any]) -> None:
        if not given:
            raise ConfigError(
                'embed() was given nothing; name at least one of video=, audio=, text=, image='
            )
        for name in given:
            tower = TOWERS.get(name, name)
            if tower not in self._encoder.modalities:
                raise ConfigError(
                    f'embed({name}=…): this model has no {tower} tower; '
                    f'it has {", ".join(self._encoder.modalities)}'
                )

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
            rows = {key: value[: len(chunk)] for key, value in named.items()}
            if name == 'text':
                # One candidate sentence each: [B 1 E] -> [B E].
                rows = {key: value[:, 0] for key, value in rows.items()}
            parts.append(rows)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    # ---- one item each -> what the encoder takes

    def _prepare(self, name: str, value: Any, rate: int | None) -> np.ndarray:
        if name == 'video':
            return self._frames(value)
        if name == 'image':
            return self._picture(value)
        if name == 'audio':
            return self._samples(value, rate)
        return self._words(value)

    def _frames(self, frames: Any) -> UInt8[np.ndarray, 'T H W 3']:
        x = np.asarray(frames)
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
            raise ConfigError(
                'embed(video=…): expected uint8 frames [T H W 3] (0…255, RGB), '
                f'got {x.dtype} {list(x.shape)}'
            )
        x = _middle_window(x, self.inputs['video']['frames'])
        size = self.inputs['video']['size']
        if x.shape[1:3] != (size, size):
            # Twice the size of the model: the device does the rest, as in training.
            x = np.stack([_central_square(frame, 2 * size) for frame in x])
        return x

    def _picture(self, pixels: Any) -> UInt8[np.ndarray, 'T H W 3']:
        x = np.asarray(pixels)
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3 or 0 in x.shape:
            raise ConfigError(
                'embed(image=…): expected uint8 pixels [H W 3] (0…255, RGB), '
                f'got {x.dtype} {list(x.shape)}'
            )
        return self._frames(x[None])

    def _samples(self, samples: Any, rate: int | None) -> Int16[np.ndarray, ' S']:
        model_rate = self.inputs['audio']['rate']
        if isinstance(samples, FILES):
            # Decoded at the model's rate.
            samples, rate = _sound_of_file(samples, model_rate), None
        x = np.asarray(samples)
        is_float = np.issubdtype(x.dtype, np.floating)
        if x.ndim != 1 or not len(x) or not (x.dtype == np.int16 or is_float):
            raise ConfigError(
                'embed(audio=…): expected int16 or float samples [S] (mono), '
                f'got {x.dtype} {list(x.shape)}'
            )
        if is_float:
            x = _to_int16(x)
        if rate is not None and rate != model_rate:
            x = _resampled(x, rate, model_rate)
        return _middle_window(x, self.inputs['audio']['samples'])

    def _words(self, sentence: Any) -> np.ndarray:
        """int32 [1 L]: one candidate sentence."""
        if not isinstance(sentence, str):
            raise ConfigError(f'embed(text=…): expected strings, got {type(sentence).__name__}')
        if self.tokenizer is None:
            raise ConfigError(
                'embed(text=…): this checkpoint carries no tokenizer; import it again with '
                '--vocabulary=FILE'
            )
        return self.tokenizer.encode([sentence], self.inputs['text']['words'])

    # ---- files

    def _decode_files(self, items: dict[str, list[Any]], is_single: dict[str, bool]) -> None:
        """Replaces paths among the videos by frames, in place.

        Where no other sound was given, that of the files is added, cut to the same middle window;
        if one file has none, no file's is.
        """
        takes_sound = 'audio' not in items and 'audio' in self._encoder.modalities
        clips: list[Any] = []
        sounds: list[np.ndarray] = []
        for value in items['video']:
            if not isinstance(value, FILES):
                clips.append(value)
                continue
            frames, sound = self._decode_file(value)
            clips.append(frames)
            if takes_sound and sound is not None:
                sounds.append(sound)
        items['video'] = clips
        if takes_sound and len(sounds) == len(clips):
            items['audio'], is_single['audio'] = sounds, is_single['video']

    def _decode_file(
        self, path: str | os.PathLike
    ) -> tuple[UInt8[np.ndarray, 'T H W 3'], Int16[np.ndarray, ' S'] | None]:
        """All frames of a file, and the sound of their middle window."""
        media = _media()
        spec = self.inputs['video']
        audio_spec = self.inputs.get('audio', {'rate': 8000, 'samples': 0})
        rate = audio_spec['rate']
        try:
            file = media.read(path, spec['fps'], spec['size'], rate)
            frames = None
            if file.frames is not None:
                frames = np.stack(list(file.frames))
        except (media.MediaError, OSError) as error:
            raise ConfigError(f'embed(video={os.fspath(path)!r}): {error}') from error
        if frames is None:
            raise ConfigError(
                f'embed(video={os.fspath(path)!r}): the file has no pictures; embed(audio=…) takes '
                'its sound'
            )
        sound = media.fit_audio(file.audio, len(frames), spec['fps'], rate)
        if sound is not None:
            begin = max(0, len(frames) - spec['frames']) // 2 / spec['fps']
            sound = sound[round(begin * rate) :][: audio_spec['samples']]
        return frames, sound


def _listed(name: str, value: Any) -> tuple[list[Any], bool]:
    """(items, whether a single one was given)."""
    if isinstance(value, FILES):
        return [value], True
    if isinstance(value, Sequence):
        is_one_sound = name == 'audio' and len(value) > 0 and np.isscalar(value[0])
        if not is_one_sound:
            return list(value), False
    x = np.asarray(value)
    if x.ndim <= ITEM_AXES[name]:
        return [x], True
    return list(x), False


def _stream(name: str, data: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """The stream of a batch of `rows` examples, the last ones padding."""
    padding = np.zeros((rows - len(data), *data.shape[1:]), data.dtype)
    is_valid = np.arange(rows) < len(data)
    data = np.concatenate([data, padding])
    stream = {'data': data, 'valid': is_valid}
    if TOWERS.get(name, name) == 'video':
        # The central square of the frame, as fractions: y0 x0 y1 x1.
        height, width = data.shape[2:4]
        side = min(height, width)
        y, x = side / height, side / width
        box = np.array([(1 - y) / 2, (1 - x) / 2, (1 + y) / 2, (1 + x) / 2], np.float32)
        stream['box'] = np.tile(box, (rows, 1))
        stream['flip'] = np.zeros(rows, bool)
    if name == 'text':
        stream['mask'] = (data != 0).any(-1)
    return stream


def _middle_window(x: np.ndarray, length: int) -> np.ndarray:
    """The middle `length` of the first axis; what is shorter repeats."""
    if len(x) >= length:
        begin = (len(x) - length) // 2
        return x[begin : begin + length]
    return x[np.arange(length) % len(x)]


def _central_square(
    frame: UInt8[np.ndarray, 'H W 3'], side: int
) -> UInt8[np.ndarray, '{side} {side} 3']:
    """The central square of a frame at `side` pixels.

    Large frames are averaged over whole blocks of pixels, so that nothing aliases.
    """
    height, width = frame.shape[:2]
    n = min(height, width)
    top, left = (height - n) // 2, (width - n) // 2
    frame = frame[top : top + n, left : left + n]
    if n <= side:
        nearest = ((np.arange(side) + 0.5) * n / side).astype(int)
        index = np.minimum(nearest, n - 1)
        return frame[index][:, index]
    edges = np.linspace(0, n, side + 1).astype(int)
    by_rows = np.add.reduceat(frame.astype(np.float32), edges[:-1], 0)
    sums = np.add.reduceat(by_rows, edges[:-1], 1)
    counts = np.diff(edges)
    area = counts[:, None, None] * counts[None, :, None]
    return np.round(sums / area).astype(np.uint8)


def _to_int16(x: np.ndarray) -> Int16[np.ndarray, ' S']:
    """Floats in [-1, 1] as 16-bit samples. A little beyond is clipped: resamplers overshoot."""
    if not np.isfinite(x).all() or np.abs(x).max() > 1.001:
        raise ConfigError(
            'embed(audio=…): expected finite floats in [-1, 1], '
            f'got magnitudes up to {np.abs(x).max():g}'
        )
    return np.clip(np.round(x * 32768), -32768, 32767).astype(np.int16)


def _resampled(x: np.ndarray, rate: int, model_rate: int) -> np.ndarray:
    """Samples at the model's rate."""
    if rate <= 0:
        raise ConfigError(
            f'embed(audio=…, rate={rate}): expected a positive number of samples per second'
        )
    try:
        import soxr
    except ImportError as error:
        raise ConfigError(
            f'embed(audio=…, rate={rate}): the model reads {model_rate} Hz, and resampling needs '
            'soxr; install the video extra'
        ) from error
    return soxr.resample(x, rate, model_rate)


def _sound_of_file(path: str | os.PathLike, rate: int) -> Int16[np.ndarray, ' S']:
    media = _media()
    try:
        # Pictures are not decoded any further than the reader needs: one small frame a second.
        sound = media.read(path, 1.0, 8, rate).audio
    except (media.MediaError, OSError) as error:
        raise ConfigError(f'embed(audio={os.fspath(path)!r}): {error}') from error
    if sound is None:
        raise ConfigError(f'embed(audio={os.fspath(path)!r}): the file has no sound')
    return sound


def _media() -> Any:
    """The reader of media files. Imported where it is used: it is an extra."""
    try:
        from data_pipelines import media
    except ImportError as error:
        raise ConfigError(
            f'reading media files needs PyAV ({error}); install the video extra, or pass arrays'
        ) from error
    return media
