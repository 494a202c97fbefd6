"""--mode=pseudo_boxes: pictures of splits with boxes and classes found by sound, as COCO has them.

What a detector learns from: one box a picture around the largest component of its heat map, and
the class that picture and sound together speak for; or true boxes or classes in the place of these
(docs/detection.md).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose
from vatt_jax.detection import coco, pseudo_labels
from vatt_jax.detection.pseudo_labels import Label, Rules
from vatt_jax.detection.true_objects import Objects, inside, objects_at
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.objectives import Objective
from vatt_jax.objectives.localisation import HEAT
from vatt_jax.run_folder import RunFolder, writing
from vatt_jax.training import checkpoint, frozen_base, loop, train_state

# The label of the data whose classes true objects have.
LABEL = 'object'


@dataclasses.dataclass(frozen=True)
class Options:
    """How boxes are made.

    Attributes:
        splits: of config.data.eval.
        beta: see pseudo_labels.Rules.
        most: see pseudo_labels.Rules.
        score: see pseudo_labels.Rules.
        true: entry of pseudo_labels.TRUE.

    Raises:
        ConfigError: one is out of range.
    """

    splits: tuple[str, ...] = ('train',)
    beta: float = 0.5
    most: int = 1
    score: float = -1.0
    true: str = ''

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ConfigError(f'--beta: expected a share from 0 to below 1, got {self.beta:g}')
        if self.most < 1:
            raise ConfigError(f'--boxes: expected a positive number, got {self.most}')
        if not -1 <= self.score <= 1:
            raise ConfigError(f'--score: expected a cosine from -1 to 1, got {self.score:g}')
        if self.true:
            choose(self.true, pseudo_labels.TRUE[1:], '--true')
        if not all(self.splits) or len(set(self.splits)) < len(self.splits):
            raise ConfigError(
                f'--split: expected splits with commas, each once, got {",".join(self.splits)!r}'
            )

    @property
    def rules(self) -> Rules:
        return Rules(self.beta, self.most, self.score)


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], Any],
    out: str,
    options: Options,
) -> None:
    """Writes <out>/SPLIT.json and <out>/images/ with the newest checkpoint.

    Args:
        config: of the run.
        workdir: the run folder.
        open_data: config -> data object.
        out: the folder to make.
        options: how boxes are made.

    Raises:
        ConfigError: the folder is there and not empty, the run has another objective, or no
            checkpoint, or no picture has a box.
    """
    folder = _new_folder(out)
    if config.objective.name != 'localisation':
        raise ConfigError(
            f"--mode=pseudo_boxes reads heat maps of config.objective.name='localisation', got a "
            f'run of {config.objective.name!r}'
        )
    checkpoint.find(workdir)  # before the data are made
    data = open_data(config)
    if options.true in ('classes', 'all') and LABEL not in data.info['labels']:
        raise ConfigError(f'--true={options.true}: the data have no label {LABEL!r}')
    encoder, objective = _restored(config, data, workdir)
    with writing(folder):
        for split in options.splits:
            document = write(folder, split, encoder, objective, data, options)
            counts = f'{len(document["annotations"])} boxes in {len(document["images"])} pictures'
            print(f'{counts} → {folder / split}.json')


def _new_folder(out: str) -> pathlib.Path:
    if not out:
        raise ConfigError('--mode=pseudo_boxes makes a folder; name it with --out')
    if jax.process_count() > 1:
        raise ConfigError(
            '--mode=pseudo_boxes works in one process, this is one of '
            f'{jax.process_count()}; all devices of one machine are used'
        )
    folder = pathlib.Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f'--out={out}: expected a new or empty folder, it holds files')
    return folder


def _restored(
    config: ConfigDict, data: Any, workdir: pathlib.Path
) -> tuple[FeatureExtractor, Objective]:
    """The newest model of a run with its heads, which need the objective's state."""
    built = loop.build(config, data)
    step = loop.newest_sound(workdir)
    if step is None:
        raise ConfigError(f'--workdir={workdir} holds no checkpoint; train first')
    checkpoints = checkpoint.Checkpoints(RunFolder(workdir).checkpoints, config.checkpoint)
    with jax.set_mesh(built.mesh):
        state, _, _ = frozen_base.restore(checkpoints, step, built, config)
    checkpoints.close()
    variables = train_state.evaluation_variables(state, built.objective, config.evaluated)
    heads = (state.params['objective'], state.objective)
    encoder = FeatureExtractor(config, variables, built.mesh, built.objective, *heads)
    return encoder, built.objective


def write(
    folder: pathlib.Path,
    split: str,
    encoder: FeatureExtractor,
    objective: Objective,
    data: Any,
    options: Options,
) -> coco.Document:
    """Writes pictures and boxes of a split, and returns what the json file holds.

    Pictures without a box are not written.

    Args:
        folder: where to write.
        split: of config.data.eval.
        encoder: the model with its heads.
        objective: what it learnt.
        data: the data object.
        options: how boxes are made.
    """
    (folder / coco.IMAGES).mkdir(parents=True, exist_ok=True)
    c = objective.config
    clusters = [f'cluster {number}' for number in range(c.clusters)]
    names = data.info['labels'][LABEL] if options.true in ('classes', 'all') else clusters
    document: coco.Document = {'images': [], 'annotations': []}
    texts = data.texts(split, by='segments') if options.true else None
    for batch in data.one_pass(split, encoder.config.batch_size, by='segments'):
        features = encoder(batch, (c.picture,))
        found = features['predictions']['cluster/0'].argmax(-1)  # [B]
        is_pair = batch['valid'] & batch[c.picture]['valid'] & batch[c.sound]['valid']
        for row in np.flatnonzero(is_pair).tolist():
            # Of several frames, the first.
            seen = _seen(batch[c.picture]['data'][row, 0], batch[c.picture]['box'][row])
            heat, cluster = features['heat_maps'][HEAT][row, 0], int(found[row])
            objects = _objects(texts, batch, row, encoder.config, c) if texts is not None else None
            labels = _labels(heat, cluster, seen.shape[:2], objects, names, options)
            if labels:
                _add(document, folder, split, seen, labels, int(batch['position'][row]))
    if not document['images']:
        raise ConfigError(
            f'--mode=pseudo_boxes: no picture of split {split!r} has a box with a score of '
            f'{options.score:g}; try a lower --score'
        )
    document['categories'] = coco.make_categories(names)
    coco.write(folder / f'{split}.json', document)
    return document


def _seen(
    picture: UInt8[np.ndarray, 'H W 3'], crop: Float[np.ndarray, ' 4']
) -> UInt8[np.ndarray, 'H2 W2 3']:
    """What the model sees of a picture, in the pixels it came in."""
    height, width = picture.shape[:2]
    y0, x0, y1, x1 = np.round(crop * [height, width, height, width]).astype(int)
    return picture[y0:y1, x0:x1]


def _objects(
    texts: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Any],
    row: int,
    config: ConfigDict,
    fields: Any,
) -> Objects:
    """The true objects of a picture, in what the model sees.

    Args:
        texts: of the segments, which hold the truth.
        batch: host batch.
        row: of the picture.
        config: of the run.
        fields: of the objective.
    """
    truth = json.loads(texts[int(batch['index'][row])].get('ground_truth') or '{}')
    if 'kinds' not in truth or 'sounds' not in truth:
        raise ConfigError(
            '--true: records hold no true boxes (ground_truth with boxes, kinds, sounds and fps); '
            'make the playground anew, or leave --true out'
        )
    picture, sound = batch[fields.picture], config.model.inputs.audio
    objects = objects_at(truth, float(picture['start'][row]), sound.samples / sound.rate)
    return dataclasses.replace(objects, boxes=inside(objects.boxes, picture['box'][row]))


def _labels(
    heat: Float[np.ndarray, 'h w'],
    cluster: int,
    size: tuple[int, int],
    objects: Objects | None,
    class_names: Sequence[str],
    options: Options,
) -> list[Label]:
    """Boxes and classes of a picture, as `options.true` says."""
    if objects is not None and options.true == 'all':
        categories = [class_names.index(kind) for kind in objects.kinds]
        return pseudo_labels.true_labels(objects, categories)
    if objects is not None and options.true == 'boxes':
        heard = objects.heard()
        return pseudo_labels.true_labels(heard, [cluster] * len(heard.boxes))
    found = pseudo_labels.found_labels(heat, cluster, *size, options.rules)
    if objects is None:
        return found
    return pseudo_labels.with_true_classes(found, objects.heard(), class_names)


def _add(
    document: coco.Document,
    folder: pathlib.Path,
    split: str,
    picture: UInt8[np.ndarray, 'H W 3'],
    labels: Sequence[Label],
    place: int,
) -> None:
    """Adds a picture with its boxes to the document, and writes it."""
    from PIL import Image

    height, width = picture.shape[:2]
    name = f'{split}_{place:08d}.png'
    Image.fromarray(picture).save(folder / coco.IMAGES / name)
    image = coco.make_image(len(document['images']) + 1, name, width, height)
    document['images'].append({**image, 'example': place})
    for label in labels:
        y0, x0, y1, x1 = label.box * [height, width, height, width]
        box = [round(float(edge), 3) for edge in (x0, y0, x1 - x0, y1 - y0)]
        number = len(document['annotations']) + 1
        annotation = coco.make_annotation(
            number, image['id'], label.category + 1, box, **label.fields
        )
        document['annotations'].append(annotation)
