"""What a user of trained encoders calls: vatt_jax.load(checkpoint).embed(video=…, audio=…, text=…)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.inference import encoder
from vatt_jax.inputs import tokenizer
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint

FILES = (str, os.PathLike)
TOWER = {'image': 'video'}  # what a kind of input is encoded by, where it is not called the same


def load(path: str | os.PathLike) -> Model:
    """The newest model of a run folder, or that of one checkpoint folder; averaged parameters where the run kept them.

    The checkpoint carries config, tokenizer and class names, so nothing else is needed. Raises ConfigError when it cannot be read.
    """
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, (1, 1, 1, 1))))
    config, variables, info = checkpoint.load_model(pathlib.Path(path), mesh)
    return Model(config, variables, info, mesh)


class Model:
    """config: the run's resolved config. info: {'tokenizer', 'labels', …} of the data it was trained on."""

    def __init__(self, config, variables, info, mesh):
        self.config, self.info, self.variables = config, info, variables
        self.inputs = {k: dict(v) for k, v in config.model.inputs.items()}
        self.tokenizer = tokenizer.from_spec(info['tokenizer']) if info.get('tokenizer') else None
        self._encoder = encoder.Encoder(config, variables, mesh)

    def __repr__(self) -> str:
        count = sum(np.size(x) for x in jax.tree.leaves(self.variables['params']))
        wants = {
            'video': '{frames} frames of {size}×{size} at {fps:g} fps',
            'audio': '{samples} samples at {rate} Hz',
            'text': 'sentences of up to {words} words',
        }
        told = [
            f'{m}: {wants[m].format(**spec)}'
            for m, spec in self.inputs.items()
            if m in self._encoder.modalities
        ]
        return f'<{self.config.name}: {count / 1e6:.2f} M parameters; {"; ".join(told)}>'

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
        """{modality: {'pooled': [B D], <common space>: [B E] of unit length}}, float32; without B where a single item was given.

        video: uint8 frames [T H W 3] at the model's own rate (`inputs['video']['fps']`), a batch [B T H W 3], or a list of clips of
          any T, H, W. A path or list of paths of media files is decoded (video extra); its sound is embedded too, from the same
          window, unless `audio` is given. Of a longer clip the middle window is taken; a shorter one repeats, as in training.
        audio: int16, or floats in [-1, 1], [S] at `rate` Hz (default the model's `inputs['audio']['rate']`; other rates need the video
          extra), a batch [B S], a list, or paths.
        text: a sentence or a list of sentences.
        image: uint8 [H W 3], a batch [B H W 3] or a list: the clip that shows nothing else. A deflated model (run.py --mode=deflate) computes one
          frame for it, a video model all of its own.
        Raises ConfigError for a modality the model lacks and for arrays of another kind or shape.
        """
        given = {'video': video, 'audio': audio, 'text': text, 'image': image}
        given = {k: v for k, v in given.items() if v is not None}
        if not given:
            raise ConfigError(
                'embed() was given nothing; name at least one of video=, audio=, text=, image='
            )
        for name in given:
            if TOWER.get(name, name) not in self._encoder.modalities:
                raise ConfigError(
                    f'embed({name}=…): this model has no {TOWER.get(name, name)} tower; it has {", ".join(self._encoder.modalities)}'
                )
        items, single = {}, {}
        for name, value in given.items():
            items[name], single[name] = _listed(name, value)
        if 'video' in items and any(isinstance(v, FILES) for v in items['video']):
            self._decode(items, single)
        rows = {}
        for name, values in items.items():
            if not values:
                raise ConfigError(f'embed({name}=[]): the list is empty')
            rows[name] = [
                getattr(self, f'_{name}')(v, rate)
                if name == 'audio'
                else getattr(self, f'_{name}')(v)
                for v in values
            ]
        out = {}
        for name, parts in rows.items():
            features = self._run(name, parts, batch_size)
            out[name] = {k: v[0] for k, v in features.items()} if single[name] else features
        return out

    def _run(self, name: str, parts: list[np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
        shapes = sorted({p.shape for p in parts})
        if len(shapes) > 1:  # clips that need resizing and clips that do not
            out: dict[str, np.ndarray] = {}
            for shape in shapes:
                at = [i for i, p in enumerate(parts) if p.shape == shape]
                for k, v in self._run(name, [parts[i] for i in at], batch_size).items():
                    out.setdefault(k, np.zeros((len(parts), *v.shape[1:]), v.dtype))[at] = v
            return out
        batch_size = min(
            batch_size, 1 << (len(parts) - 1).bit_length()
        )  # few sizes, few compilations
        outs = []
        for begin in range(0, len(parts), batch_size):
            data = np.stack(parts[begin : begin + batch_size])
            n = len(data)
            data = np.concatenate([data, np.zeros((batch_size - n, *data.shape[1:]), data.dtype)])
            stream: dict[str, Any] = {'data': data, 'valid': np.arange(batch_size) < n}
            tower = TOWER.get(name, name)
            if tower == 'video':
                h, w = data.shape[2:4]
                side = min(h, w)
                box = [
                    (1 - side / h) / 2,
                    (1 - side / w) / 2,
                    (1 + side / h) / 2,
                    (1 + side / w) / 2,
                ]
                stream |= {
                    'box': np.tile(np.array(box, np.float32), (batch_size, 1)),
                    'flip': np.zeros(batch_size, bool),
                }
            if name == 'text':
                stream['mask'] = (data != 0).any(-1)
            f = self._encoder(
                {tower: stream, 'position': np.arange(batch_size), 'valid': stream['valid']}
            )
            flat = {
                'pooled': f['pooled'][tower],
                **{
                    space: members[tower]
                    for space, members in f['spaces'].items()
                    if tower in members
                },
            }
            outs.append({k: (v[:n, 0] if name == 'text' else v[:n]) for k, v in flat.items()})
        return {k: np.concatenate([o[k] for o in outs]) for k in outs[0]}

    # ---- one item each -> what the encoder takes
    def _video(self, frames: Any) -> np.ndarray:
        x = np.asarray(frames)
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
            raise ConfigError(
                f'embed(video=…): {x.dtype} {list(x.shape)} found, uint8 frames [T H W 3] wanted (0…255, RGB)'
            )
        x = _window(x, self.inputs['video']['frames'])
        side = 2 * self.inputs['video']['size']
        if x.shape[1:3] != (side // 2, side // 2):
            x = np.stack([_square(f, side) for f in x])
        return x

    def _image(self, picture: Any) -> np.ndarray:
        x = np.asarray(picture)
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3 or 0 in x.shape:
            raise ConfigError(
                f'embed(image=…): {x.dtype} {list(x.shape)} found, uint8 pixels [H W 3] wanted (0…255, RGB)'
            )
        return self._video(x[None])

    def _audio(self, samples: Any, rate: int | None) -> np.ndarray:
        if isinstance(samples, FILES):
            media = _media()
            try:
                heard = media.read(samples, 1.0, 8, self.inputs['audio']['rate']).audio
            except (media.MediaError, OSError) as error:
                raise ConfigError(f'embed(audio={os.fspath(samples)!r}): {error}') from error
            if heard is None:
                raise ConfigError(f'embed(audio={os.fspath(samples)!r}): the file has no sound')
            samples, rate = heard, None
        x = np.asarray(samples)
        if (
            x.ndim != 1
            or not len(x)
            or not (x.dtype == np.int16 or np.issubdtype(x.dtype, np.floating))
        ):
            raise ConfigError(
                f'embed(audio=…): {x.dtype} {list(x.shape)} found, int16 or float samples [S] wanted (mono)'
            )
        if np.issubdtype(x.dtype, np.floating):
            if not np.isfinite(x).all() or np.abs(x).max() > 1.001:
                raise ConfigError(
                    f'embed(audio=…): floats must be finite and in [-1, 1]; the largest magnitude is {np.abs(x).max():g}'
                )
            x = np.clip(np.round(x * 32768), -32768, 32767).astype(np.int16)
        own = self.inputs['audio']['rate']
        if rate is not None and rate != own:
            if rate <= 0:
                raise ConfigError(
                    f'embed(audio=…, rate={rate}): a positive number of samples per second is wanted'
                )
            try:
                import soxr
            except ImportError as error:
                raise ConfigError(
                    f'embed(audio=…, rate={rate}): the model wants {own} Hz, and resampling needs soxr; install the video extra'
                ) from error
            x = soxr.resample(x, rate, own)
        return _window(x, self.inputs['audio']['samples'])

    def _text(self, sentence: str) -> np.ndarray:
        if not isinstance(sentence, str):
            raise ConfigError(f'embed(text=…): {type(sentence).__name__} found, strings are wanted')
        if self.tokenizer is None:
            raise ConfigError(
                'embed(text=…): this checkpoint carries no tokenizer; import it again with --vocabulary=FILE'
            )
        return self.tokenizer.encode([sentence], self.inputs['text']['words'])

    def _decode(self, items: dict[str, list], single: dict[str, bool]) -> None:
        """Paths among the videos -> frames, and their sound where no other was given, cut to the same middle window."""
        media = _media()
        spec, sound = (
            self.inputs['video'],
            'audio' not in items and 'audio' in self._encoder.modalities,
        )
        rate = self.inputs['audio']['rate'] if 'audio' in self.inputs else 8000
        clips, sounds = [], []
        for value in items['video']:
            if not isinstance(value, FILES):
                clips.append(value)
                continue
            try:
                file = media.read(value, spec['fps'], spec['size'], rate)
                frames = np.stack(list(file.frames or ())) if file.frames is not None else None
            except (media.MediaError, OSError) as error:
                raise ConfigError(f'embed(video={os.fspath(value)!r}): {error}') from error
            if frames is None:
                raise ConfigError(
                    f'embed(video={os.fspath(value)!r}): the file has no pictures; embed(audio=…) takes its sound'
                )
            clips.append(frames)
            heard = media.fit(file.audio, len(frames), spec['fps'], rate)
            if sound and heard is not None:
                begin = max(0, len(frames) - spec['frames']) // 2 / spec['fps']
                sounds.append(heard[round(begin * rate) :][: self.inputs['audio']['samples']])
        items['video'] = clips
        if sound and len(sounds) == len(clips):
            items['audio'], single['audio'] = sounds, single['video']


def _listed(name: str, value: Any) -> tuple[list, bool]:
    """(items, whether a single one was given)."""
    if isinstance(value, FILES):
        return [value], True
    if isinstance(value, Sequence) and not (
        name == 'audio' and len(value) and np.isscalar(value[0])
    ):
        return list(value), False
    x = np.asarray(value)
    alone = {'video': 4, 'audio': 1, 'text': 0, 'image': 3}[name]
    return ([x], True) if x.ndim <= alone else (list(x), False)


def _window(x: np.ndarray, length: int) -> np.ndarray:
    """The middle `length` of the first axis; what is shorter repeats."""
    if len(x) >= length:
        begin = (len(x) - length) // 2
        return x[begin : begin + length]
    return x[np.arange(length) % len(x)]


def _square(frame: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H W 3] -> the central square, at most `side` pixels: whole ratios are averaged, so nothing aliases; the device does the rest."""
    h, w = frame.shape[:2]
    n = min(h, w)
    frame = frame[(h - n) // 2 : (h - n) // 2 + n, (w - n) // 2 : (w - n) // 2 + n]
    at = (np.arange(side) + 0.5) * n / side
    if n <= side:
        index = np.minimum(at.astype(int), n - 1)
        return frame[index][:, index]
    edges = np.linspace(0, n, side + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(frame.astype(np.float32), edges[:-1], 0), edges[:-1], 1)
    counts = np.diff(edges)
    return np.round(sums / (counts[:, None, None] * counts[None, :, None])).astype(np.uint8)


def _media():
    try:
        from data_pipelines import media
    except ImportError as error:
        raise ConfigError(
            f'reading media files needs PyAV ({error}); install the video extra, or pass arrays'
        ) from error
    return media
