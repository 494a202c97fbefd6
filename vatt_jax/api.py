"""What a user of trained encoders calls: vatt_jax.load(checkpoint).embed(video=…, audio=…,
text=…), and on the same model `similarity`, `classify`, `predict`, `caption`, `detect`
and `localise`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.importers import safetensors_folder
from vatt_jax.inference import classes, feature_extractor, similarity
from vatt_jax.inference.captioner import Captioner
from vatt_jax.inference.detector import PictureDetector
from vatt_jax.inference.embedder import Embedder
from vatt_jax.inference.localiser import Localiser
from vatt_jax.inference.notices import Notices
from vatt_jax.inference.requests import TOWERS, Request, given_inputs, only_input
from vatt_jax.inputs import class_sentences, tokenizer
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.modalities import described
from vatt_jax.object_store import is_url, run_mirror
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint

# How `repr` describes the inputs of each tower.
DESCRIPTIONS = {
    'video': '{frames} frames of {size}×{size} at {fps:g} fps',
    'flow': 'flow of {frames} frames of {size}×{size} at {fps:g} fps',
    'audio': '{samples} samples at {rate} Hz',
    'text': 'sentences of up to {words} words',
}


def load(path: str | os.PathLike, which: str = 'student', base: str | os.PathLike = '') -> Model:
    """The newest model of a run folder, or that of one checkpoint or safetensors folder.

    Averaged parameters where the run kept them. The checkpoint carries config, tokenizer and class
    names, so nothing else is needed.

    Args:
        path: the folder, here or on an object store (s3://…, gs://…), or
            hf://owner/name[@revision] for a repository of the Hugging Face hub.
        which: student, the model that was trained, or teacher, its momentum copy, where the
            objective keeps one.
        base: of a run that was trained beside a frozen model (config.base): where that is now; '':
            where it was then.

    Raises:
        ConfigError: no model can be read there, or no teacher; or its frozen model is another one
            or not there.
        StoreError: the object store cannot be read.
    """
    if os.fspath(path).startswith('hf://'):
        from vatt_jax.exchange import hub

        path = hub.download(os.fspath(path))
    elif is_url(path):
        path = run_mirror.fetch_run(os.fspath(path))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1))
    path = pathlib.Path(path)
    if safetensors_folder.is_model_folder(path):
        if which != 'student':
            raise ConfigError(f'{path} holds one model, expected which="student", got {which!r}')
        config, variables, info = safetensors_folder.load_model(path, mesh)
    else:
        config, variables, info = checkpoint.load_model(
            path, mesh, objective=True, which=which, base=os.fspath(base)
        )
    heads = variables.pop('objective')
    return Model(config, variables, info, mesh, heads, path)


def _placed(
    config: str,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    heads: Mapping[str, Any] | None,
    path: pathlib.Path | None,
) -> Model:
    """The model of a pickle, on the first device of this process."""
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1))
    variables, heads = jax.device_put((variables, heads), sharding.replicated(mesh))
    return Model(configs.from_json(config), variables, info, mesh, heads, path)


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
        self.inputs = described(config.model.inputs)
        self.tokenizer = None
        if info.get('tokenizer'):
            self.tokenizer = tokenizer.from_spec(info['tokenizer'])
        self._classifier = None
        if heads and config.objective.name == 'classification':
            self._classifier = objectives.build(config.objective)
        self._encoder = feature_extractor.FeatureExtractor(
            config, variables, mesh, self._classifier, heads, {}
        )
        self._detector = None
        if heads and config.objective.name == 'detection':
            self._detector = PictureDetector(config, variables, info, mesh, heads)
        # What the user has been told: once is enough.
        self._told = Notices()
        self._localiser = None
        if heads and config.objective.name == 'localisation':
            finder = feature_extractor.FeatureExtractor(
                config, variables, mesh, objectives.build(config.objective), heads, {}
            )
            self._localiser = Localiser(finder, self.inputs, self._told)
        self._captioner = None
        if heads and config.objective.name == 'captioning':
            teller = feature_extractor.FeatureExtractor(
                config, variables, mesh, objectives.build(config.objective), heads, {}
            )
            self._captioner = Captioner(teller, self.tokenizer)
        self._embedder = Embedder(
            self._encoder, self.inputs, self.tokenizer, self._told, info.get('flow')
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # Devices cannot be pickled: whoever reads it places the parameters on one of its own.
        variables, heads = jax.device_get((self.variables, self._encoder.heads[0]))
        return _placed, (configs.to_json(self.config), variables, self.info, heads, self.path)

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
            folder,
            self.config,
            self.variables,
            self.info,
            self.modalities,
            run,
            licence,
            self._classifier,
            self._encoder.heads[0],
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
        flow: Any = None,
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
            flow: clips as of `video`, whose optical flow is computed (flow extra) as that of the
                training data was, for a model with a tower for it. Not their sound.
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
        given = given_inputs(video=video, audio=audio, text=text, image=image, flow=flow)
        takes_sound = audio is None and 'audio' in self.modalities
        request = Request('embed', rate, batch_size, windows, stride, on_error, quiet, takes_sound)
        embedded = {}
        for name, rows in self._embedder.rows(given, request).items():
            rows.features = {k: v for k, v in rows.features.items() if k != 'logits'}
            has_windows = request.has_windows and name not in ('text', 'image')
            embedded[name] = rows.as_output(has_windows)
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
        return similarity.cosines(a, b, space)

    def classify(
        self,
        video: Any = None,
        audio: Any = None,
        image: Any = None,
        flow: Any = None,
        *,
        names: Any = None,
        templates: Any = class_sentences.TEMPLATES,
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
            video: see `embed`. One of `video`, `audio`, `image` and `flow` is given.
            audio: see `embed`.
            image: see `embed`.
            flow: see `embed`.
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
        given = given_inputs(video=video, audio=audio, image=image, flow=flow)
        request = Request('classify', rate, batch_size, windows, stride, on_error, quiet)
        if names is None:
            return self._predict(given, request)
        if 'text' not in self.modalities:
            raise ConfigError(
                'classify(names=…): this model has no text tower; leave names out to read the '
                'classifier of a fine-tuned model'
            )
        return classes.by_names(self._embedder, given, request, names, templates, space)

    def predict(
        self,
        video: Any = None,
        audio: Any = None,
        image: Any = None,
        flow: Any = None,
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
            flow: see `embed`.
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
        given = given_inputs(video=video, audio=audio, image=image, flow=flow)
        request = Request('predict', rate, batch_size, windows, stride, on_error, quiet)
        return self._predict(given, request)

    def detect(self, image: Any, *, batch_size: int = 32, min_score: float = 0.3) -> Any:
        """Objects in pictures, found by a trained detector (docs/detector.md).

        Args:
            image: pixels [H W 3], a batch [B H W 3], a list of pictures (arrays, PIL) or paths.
            batch_size: pictures looked at together.
            min_score: less sure detections are left out; the run's own limit holds as well.

        Returns:
            {'boxes': float32 [N 4], x0 y0 x1 y1 in pixels of the picture, 'scores': float32 [N],
            descending, 'classes': int32 [N], 'names': of these classes}; a list of such where
            several pictures were given.

        Raises:
            ConfigError: the model is no detector, or a picture cannot be read.
        """
        if self._detector is None:
            raise ConfigError(
                'detect(image=…): this model is no detector, it was trained with the objective '
                f'{self.config.objective.name!r}; load a run of configs/detector.py'
            )
        return self._detector.detect(image, batch_size, min_score)

    def localise(
        self,
        video: Any = None,
        audio: Any = None,
        image: Any = None,
        *,
        size: Any = None,
        rate: Any = None,
        batch_size: Any = 32,
    ) -> dict[str, Any]:
        """Where in a picture is what is heard: heat maps of a model trained to localise.

        Args:
            video: clips or media files, see `embed`; of a longer one the middle is taken, from a
                file with its sound. One of `video` and `image` is given.
            audio: see `embed`; a sound for each picture, unless these are media files with sound.
            image: pictures, see `embed`.
            size: (height, width) of the maps, interpolated; None: of the model's own grid.
            rate: see `embed`.
            batch_size: see `embed`.

        Returns:
            {'heat': float32 [B T h w], cosines of every position and the sound, 'score': float32
            [B], the highest of each}, without B where a single item was given. The map covers what
            the model sees of a picture: its central square.

        Raises:
            ConfigError: the model was not trained by config.objective.name='localisation', a
                picture has no sound, or an input is of another kind or shape.
        """
        if self._localiser is None:
            raise ConfigError(
                'localise(): this model has no heat maps, it was trained with the objective '
                f"{self.config.objective.name!r}; train one with 'localisation' "
                '(docs/detection.md)'
            )
        if size is not None:
            size = _checked_size(size)
        given = given_inputs(video=video, audio=audio, image=image)
        request = Request('localise', rate, batch_size, None, None, 'raise', True)
        return self._localiser.heat_maps(given, request, size)

    def caption(
        self,
        video: Any = None,
        audio: Any = None,
        image: Any = None,
        *,
        beam: int = 3,
        rate: Any = None,
        batch_size: Any = 32,
    ) -> str | list[str]:
        """What a model trained to tell clips in words says of them (docs/clipcap.md).

        Args:
            video: clips or media files, see `embed`; of a longer one the middle is taken. One of
                `video`, `audio` and `image` is given, of the modality that the model tells.
            audio: sounds, see `embed`.
            image: pictures, see `embed`.
            beam: width of the search; 1: the likeliest word, always.
            rate: see `embed`.
            batch_size: see `embed`.

        Returns:
            A caption; a list of them where several clips were given.

        Raises:
            ConfigError: the model was not trained by config.objective.name='captioning', or an
                input is of another modality, kind or shape.
        """
        if self._captioner is None and self.config.objective.name == 'captioning':
            raise ConfigError(
                'caption(): this folder holds the model without its mapper; load the run folder or '
                'one of its checkpoints'
            )
        if self._captioner is None:
            raise ConfigError(
                'caption(): this model writes no captions, it was trained with the objective '
                f"{self.config.objective.name!r}; train one with 'captioning' (docs/clipcap.md)"
            )
        given = given_inputs(video=video, audio=audio, image=image)
        name = only_input(given, 'caption')
        objective = self._captioner.objective.config
        modality = modality_of(objective.media)
        if TOWERS.get(name, name) != modality:
            raise ConfigError(
                f'caption({name}=…): this model was trained to tell {modality}; pass {modality}=…'
            )
        request = Request('caption', rate, batch_size, None, None, 'raise', True)
        rows = self._embedder.rows(given, request)[name]
        embeddings = rows.features[objective.space or 'pooled']
        captions = self._captioner.write(embeddings, beam, batch_size)
        return captions[0] if rows.is_single else captions

    def _predict(self, given: Mapping[str, Any], request: Request) -> dict[str, Any]:
        name = only_input(given, request.call)
        where = request.where(name)
        if self._classifier is None and self.config.objective.name == 'classification':
            raise ConfigError(
                f'{where}: this folder holds the fine-tuned model without its classifier; load the '
                'run folder or one of its checkpoints'
            )
        if self._classifier is None:
            raise ConfigError(
                f'{where}: this model has no classifier, it was trained with the objective '
                f'{self.config.objective.name!r}; fine-tune it (docs/finetune.md), or name the '
                'classes: classify(…, names=[…])'
            )
        objective = self._classifier.config
        return classes.by_classifier(self._embedder, given, request, objective, self.info)


def _checked_size(size: Any) -> tuple[int, int]:
    """(height, width) in pixels. Raises ConfigError where it is none."""
    values = np.asarray(size)
    if values.shape != (2,) or values.dtype.kind not in 'iu' or values.min() < 1:
        raise ConfigError(f'localise(size={size!r}): expected (height, width) in pixels')
    height, width = values.tolist()
    return height, width
