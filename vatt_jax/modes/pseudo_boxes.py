"""--mode=pseudo_boxes: pictures of a split with boxes and classes found by sound, as COCO has them.

What a detector learns from: one box a picture around the largest component of its heat map, and
the class that picture and sound together speak for (docs/detection.md).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.detection.boxes import find_boxes, upsample
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.objectives import Objective
from vatt_jax.objectives.localisation import HEAT
from vatt_jax.run_folder import RunFolder, writing
from vatt_jax.training import checkpoint, frozen_base, loop, train_state

FILE, PICTURES = 'pseudo_boxes.json', 'images'


@dataclasses.dataclass(frozen=True)
class Options:
    """How boxes are made.

    Attributes:
        split: of config.data.eval.
        beta: of the threshold β · maximum + (1 - β) · mean.
        most: boxes of a picture; 1 is the paper's.
        score: boxes whose highest cosine is lower are left out.

    Raises:
        ConfigError: one is out of range.
    """

    split: str = 'train'
    beta: float = 0.5
    most: int = 1
    score: float = -1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ConfigError(f'--beta: expected a share from 0 to below 1, got {self.beta:g}')
        if self.most < 1:
            raise ConfigError(f'--boxes: expected a positive number, got {self.most}')
        if not -1 <= self.score <= 1:
            raise ConfigError(f'--score: expected a cosine from -1 to 1, got {self.score:g}')


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], Any],
    out: str,
    options: Options,
) -> None:
    """Writes <out>/pseudo_boxes.json and <out>/images/ with the newest checkpoint.

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
    encoder, objective = _restored(config, data, workdir)
    batches = data.one_pass(options.split, config.batch_size, by='segments')
    with writing(folder):
        document = write(folder, encoder, objective, batches, options)
    counts = f'{len(document["annotations"])} boxes in {len(document["images"])} pictures'
    print(f'{counts} → {folder / FILE}')


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
    encoder: FeatureExtractor,
    objective: Objective,
    batches: Iterator[Mapping[str, Any]],
    options: Options,
) -> dict[str, Any]:
    """Writes pictures and boxes of a pass, and returns what the json file holds.

    Pictures without a box that is sure enough are not written.

    Args:
        folder: where to write.
        encoder: the model with its heads.
        objective: what it learnt.
        batches: host batches of the pass.
        options: how boxes are made.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    c = objective.config
    names = [f'cluster {number}' for number in range(c.clusters)]
    categories = [{'id': number + 1, 'name': name} for number, name in enumerate(names)]
    document: dict[str, Any] = {'images': [], 'annotations': [], 'categories': categories}
    for batch in batches:
        features = encoder(batch, (c.picture,))
        clusters = features['predictions']['cluster/0'].argmax(-1)  # [B]
        is_pair = batch['valid'] & batch[c.picture]['valid'] & batch[c.sound]['valid']
        for row in np.flatnonzero(is_pair):
            # Of several frames, the first.
            seen = _seen(batch[c.picture]['data'][row, 0], batch[c.picture]['box'][row])
            heat = features['heat_maps'][HEAT][row, 0]
            place = int(batch['position'][row])
            _add(document, folder, seen, heat, int(clusters[row]), place, options)
    if not document['images']:
        raise ConfigError(
            f'--mode=pseudo_boxes: no picture of split {options.split!r} has a box with a score of '
            f'{options.score:g}; try a lower --score'
        )
    (folder / FILE).write_text(json.dumps(document))
    return document


def _seen(
    picture: UInt8[np.ndarray, 'H W 3'], crop: Float[np.ndarray, ' 4']
) -> UInt8[np.ndarray, 'H2 W2 3']:
    """What the model sees of a picture, in the pixels it came in."""
    height, width = picture.shape[:2]
    y0, x0, y1, x1 = np.round(crop * [height, width, height, width]).astype(int)
    return picture[y0:y1, x0:x1]


def _add(
    document: dict[str, Any],
    folder: pathlib.Path,
    picture: UInt8[np.ndarray, 'H W 3'],
    heat: Float[np.ndarray, 'h w'],
    cluster: int,
    place: int,
    options: Options,
) -> None:
    """Adds a picture with its boxes to the document, and writes it."""
    from PIL import Image

    height, width = picture.shape[:2]
    found = find_boxes(upsample(heat.astype(np.float64), height, width), options.beta, options.most)
    is_sure = found.scores >= options.score
    if not is_sure.any():
        return
    name = f'{options.split}_{place:08d}.png'
    Image.fromarray(picture).save(folder / PICTURES / name)
    image_id = len(document['images']) + 1
    document['images'].append(
        {'id': image_id, 'file_name': name, 'width': width, 'height': height, 'example': place}
    )
    pixels = found.boxes * [height, width, height, width]
    for (y0, x0, y1, x1), score in zip(pixels[is_sure].tolist(), found.scores[is_sure].tolist()):
        bbox = [round(edge, 3) for edge in (x0, y0, x1 - x0, y1 - y0)]
        annotation = {
            'id': len(document['annotations']) + 1,
            'image_id': image_id,
            'category_id': cluster + 1,
            'bbox': bbox,
            'score': round(score, 6),
            'area': round(bbox[2] * bbox[3], 3),
            'iscrowd': 0,
        }
        document['annotations'].append(annotation)
