"""--mode=embed: embeddings of a split of the evaluation data, as npz."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped
from ml_collections import ConfigDict

from vatt_jax.inference import feature_extractor
from vatt_jax.modes.own_tokenizer import with_own_tokenizer
from vatt_jax.parallel import distributed, sharding
from vatt_jax.run_folder import RunFolder, writing
from vatt_jax.training import checkpoint

# Fields of config.data that choose the records of a split.
DATA_FIELDS = ('source', 'train', 'eval', 'make', 'npz', 'synthetic_size')
TEXTS_AT_ONCE = 4096  # entries of `data.texts` in memory


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], Any],
    split: str = 'test',
) -> None:
    """Writes <workdir>/embeddings/<split>.npz, see `as_arrays`, with the newest checkpoint.

    `source` in it says which data they are of (JSON of config.data), and which model where it is
    not the student. Where that file is of others, they go to <split>_<digest of both>.npz beside
    it.

    Args:
        config: names the data, the mesh and the batch size; the model is the stored run's.
        workdir: the run folder.
        open_data: config -> data object.
        split: of config.data.eval.

    Raises:
        ConfigError: the folder holds no checkpoint.
    """
    mesh = sharding.make_mesh(dict(config.mesh))
    # The encoder follows the stored config, whatever model the given one names.
    stored_config, variables, _ = checkpoint.load_model(workdir, mesh, which=config.evaluated)
    data = open_data(with_own_tokenizer(config, workdir))
    batches = data.one_pass(
        split,
        config.batch_size,
        process=(jax.process_index(), jax.process_count()),
        by='segments',
    )
    # Every process takes part, and each gets the features of all.
    features = feature_extractor.compute_features(
        feature_extractor.FeatureExtractor(stored_config, variables, mesh), batches
    )
    arrays = as_arrays(features, data.texts(split, by='segments'))
    if distributed.is_main():
        path = RunFolder(workdir).embeddings(split)
        source = _source_of(config)
        if _is_of_another(path, source):
            # Whoever embeds a second dataset has not asked to lose the first one's.
            path = path.with_name(f'{split}_{_digest(source)}.npz')
        path.parent.mkdir(parents=True, exist_ok=True)
        # numpy appends .npz to any other ending.
        temporary = path.with_name(f'{path.stem}.tmp.npz')
        arrays['source'] = np.array(source)
        # NumPy declares a flag among the keywords that are names of arrays.
        with writing(path):
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        print(f'{len(features["index"])} examples → {path}')


def _source_of(config: ConfigDict) -> str:
    """What says which data were embedded, and by which model (JSON)."""
    data = config.data
    fields = {name: data[name] for name in DATA_FIELDS}
    if config.evaluated != 'student':
        fields['evaluated'] = config.evaluated
    # `default` is for ConfigDicts.
    return json.dumps(fields, sort_keys=True, default=dict)


def _is_of_another(path: pathlib.Path, source: str) -> bool:
    """Whether a file holds embeddings of other data."""
    if not path.exists():
        return False
    try:
        with np.load(path) as stored:
            # Files from before this field are taken for the run's own.
            return 'source' in stored.files and str(stored['source']) != source
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def as_arrays(
    features: Mapping[str, Any], texts: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Features of a pass as flat names.

    Args:
        features: of `feature_extractor.compute_features`.
        texts: what the data say in words of each example of the pass.

    Returns:
        pooled/<stream> [N D], space/<space>/<stream> [N E], labels/<name> [N ...],
        valid/<stream> [N], mask/<text stream> [N K], which of the K candidate sentences a clip
        has, and index, id, start [N].
    """
    index = features['index']
    arrays = {}
    for stream, pooled in features['pooled'].items():
        arrays[f'pooled/{stream}'] = pooled
    for space, members in features['spaces'].items():
        for stream, embedding in members.items():
            arrays[f'space/{space}/{stream}'] = embedding
    for name, label in features['labels'].items():
        arrays[f'labels/{name}'] = label
    arrays['index'] = index
    for stream, is_valid in features['valid'].items():
        arrays[f'valid/{stream}'] = is_valid
    for stream, has_candidate in features['mask'].items():
        arrays[f'mask/{stream}'] = has_candidate
    arrays['id'], arrays['start'] = _ids_and_starts(texts, index)
    return arrays


def _ids_and_starts(
    texts: Sequence[Mapping[str, Any]], index: Int[np.ndarray, ' N']
) -> tuple[Shaped[np.ndarray, ' N'], Float[np.ndarray, ' N']]:
    """Id and start in seconds of the examples at these places of a pass.

    Examples that could not be read are missing from `index`.
    """
    ids = []
    starts = []
    # Block by block: an entry has all sentences of its example, and is needed for a moment only. A
    # split without examples is one empty block.
    for begin in range(0, max(len(index), 1), TEXTS_AT_ONCE):
        block = [texts[i] for i in index[begin : begin + TEXTS_AT_ONCE]]
        ids.append(np.array([text['id'] for text in block]))
        starts.append(np.array([text['start'] for text in block]))
    # Strings become as wide as the widest of all blocks.
    return np.concatenate(ids), np.concatenate(starts)
