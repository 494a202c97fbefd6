"""Runs exported vatt_jax encoders. Needs JAX and NumPy alone; lies beside the programs it runs.

from load import Artifact

model = Artifact('.')
model.embed(text=['a dog barks'])['text']['vat']  # [B E], unit length
model.embed(video=frames)  # uint8 [B T H W 3], see model.inputs['video']
model.embed(audio=samples)  # int16 [B S], see model.inputs['audio']
model.predict(video=frames)['predicted']  # of a fine-tuned model
"""

from __future__ import annotations

import json
import pathlib
import string
from typing import Any

import jax
import jax.export
import numpy as np

# Deleted from sentences before they are split into words.
_PUNCTUATION = str.maketrans('', '', string.punctuation)


class Artifact:
    """Exported towers.

    Args:
        folder: where manifest.json lies.

    Attributes:
        inputs: {modality: {'shape', 'dtype', and what the numbers mean}}; B is any number.
        outputs: {modality: {name: width}}.
    """

    def __init__(self, folder: Any):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / 'manifest.json').read_text('utf-8'))
        self.inputs = {name: tower['input'] for name, tower in self.manifest['towers'].items()}
        self.outputs = {name: tower['outputs'] for name, tower in self.manifest['towers'].items()}
        self._towers: dict[str, Any] = {}

    def embed(self, **inputs: Any) -> dict[str, dict[str, np.ndarray]]:
        """Embeddings of batches.

        Args:
            inputs: `video`, `audio` (arrays as `inputs` describes them) or `text` (sentences, or
                word numbers [B L]).

        Returns:
            {modality: {'pooled': [B D], <common space>: [B E] of unit length}}, float32.

        Raises:
            ValueError: there is no such tower, or an array is of another form.
        """
        embedded = {}
        for name, value in inputs.items():
            embedded[name] = self._run(name, value)
            embedded[name].pop('logits', None)
        return embedded

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """Class scores of a fine-tuned model.

        Args:
            inputs: the one input that the model was fine-tuned on, as of `embed`.

        Returns:
            {'names': the P class names, 'logits': float32 [B P], 'scores': float32 [B P],
            probabilities, 'predicted': the most probable name of each row}.

        Raises:
            ValueError: the tower has no classifier, or as of `embed`.
        """
        classifiers = {}
        for name, tower in self.manifest['towers'].items():
            if 'classifier' in tower:
                classifiers[name] = tower['classifier']
        if len(inputs) != 1 or not set(inputs) <= set(classifiers):
            expected = ', '.join(f'{name}=' for name in classifiers) or 'a model with a classifier'
            raise ValueError(f'predict: expected {expected}, got {", ".join(inputs) or "nothing"}')
        ((name, value),) = inputs.items()
        logits = self._run(name, value)['logits']
        if classifiers[name]['form'] == 'softmax':
            scores = np.asarray(jax.nn.softmax(logits, -1))
        else:
            scores = np.asarray(jax.nn.sigmoid(logits))
        names = classifiers[name]['names']
        predicted = [names[best] for best in scores.argmax(-1)]
        return {'names': names, 'logits': logits, 'scores': scores, 'predicted': predicted}

    def _run(self, name: str, value: Any) -> dict[str, np.ndarray]:
        """All outputs of a tower."""
        if name not in self.inputs:
            raise ValueError(f'expected one of {", ".join(self.inputs)}, got {name}=')
        if name == 'text' and not isinstance(value, np.ndarray):
            value = self.tokenize(value)
        value = np.asarray(value)
        self._check(name, value)
        call, variables = self._tower(name)
        return {key: np.asarray(x) for key, x in call(variables, value).items()}

    def _tower(self, name: str) -> Any:
        """(program, its weights), read once."""
        if name not in self._towers:
            program = self.folder / self.manifest['towers'][name]['program']
            exported = jax.export.deserialize(bytearray(program.read_bytes()))
            with np.load(self.folder / self.manifest['towers'][name]['weights']) as file:
                weights = {key: jax.numpy.asarray(file[key]) for key in file.files}
            self._towers[name] = (jax.jit(exported.call), weights)
        return self._towers[name]

    def _check(self, name: str, value: np.ndarray) -> None:
        expected = self.inputs[name]
        fits = value.dtype == expected['dtype'] and value.ndim == len(expected['shape'])
        for length, limit in zip(value.shape, expected['shape']):
            # Letters are lengths that may be anything.
            if isinstance(limit, int) and length != limit:
                fits = False
        if not fits:
            raise ValueError(
                f'{name}: expected {expected["dtype"]} {expected["shape"]} ({expected["meaning"]}),'
                f' got {value.dtype} {list(value.shape)}'
            )

    def tokenize(self, sentences: list[str]) -> np.ndarray:
        """int32 [B L]: the word numbers of sentences, 0 where they have ended.

        Raises:
            ValueError: the export carries no tokenizer.
            ImportError: it is of a kind that needs a package.
        """
        spec = self.manifest.get('tokenizer')
        if not spec:
            raise ValueError('text: expected word numbers [B L]; this export has no tokenizer')
        if isinstance(sentences, str):
            sentences = [sentences]
        length = self.inputs['text']['shape'][1]
        begin, end, padding = _marks(spec)
        rows = np.full((len(sentences), length), padding, np.int32)
        for row, numbers in zip(rows, _word_numbers(spec, list(sentences))):
            room = length - len(begin) - len(end)
            numbers = [*begin, *numbers[:room], *end]
            row[: len(numbers)] = numbers
        return rows


def _marks(spec: dict[str, Any]) -> tuple[list[int], list[int], int]:
    """What stands before and behind the words of a sentence, and what fills it up."""
    if spec['kind'] == 'clip':
        return [spec['size'] - 2], [spec['size'] - 1], 0
    if spec['kind'] == 'siglip':
        return [], [1], 1
    return [], [], 0


def _word_numbers(spec: dict[str, Any], sentences: list[str]) -> Any:
    kind = spec['kind']
    if kind == 'words':
        first = spec.get('first', 2)
        number = {word: i + first for i, word in enumerate(spec['vocabulary'])}
        unknown = spec.get('unknown', 1)
        numbers = []
        for sentence in sentences:
            words = sentence.translate(_PUNCTUATION).lower().split()
            numbers.append([number.get(word, unknown) for word in words])
        return numbers
    if kind in ('wordpiece', 'clip'):
        import html

        import tokenizers

        if kind == 'clip':
            sentences = [html.unescape(html.unescape(text)).strip() for text in sentences]

        model = tokenizers.Tokenizer.from_str(spec['model'])
        encodings = model.encode_batch(sentences, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    import base64

    import sentencepiece

    if kind == 'siglip':
        sentences = [sentence.lower() for sentence in sentences]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(spec['model']))
    return pieces.encode(sentences)
