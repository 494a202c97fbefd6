"""What a user of trained encoders calls.

vatt_jax.load(checkpoint).embed(video=…, audio=…, text=…)
"""

from __future__ import annotations

import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.inference import encoder
from vatt_jax.inputs import tokenizer
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint

FILES = (str, os.PathLike)
TOWER = {'image': 'video'}  # what a kind of input is encoded by, where it is not called the same
ITEM_NDIM = {'video': 4, 'audio': 1, 'text': 0, 'image': 3}  # axes of a single item
# What the model's inputs are, for __repr__; the fields are those of config.model.inputs.
DESCRIPTIONS = {
    'video': '{frames} frames of {size}×{size} at {fps:g} fps',
    'audio': '{samples} samples at {rate} Hz',
    'text': 'sentences of up to {words} words',
}
SAMPLES_PER_UNIT = 32768  # int16 samples of a float amplitude of 1
LOUDEST = 1.001  # a little above 1, for the overshoot of resampling


def load(path: str | os.PathLike) -> Model:
    """Load the newest model of a run folder, or that of one checkpoint folder.

    Averaged parameters are taken where the run has them. The checkpoint carries config, tokenizer
    and class names, so nothing else is needed.

    Raises:
        ConfigError: when it cannot be read.
    """
    mesh = sharding.make_mesh({axis: 1 for axis in sharding.MESH_AXES})
    config, variables, info = checkpoint.load_model(pathlib.Path(path), mesh)
    return Model(config, variables, info, mesh)


class Model:
    """A trained model.

    Args:
        config: the run's resolved config.
        variables: {'params', 'batch_stats'}.
        info: {'tokenizer', 'labels', …} of the data it was trained on.
        mesh: to run on.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        info: Mapping[str, Any],
        mesh: Mesh,
    ) -> None:
        self.config = config
        self.info = info
        self.variables = variables
        self.inputs = {modality: dict(spec) for modality, spec in config.model.inputs.items()}
        self.tokenizer: Any = None
        if info.get('tokenizer'):
            self.tokenizer = tokenizer.from_spec(info['tokenizer'])
        self._encoder = encoder.Encoder(config, variables, mesh)

    def __repr__(self) -> str:
        num_parameters = sum(np.size(x) for x in jax.tree.leaves(self.variables['params']))
        inputs = [
            f'{modality}: {DESCRIPTIONS[modality].format(**spec)}'
            for modality, spec in self.inputs.items()
            if modality in self._encoder.modalities
        ]
        millions = num_parameters / 1e6
        return f'<{self.config.name}: {millions:.2f} M parameters; {"; ".join(inputs)}>'

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
        """Embed videos, sounds, sentences or images.

        Args:
            video: uint8 frames [T H W 3] at the model's own rate (`inputs['video']['fps']`), a
                batch [B T H W 3], or a list of clips of any T, H, W. A path or list of paths of
                media files is decoded (video extra); its sound is embedded too, from the same
                window, unless `audio` is given. Of a longer clip the middle window is taken; a
                shorter one repeats, as in training.
            audio: int16, or floats in [-1, 1], [S] at `rate` Hz, a batch [B S], a list, or paths.
            text: a sentence or a list of sentences.
            image: uint8 [H W 3], a batch [B H W 3] or a list: the clip that shows nothing else. A
                deflated model (run.py --mode=deflate) computes one frame for it, a video model all
                of its own.
            rate: of audio in Hz (default the model's `inputs['audio']['rate']`; other rates need
                the video extra).
            batch_size: the most items to encode at once.

        Returns:
            {modality: {'pooled': [B D], <common space>: [B E] of unit length}}, float32; without B
            where a single item was given.

        Raises:
            ConfigError: for a modality the model lacks and for arrays of another kind or shape.
        """
        candidates = {'video': video, 'audio': audio, 'text': text, 'image': image}
        given = {name: value for name, value in candidates.items() if value is not None}
        if not given:
            raise ConfigError(
                'embed() was given nothing; name at least one of video=, audio=, text=, image='
            )
        self._check_towers(given)

        items: dict[str, list] = {}
        is_single: dict[str, bool] = {}
        for name, value in given.items():
            items[name], is_single[name] = _as_list(name, value)
        if any(isinstance(clip, FILES) for clip in items.get('video', ())):
            self._decode(items, is_single)

        # All items are checked before the first is encoded.
        prepared = {name: self._prepare(name, values, rate) for name, values in items.items()}
        embeddings = {}
        for name, arrays in prepared.items():
            features = self._encode(name, arrays, batch_size)
            if is_single[name]:
                features = {key: value[0] for key, value in features.items()}
            embeddings[name] = features
        return embeddings

    def _check_towers(self, given: Mapping[str, Any]) -> None:
        modalities = self._encoder.modalities
        for name in given:
            tower = TOWER.get(name, name)
            if tower not in modalities:
                raise ConfigError(
                    f'embed({name}=…): this model has no {tower} tower; '
                    f'it has {", ".join(modalities)}'
                )

    def _encode(self, name: str, items: list[np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
        """Features of prepared items, {'pooled' or common space: [B …]}."""
        shapes = sorted({item.shape for item in items})
        if len(shapes) > 1:
            return self._encode_by_shape(name, items, shapes, batch_size)
        # A power of two where there are few: few sizes, few compilations.
        batch_size = min(batch_size, 1 << (len(items) - 1).bit_length())
        batches = [
            self._encode_batch(name, np.stack(items[begin : begin + batch_size]), batch_size)
            for begin in range(0, len(items), batch_size)
        ]
        return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}

    def _encode_by_shape(
        self,
        name: str,
        items: list[np.ndarray],
        shapes: list[tuple[int, ...]],
        batch_size: int,
    ) -> dict[str, np.ndarray]:
        """Features of items of several shapes: clips that need resizing and clips that do not."""
        features: dict[str, np.ndarray] = {}
        for shape in shapes:
            rows = [i for i, item in enumerate(items) if item.shape == shape]
            part = self._encode(name, [items[i] for i in rows], batch_size)
            for key, value in part.items():
                if key not in features:
                    features[key] = np.zeros((len(items), *value.shape[1:]), value.dtype)
                features[key][rows] = value
        return features

    def _encode_batch(self, name: str, data: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """Features of one batch, padded to `batch_size` so that sizes seldom change."""
        num_items = len(data)
        padding = np.zeros((batch_size - num_items, *data.shape[1:]), data.dtype)
        data = np.concatenate([data, padding])
        stream: dict[str, Any] = {'data': data, 'valid': np.arange(batch_size) < num_items}
        tower = TOWER.get(name, name)
        if tower == 'video':
            box = _central_square(*data.shape[2:4])
            stream['box'] = np.tile(box, (batch_size, 1))
            stream['flip'] = np.zeros(batch_size, bool)
        if name == 'text':
            stream['mask'] = (data != 0).any(-1)

        features = self._encoder(
            {tower: stream, 'position': np.arange(batch_size), 'valid': stream['valid']}
        )
        embeddings = {'pooled': features['pooled'][tower]}
        for space, members in features['spaces'].items():
            if tower in members:
                embeddings[space] = members[tower]
        if name == 'text':  # one sentence for each item
            return {key: value[:num_items, 0] for key, value in embeddings.items()}
        return {key: value[:num_items] for key, value in embeddings.items()}

    # ---- one item each -> what the encoder takes

    def _prepare(self, name: str, values: list, rate: int | None) -> list[np.ndarray]:
        """Check all items of a kind and turn them into what the encoder takes."""
        if not values:
            raise ConfigError(f'embed({name}=[]): the list is empty')
        if name == 'video':
            return [self._video(frames) for frames in values]
        if name == 'image':
            return [self._image(picture) for picture in values]
        if name == 'audio':
            return [self._audio(samples, rate) for samples in values]
        return [self._text(sentence) for sentence in values]

    def _video(self, frames: Any) -> np.ndarray:
        """uint8 [T H W 3], the model's number of frames, at its size or twice its size."""
        clip = np.asarray(frames)
        if not _is_pixels(clip, ndim=4):
            raise ConfigError(
                f'embed(video=…): expected uint8 frames [T H W 3] (0…255, RGB), '
                f'got {clip.dtype} {list(clip.shape)}.'
            )
        spec = self.inputs['video']
        clip = _middle_window(clip, spec['frames'])
        if clip.shape[1:3] != (spec['size'], spec['size']):
            # The device resizes the last factor of two.
            clip = np.stack([_square(frame, 2 * spec['size']) for frame in clip])
        return clip

    def _image(self, picture: Any) -> np.ndarray:
        """An image [H W 3] as a clip of it alone."""
        pixels = np.asarray(picture)
        if not _is_pixels(pixels, ndim=3):
            raise ConfigError(
                f'embed(image=…): expected uint8 pixels [H W 3] (0…255, RGB), '
                f'got {pixels.dtype} {list(pixels.shape)}.'
            )
        return self._video(pixels[None])

    def _audio(self, samples: Any, rate: int | None) -> np.ndarray:
        """int16 [S], the model's number of samples at its rate."""
        spec = self.inputs['audio']
        if isinstance(samples, FILES):
            samples = _read_sound(samples, spec['rate'])
            rate = None  # it was decoded at the model's
        x = np.asarray(samples)
        is_float = np.issubdtype(x.dtype, np.floating)
        if x.ndim != 1 or not len(x) or not (x.dtype == np.int16 or is_float):
            raise ConfigError(
                f'embed(audio=…): expected int16 or float samples [S] (mono), '
                f'got {x.dtype} {list(x.shape)}.'
            )
        if is_float:
            if not np.isfinite(x).all() or np.abs(x).max() > LOUDEST:
                raise ConfigError(
                    'embed(audio=…): floats must be finite and in [-1, 1]; '
                    f'the largest magnitude is {np.abs(x).max():g}'
                )
            scaled = np.round(x * SAMPLES_PER_UNIT)
            x = np.clip(scaled, -SAMPLES_PER_UNIT, SAMPLES_PER_UNIT - 1).astype(np.int16)
        if rate is not None and rate != spec['rate']:
            x = _resample(x, rate, spec['rate'])
        return _middle_window(x, spec['samples'])

    def _text(self, sentence: Any) -> np.ndarray:
        """Word ids [1 L] of a sentence."""
        if not isinstance(sentence, str):
            raise ConfigError(f'embed(text=…): expected strings, got {type(sentence).__name__}.')
        if self.tokenizer is None:
            raise ConfigError(
                'embed(text=…): this checkpoint carries no tokenizer; '
                'import it again with --vocabulary=FILE'
            )
        return self.tokenizer.encode([sentence], self.inputs['text']['words'])

    def _decode(self, items: dict[str, list], is_single: dict[str, bool]) -> None:
        """Decode paths among the videos in place, and their sound where no other was given.

        The sound is cut to the same middle window as the frames.
        """
        media = _media()
        spec = self.inputs['video']
        embeds_sound = 'audio' not in items and 'audio' in self._encoder.modalities
        # Without an audio input the sound is not used; any rate would do.
        rate = self.inputs['audio']['rate'] if 'audio' in self.inputs else 8000
        clips = []
        sounds = []
        for value in items['video']:
            if not isinstance(value, FILES):
                clips.append(value)
                continue
            where = f'embed(video={os.fspath(value)!r})'
            try:
                file = media.read(value, spec['fps'], spec['size'], rate)
                frames = None
                if file.frames is not None:
                    # Frames are decoded here, while they are read.
                    frames = np.stack(list(file.frames))
            except (media.MediaError, OSError) as error:
                raise ConfigError(f'{where}: {error}') from error
            if frames is None:
                raise ConfigError(
                    f'{where}: the file has no pictures; embed(audio=…) takes its sound'
                )
            clips.append(frames)
            sound = media.fit(file.audio, len(frames), spec['fps'], rate)
            if embeds_sound and sound is not None:
                first_frame = max(0, len(frames) - spec['frames']) // 2
                begin = round(first_frame / spec['fps'] * rate)
                sounds.append(sound[begin:][: self.inputs['audio']['samples']])
        items['video'] = clips
        # A file without sound leaves rows out, so that there is no sound for any of them.
        if embeds_sound and len(sounds) == len(clips):
            items['audio'] = sounds
            is_single['audio'] = is_single['video']


def _is_pixels(x: np.ndarray, ndim: int) -> bool:
    """Whether an array is uint8 [… H W 3] and not empty."""
    return x.dtype == np.uint8 and x.ndim == ndim and x.shape[-1] == 3 and 0 not in x.shape


def _as_list(name: str, value: Any) -> tuple[list, bool]:
    """(items, whether a single one was given)."""
    if isinstance(value, FILES):
        return [value], True
    if isinstance(value, Sequence):
        is_samples = name == 'audio' and len(value) > 0 and np.isscalar(value[0])
        if not is_samples:
            return list(value), False
    array = np.asarray(value)
    if array.ndim <= ITEM_NDIM[name]:
        return [array], True
    return list(array), False


def _middle_window(x: np.ndarray, length: int) -> np.ndarray:
    """The middle `length` of the first axis; what is shorter repeats."""
    if len(x) >= length:
        begin = (len(x) - length) // 2
        return x[begin : begin + length]
    return x[np.arange(length) % len(x)]


def _central_square(height: int, width: int) -> np.ndarray:
    """The central square of a frame as a box (top, left, bottom, right), in shares of its sides."""
    side = min(height, width)
    box = [
        (1 - side / height) / 2,
        (1 - side / width) / 2,
        (1 + side / height) / 2,
        (1 + side / width) / 2,
    ]
    return np.array(box, np.float32)


def _square(frame: np.ndarray, side: int) -> np.ndarray:
    """Cut uint8 [H W 3] to its central square, at most `side` pixels.

    Larger frames are averaged over whole pixels, so nothing aliases; the device does the rest.
    """
    height, width = frame.shape[:2]
    size = min(height, width)
    top = (height - size) // 2
    left = (width - size) // 2
    frame = frame[top : top + size, left : left + size]
    if size <= side:
        centres = (np.arange(side) + 0.5) * size / side
        nearest = np.minimum(centres.astype(int), size - 1)
        return frame[nearest][:, nearest]
    edges = np.linspace(0, size, side + 1).astype(int)
    row_sums = np.add.reduceat(frame.astype(np.float32), edges[:-1], 0)
    sums = np.add.reduceat(row_sums, edges[:-1], 1)
    counts = np.diff(edges)
    means = sums / (counts[:, None, None] * counts[None, :, None])
    return np.round(means).astype(np.uint8)


def _resample(x: np.ndarray, rate: int, model_rate: int) -> np.ndarray:
    """int16 samples at `rate` Hz -> at the model's."""
    if rate <= 0:
        raise ConfigError(
            f'embed(audio=…, rate=…): expected a positive number of samples per second, got {rate}.'
        )
    try:
        import soxr
    except ImportError as error:
        raise ConfigError(
            f'embed(audio=…, rate={rate}): the model takes {model_rate} Hz, and resampling needs '
            'soxr; install the video extra'
        ) from error
    return soxr.resample(x, rate, model_rate)


def _read_sound(path: str | os.PathLike, rate: int) -> np.ndarray:
    """The sound of a media file at `rate` Hz."""
    media = _media()
    where = f'embed(audio={os.fspath(path)!r})'
    try:
        # Its pictures are not decoded, so their rate and size are of no matter.
        sound = media.read(path, 1.0, 8, rate).audio
    except (media.MediaError, OSError) as error:
        raise ConfigError(f'{where}: {error}') from error
    if sound is None:
        raise ConfigError(f'{where}: the file has no sound')
    return sound


def _media() -> types.ModuleType:
    """The decoder of media files; imported late, since it needs an extra."""
    try:
        from data_pipelines import media
    except ImportError as error:
        raise ConfigError(
            f'reading media files needs PyAV ({error}); install the video extra, or pass arrays'
        ) from error
    return media
