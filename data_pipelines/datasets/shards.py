"""Named dataset of tar shards: pictures and captions as img2dataset writes them (WebDataset)."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipelines.datasets.named_dataset import AnnotationFolder, Dataset, described
from data_pipelines.errors import DataError
from data_pipelines.preparation import folder_listing, tar_shards
from data_pipelines.preparation.decoded_files import File
from data_pipelines.preparation.file_list import FileList
from data_pipelines.preparation.media_catalog import Clip
from data_pipelines.preparation.store import Store
from data_pipelines.preparation.tar_shards import Member, Sample
from data_pipelines.preparation.values import checked_text, is_missing

_SHARDS = ('.tar',)
# First-level folders of shards -> their split; shards elsewhere are divided by a hash of the names.
_SPLIT_FOLDERS = {'train': 'train', 'val': 'validation', 'validation': 'validation', 'test': 'test'}
# Members that are read, besides pictures.
_TEXT, _METADATA = '.txt', '.json'


class WebDataset(Dataset):
    """A picture is a record of one frame, its caption a segment and a sentence; the fields of its
    .json are the ground truth. Shards are read where they lie, nothing is unpacked. A caption is
    that of KEY.txt, else the field `caption` of KEY.json. Every member is accounted for: samples
    without a picture or a caption, members that are damaged, and the rest of an archive that was
    cut off are listed in `skipped.json`, and so are members of other suffixes, by number. Shards
    below folders train, val and test are these splits; of others, --validation and --test hold out
    a share by a hash of the name. Millions of pictures are best prepared in parts, some hundred
    shards each: `config.data.train` takes hundreds of sources. Videos in shards are not read.

        anywhere: 00000.tar, 00001.tar …     of img2dataset --output_format=webdataset:
                                             KEY.jpg (png, webp), KEY.txt, KEY.json behind each
                                             other
    """

    name = 'webdataset'
    title = 'WebDataset: tar shards of pictures and captions (LAION, CC12M, CC3M, YFCC)'

    def files(self, root: pathlib.Path, store: Store) -> FileList:
        pictures = FileList(store)
        for shard in _shards(root, {}):
            for sample in tar_shards.samples(shard.path, {}):
                picture = sample.picture()
                if picture is not None:
                    pictures.append(_member_file(shard, picture))
        if not len(pictures):
            raise DataError(f'webdataset: the tar shards below {root} hold no picture')
        return pictures

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        return self._clips(folder), {}

    def _clips(self, folder: AnnotationFolder) -> Iterator[Clip]:
        others: collections.Counter[str] = collections.Counter()
        for shard in _shards(folder.media_root, folder.skipped):
            problems: dict[str, str] = {}
            for sample in tar_shards.samples(shard.path, problems):
                picture = sample.picture()
                content = _Content(shard, sample, problems)
                if picture is None:
                    problems[sample.name] = f'no picture: it has {", ".join(sample.members)}'
                elif content.caption:
                    yield _clip(shard, picture, content)
                for suffix, member in sample.members.items():
                    if suffix not in (_TEXT, _METADATA) and member is not picture:
                        others[suffix] += 1
            for name, reason in problems.items():
                folder.skipped[f'{shard.id}/{name}' if name else shard.id] = reason
        for suffix, count in others.items():
            folder.skipped[f'*{suffix}'] = f'not read: {count} members of this suffix'


class _Content:
    """What a sample says of its picture.

    Attributes:
        caption: '' where there is none, which is noted as a problem.
        metadata: the fields of its JSON; {} without.
    """

    def __init__(self, shard: File, sample: Sample, problems: dict[str, str]):
        self.metadata = self._read_metadata(shard, sample, problems)
        self.caption = ''
        text: Any = self.metadata.get('caption')
        try:
            if _TEXT in sample.members:
                text = tar_shards.read_member(shard.path, sample.members[_TEXT]).decode()
            if is_missing(text):
                problems[sample.name] = 'no caption: neither .txt nor .json has one'
            else:
                self.caption = checked_text(text, sample.name).strip()
        except (UnicodeDecodeError, DataError):
            problems[sample.name] = 'no caption: expected text in UTF-8'

    def _read_metadata(
        self, shard: File, sample: Sample, problems: dict[str, str]
    ) -> dict[str, Any]:
        member = sample.members.get(_METADATA)
        if member is None:
            return {}
        try:
            found = json.loads(tar_shards.read_member(shard.path, member))
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return found
        problems[member.name] = 'left out: not readable as a JSON object'
        return {}


def _clip(shard: File, picture: Member, content: _Content) -> Clip:
    folder, slash, _ = shard.id.partition('/')
    split = _SPLIT_FOLDERS.get(folder.lower(), '') if slash else ''
    # The caption is not stored twice.
    known = {field: value for field, value in content.metadata.items() if field != 'caption'}
    return described([_member_id(shard, picture)], split, [content.caption], ground_truth=known)


def _shards(root: pathlib.Path, skipped: dict[str, str]) -> Iterator[File]:
    """The archives below a folder, without those that are none; their reasons go into `skipped`."""
    listing = folder_listing.list_media(root, _SHARDS)
    skipped.update(listing.skipped)
    for shard in listing.files:
        try:
            # Of an archive without any member, too, this reads the beginning.
            next(tar_shards.samples(shard.path, {}), None)
        except DataError as error:
            skipped[shard.id] = str(error).removeprefix(f'{shard.path}: ')
        else:
            yield shard


def _member_file(shard: File, member: Member) -> File:
    return File(
        id=_member_id(shard, member),
        path=shard.path,
        bytes=member.size,
        modified=shard.modified,
        offset=member.offset,
    )


def _member_id(shard: File, member: Member) -> str:
    return f'{shard.id}/{member.name}'
