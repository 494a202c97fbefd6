"""Named datasets of still images with classes: ImageNet, and any folders of classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from data_pipelines import media
from data_pipelines.datasets.named_dataset import AnnotationFolder, Dataset, numbered, segment
from data_pipelines.errors import DataError
from data_pipelines.preparation.media_catalog import Clip

_SPLIT_FOLDERS = ('train', 'val', 'validation')


class ImageNet(Dataset):
    """An image is a record of one frame; a clip repeats it (deflation in evaluation, inflation in
    fine-tuning). Label `class`: folders below train and val, alphabetical, which is the usual
    numbering. Splits train and validation. The folders may also lie below ILSVRC/Data/CLS-LOC.

        train/WNID/*.JPEG            ILSVRC2012_img_train.tar, and the archives in it, unpacked
        val/WNID/*.JPEG              ILSVRC2012_img_val.tar, sorted into class folders
        or val/*.JPEG and LOC_val_solution.csv
                                     as the images come, with the list of their classes
        LOC_synset_mapping.txt       optional: names of the classes
    """

    name = 'imagenet'
    title = 'ImageNet (ILSVRC2012): 1,280,000 images of 1000 classes'
    suffixes = media.IMAGES

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        listed_wnids = self._read_solution(folder)
        # Twice through the images: a list of them all would be longer than memory.
        # Sorted WordNet ids are the numbering of torchvision and Keras, but not that of the ILSVRC
        # development kit.
        wnids = sorted({wnid for _, _, wnid in self._images(folder, listed_wnids)})
        if not wnids:
            raise DataError(
                f'imagenet: no image below a folder train or val in {folder.root}; '
                '--dataset=imagenet --help says what to place there'
            )
        number_of = numbered(wnids)
        class_names = read_class_names(folder)
        clips = (
            Clip([path], split, [segment({'class': number_of[wnid]})])
            for path, split, wnid in self._images(folder, listed_wnids)
        )
        return clips, {'class': [class_names.get(wnid, wnid) for wnid in wnids]}

    def _images(
        self, folder: AnnotationFolder, listed_wnids: Mapping[str, str]
    ) -> Iterator[tuple[str, str, str]]:
        """(path, split, WordNet id) of each image.

        Args:
            folder: of the dataset.
            listed_wnids: as of `_read_solution`.
        """
        # Folders are the annotation here, so the media files themselves are walked through.
        for path in folder.files.ids():
            parts = path.split('/')
            depth = _split_folder_depth(parts[:-1])
            if depth is None:
                continue
            # The official test images have no public labels, so there is no test split.
            split = 'train' if parts[depth] == 'train' else 'validation'
            class_folders = parts[depth + 1 : -1]
            if class_folders:
                # train/n01440764/n01440764_10026.JPEG
                wnid: str | None = class_folders[0]
            else:
                # val/ILSVRC2012_val_00000001.JPEG, as the archive unpacks: the list has names
                # without suffix.
                wnid = listed_wnids.get(parts[-1].rpartition('.')[0])
            if wnid is None:
                raise DataError(
                    f'imagenet: {path} is in no class folder and LOC_val_solution.csv does not '
                    f'list it; place that file in {folder.root}'
                )
            yield path, split, wnid

    def _read_solution(self, folder: AnnotationFolder) -> dict[str, str]:
        """Image name -> WordNet id of the validation images; empty without the file."""
        path = folder.find_optional('LOC_val_solution.csv')
        if path is None:
            return {}
        wnids = {}
        for _, row in folder.table(path, ('imageid', 'predictionstring')):
            # 'n03995372 85 1 499 272': the class, and the box of the object.
            wnids[row['imageid']] = row['predictionstring'].split(' ')[0]
        return wnids


class ClassFolders(Dataset):
    """Pictures in folders of classes: the robustness sets of ImageNet, or one's own. A picture is a
    record of one frame. Label `class`: the folders that hold pictures, in alphabetical order, or by
    number where all are numbers (ImageNet-V2 has 0 to 999). A set with a part of ImageNet's classes
    has these alone; the evaluator zero_shot finds their names by id (docs/clip.md). Split test;
    pictures below folders train, val and test are in these splits.

        anywhere: CLASS/*.JPEG (or jpg, png, webp)     imagenet-r/WNID, imagenet-a/WNID,
                                                       sketch/WNID, imagenetv2-…-format-val/NUMBER
        LOC_synset_mapping.txt                         optional: names of the classes
    """

    name = 'class_folders'
    title = 'Pictures in folders of classes: ImageNet-R, -A, -Sketch, -V2, and your own'
    suffixes = media.IMAGES

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        classes: set[str] = set()
        for path in folder.files.ids():
            parts = path.split('/')
            if len(parts) > 1:
                classes.add(parts[-2])
            else:
                folder.skipped[path] = 'in no class folder'
        if not classes:
            raise DataError(
                f'class_folders: no picture of {folder.media_root} is in a folder of its class'
            )
        names = sorted(classes)
        if all(name.isdecimal() and name.isascii() for name in names):
            names.sort(key=int)
        number_of = numbered(names)
        class_names = read_class_names(folder)
        clips = (
            Clip([path], split_of(path), [segment({'class': number_of[path.split('/')[-2]]})])
            for path in folder.files.ids()
            if '/' in path
        )
        return clips, {'class': [class_names.get(name, name) for name in names]}


def split_of(path: str) -> str:
    """The split of a picture below its folder; test where no folder above its class says it."""
    folders = path.split('/')[:-2]
    depth = _split_folder_depth(folders, (*_SPLIT_FOLDERS, 'test'))
    if depth is None or folders[depth] == 'test':
        return 'test'
    return 'train' if folders[depth] == 'train' else 'validation'


def read_class_names(folder: AnnotationFolder) -> dict[str, str]:
    """WordNet id -> line with id and names of LOC_synset_mapping.txt; empty without the file."""
    path = folder.find_optional('LOC_synset_mapping.txt')
    if path is None:
        return {}
    # 'n01440764 tench, Tinca tinca'; with the id, as classes may share a name (crane).
    return {line.split(' ')[0]: line for _, line in folder.lines(path)}


def _split_folder_depth(folders: list[str], names: tuple[str, ...] = _SPLIT_FOLDERS) -> int | None:
    """Position of the first folder that is named like a split."""
    # From the top: a class folder below may have any name.
    for depth, name in enumerate(folders):
        if name in names:
            return depth
    return None
