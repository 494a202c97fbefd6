"""Named datasets, from the files and annotation formats that their owners distribute.

    python -m data_pipelines.prepare --dataset=NAME --manual_dir=FOLDER --out=data/NAME/records

Nothing is downloaded. The datasets are classes in `actions`, `sounds`, `captioned`, `images`,
`captioned_images`, `image_lists` and `shards`; the docstring of a class is its page in
docs/datasets.md, which `python -m data_pipelines.datasets.named` prints, and of
`prepare --dataset=NAME --help`. A new dataset is a class in one of these files and a line in
DATASETS below.
"""

from __future__ import annotations

import hashlib
import inspect
import pathlib

from data_pipelines.datasets.actions import HMDB51, UCF101, Kinetics, MomentsInTime
from data_pipelines.datasets.captioned import MSRVTT, HowTo100M, YouCook2
from data_pipelines.datasets.captioned_images import CocoCaptions, Flickr30k, Karpathy
from data_pipelines.datasets.image_lists import ImageLists
from data_pipelines.datasets.images import ClassFolders, ImageNet
from data_pipelines.datasets.named_dataset import AnnotationFolder, Dataset
from data_pipelines.datasets.shards import WebDataset
from data_pipelines.datasets.sounds import AVE, ESC50, AudioSet, VGGSound
from data_pipelines.errors import DataError
from data_pipelines.preparation import media_catalog
from data_pipelines.preparation.file_names import NameResolver
from data_pipelines.preparation.store import Store
from vatt_jax.terminal import use_plain_characters

# In the order in which docs/datasets.md shows them.
DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        UCF101(),
        HMDB51(),
        # The number of clips is for the title alone; many have disappeared from the web.
        Kinetics(400, '300,000'),
        Kinetics(600, '480,000'),
        Kinetics(700, '650,000'),
        MomentsInTime(),
        ESC50(),
        AudioSet(),
        VGGSound(),
        AVE(),
        YouCook2(),
        # Two divisions of the same clips.
        MSRVTT(official=False),
        MSRVTT(official=True),
        HowTo100M(),
        ImageNet(),
        ClassFolders(),
        CocoCaptions(),
        Karpathy(),
        Flickr30k(),
        ImageLists(),
        WebDataset(),
    )
}


def read(
    name: str,
    manual_dir: str,
    videos: str = '',
    encoding: str = '',
    store: Store | None = None,
) -> media_catalog.MediaCatalog:
    """Catalog the media files of a named dataset with what its annotation files say of them.

    Args:
        name: of the dataset.
        manual_dir: folder of the annotation files, and of the media files too.
        videos: folder of the media files, if they are elsewhere.
        encoding: of annotation files that are neither UTF-8 nor UTF-16, '' to refuse them.
        store: where the catalog is kept; None for one of its own.

    Raises:
        DataError: if files are missing or malformed.
    """
    dataset = get_dataset(name)
    root = pathlib.Path(manual_dir)
    if not manual_dir or not root.is_dir():
        raise DataError(
            f'--manual_dir={manual_dir} is not a folder; it holds the files of {name} '
            f'(--dataset={name} --help says which)'
        )
    # Also files that no annotation names: they are counted as unused.
    store = store or Store()
    media_root = pathlib.Path(videos or manual_dir)
    files = dataset.files(media_root, store)
    # Shared: a dataset may ask it which files are there (HowTo100M).
    resolver = NameResolver(files.ids(), store=store)
    folder = AnnotationFolder(name, root, files, resolver, encoding, media_root)
    clips, classes = dataset.clips(folder)
    catalog, num_clips = media_catalog.match_clips(clips, files, resolver, classes, dataset.folds)
    if not num_clips:
        raise DataError(f'{name}: its annotation files list no clip')
    # Some missing clips are normal, all of them are a wrong folder. An example of each side shows
    # how the names differ.
    if not catalog.files:
        raise DataError(
            f'{name}: none of the {num_clips} clips of its annotation files is below '
            f'{videos or root} (the first would be {catalog.missing[0]!r}, a file is '
            f'{files[0].id!r})'
        )
    # After `clips`: the folder notes the hash of each annotation file as it is read.
    catalog.skipped |= folder.skipped
    catalog.identity = {'dataset': name, 'annotations': _digest_of_annotations(folder)}
    return catalog


def _digest_of_annotations(folder: AnnotationFolder) -> str:
    """One hash of all annotation files that were read, by name and contents."""
    digest = hashlib.sha256()
    separator = ''
    for name in folder.digests.in_order():
        # Relative, so that the folder may move.
        path = name.replace('\0', '/')
        digest.update(f'{separator}{path} {folder.digests[name]}'.encode())
        separator = '\n'
    return digest.hexdigest()


def get_dataset(name: str) -> Dataset:
    """The dataset of this name; DataError if there is none."""
    if name not in DATASETS:
        raise DataError(f'--dataset={name} is unknown; datasets are {", ".join(DATASETS)}')
    return DATASETS[name]


_INTRODUCTION = """
    # Named datasets

    Printed by `python -m data_pipelines.datasets.named`.

    ```
    python -m data_pipelines.prepare --dataset=NAME --manual_dir=FOLDER --out=data/NAME/records
    ```

    Configs look for their data in `data/NAME/records`; those of VATT call Kinetics `k400`,
    `k600` and `k700` and Moments in Time `mit` (`--dataset=kinetics400 --out=data/k400/records`).

    Nothing is downloaded: place the files that the owners distribute below FOLDER, as listed here.
    Annotation files may lie in FOLDER or one or two folders below; media files anywhere below (or
    below `--videos`). Clips of the lists that are not there (videos disappear from the web) are
    counted and listed in `skipped.json`; an annotation file that is missing or malformed is one
    sentence and exit code 2. All other flags, what comes out, and what happens when it is killed:
    [data.md](data.md). `--help` with `--dataset=NAME` shows one of these pages.

    The same as tfds builders: `import data_pipelines.datasets.builders` registers them for
    `tfds.builder`, with the prefix `our_` (`our_ucf101`), because tfds has datasets of some of
    these names. `tfds build --imports=data_pipelines.datasets.builders --manual_dir=FOLDER
    our_ucf101` works too where apache-beam and mlcroissant are installed, which the `tfds` command
    of tfds 4.9.10 needs whatever it builds.
    """


def pages() -> str:
    """Contents of docs/datasets.md."""
    lines = [inspect.cleandoc(_INTRODUCTION), '']
    for dataset in DATASETS.values():
        title, text, files = dataset.page()
        # The files in a code block, since their columns are aligned.
        lines += [f'## {dataset.name}', '', f'{title}.', '', '```', files, '```', '', text, '']
    return '\n'.join(lines)


if __name__ == '__main__':
    use_plain_characters()
    # The text ends in a newline of its own.
    print(pages(), end='')
