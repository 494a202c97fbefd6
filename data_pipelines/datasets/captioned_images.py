"""Named datasets of pictures with several captions each: COCO and Flickr30k."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines import media
from data_pipelines.datasets.named_dataset import AnnotationFolder, Dataset, described
from data_pipelines.errors import DataError
from data_pipelines.preparation.media_catalog import Clip
from data_pipelines.preparation.values import is_missing

# Karpathy's names of splits -> ours; restval is what he left of COCO's validation.
_SPLITS = {'train': 'train', 'restval': 'train', 'val': 'validation', 'test': 'test'}


class CocoCaptions(Dataset):
    """COCO with its owners' splits: train and validation. A picture is a record of one frame; all
    its captions (five to seven) count in retrieval. For Karpathy's splits, in which retrieval is
    published, take `coco_karpathy`.

        annotations/captions_train2017.json      of annotations_trainval2017.zip; or 2014
        annotations/captions_val2017.json
        train2017/*.jpg, val2017/*.jpg           of the archives of these names
    """

    name = 'coco_captions'
    title = "COCO captions, the owners' splits: 123,000 pictures with five sentences each"
    suffixes = media.IMAGES

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        paths = folder.find_all('captions_train20*.json', 'captions_val20*.json')
        years = {path.stem[-4:] for path in paths}
        if len(years) > 1:
            raise DataError(
                f'coco_captions: annotations of {" and ".join(sorted(years))} are in '
                f'{folder.root}; the two hold the same pictures: leave one year'
            )
        if not paths:
            # Raises: there is none.
            folder.find_one('captions_train2017.json', 'captions_val2017.json')
        clips: list[Clip] = []
        for path in paths:
            split = 'train' if path.stem.startswith('captions_train') else 'validation'
            pictures = path.stem.removeprefix('captions_')  # the folder: train2017
            clips += self._clips(folder, path, split, pictures)
        return clips, {}

    def _clips(
        self, folder: AnnotationFolder, path: pathlib.Path, split: str, pictures: str
    ) -> Iterator[Clip]:
        """The pictures of one annotation file."""
        content = folder.json(path, 'images', 'annotations')
        captions: dict[int, list[str]] = {}
        try:
            for entry in content['annotations']:
                captions.setdefault(entry['image_id'], []).append(entry['caption'])
            for image in content['images']:
                name = image['file_name']
                known = {'image_id': image['id']}
                texts = _texts(captions.get(image['id'], []))
                yield described([f'{pictures}/{name}', name], split, texts, ground_truth=known)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'coco_captions: {path}: expected "images" with "id" and "file_name", and '
                f'"annotations" with "image_id" and "caption" ({type(error).__name__}: {error})'
            ) from None


class Karpathy(Dataset):
    """COCO in the splits of Karpathy & Fei-Fei (2015), in which retrieval is published: 113,287
    pictures for training, 5,000 each for validation and test. A picture is a record of one frame;
    all its captions (five to seven) count in retrieval (docs/clip.md).

        dataset_coco.json                        of caption_datasets.zip (Karpathy's)
        train2014/*.jpg, val2014/*.jpg           of COCO's archives of these names
    """

    name = 'coco_karpathy'
    title = "COCO captions, Karpathy's splits: 123,000 pictures with five sentences each"
    suffixes = media.IMAGES
    file = 'dataset_coco.json'

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        path = folder.find_one(self.file)
        content = folder.json(path, 'images')
        clips = []
        try:
            for number, image in enumerate(content['images']):
                where = f'{path}: picture {number}'
                split = folder.look_up(image['split'], _SPLITS, where, 'split')
                texts = _texts([sentence['raw'] for sentence in image['sentences']])
                clips.append(described(_names(image), split, texts, ground_truth=_known_of(image)))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{self.name}: {path}: expected "images" with "filename", "split" and "sentences" '
                f'with "raw" ({type(error).__name__}: {error})'
            ) from None
        return clips, {}


class Flickr30k(Karpathy):
    """Flickr30k in the splits of Karpathy & Fei-Fei (2015), in which retrieval is published:
    29,000 pictures for training, 1,014 for validation and 1,000 for test. A picture is a record of
    one frame; all its five captions count in retrieval (docs/clip.md).

        dataset_flickr30k.json          of caption_datasets.zip (Karpathy's)
        or results_20130124.token       of the owners' archive; it has no splits: --validation and
                                        --test hold out a share
        flickr30k-images/*.jpg          of the owners' archive
    """

    name = 'flickr30k'
    title = "Flickr30k, Karpathy's splits: 31,000 pictures with five sentences each"
    file = 'dataset_flickr30k.json'

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        if folder.find_optional(self.file) is not None:
            return super().clips(folder)
        path = folder.find_one(self.file, 'results_20130124.token')
        captions: dict[str, list[str]] = {}
        for where, line in folder.lines(path):
            # '1000092795.jpg#0<tab>Two young guys with shaggy hair …'
            name, hash_sign, rest = line.partition('#')
            if not hash_sign or '\t' not in rest:
                raise DataError(
                    f'flickr30k: {where}: expected NAME.jpg#NUMBER, a tab and a caption'
                )
            captions.setdefault(name, []).append(rest.partition('\t')[2])
        return [described([name], '', _texts(texts)) for name, texts in captions.items()], {}


def _names(image: Mapping[str, Any]) -> list[str]:
    """What the file of a picture may be called; COCO's are in folders."""
    name = image['filename']
    return [f'{image["filepath"]}/{name}', name] if image.get('filepath') else [name]


def _known_of(image: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a picture in its owners' files."""
    return {field: image[field] for field in ('cocoid', 'imgid') if field in image}


def _texts(captions: list[Any]) -> list[str]:
    """The captions that are there. COCO has some with line ends in them."""
    return [' '.join(str(text).split()) for text in captions if not is_missing(text)]
