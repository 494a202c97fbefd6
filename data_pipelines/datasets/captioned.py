"""Named datasets of videos with words: YouCook2, MSR-VTT, HowTo100M."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.datasets.named_dataset import (
    AnnotationFolder,
    Dataset,
    described,
    numbered,
    segment,
)
from data_pipelines.errors import DataError
from data_pipelines.preparation.media_catalog import Clip
from data_pipelines.preparation.store import StoredDict
from data_pipelines.preparation.values import is_missing

# Of HowTo100M: the columns of its list, and the folder with a file of captions for each video.
_COLUMNS = ('video_id',)
_PER_VIDEO = 'howto100m_captions'


class YouCook2(Dataset):
    """A video is one record, a step of the recipe one segment with its caption; label `recipe`.
    Splits train, validation (some 3,300 steps: the usual text-to-video retrieval) and test (steps
    without captions).

        youcookii_annotations_trainval.json                    of YouCookII/annotations
        youcookii_annotations_test_segments_only.json          of the same, optional
        label_foodtype.csv                                     of the same, optional: names of the
                                                               recipes
        raw_videos/SPLIT/RECIPE/ID.mp4 (or webm, mkv)          or anywhere
    """

    name = 'youcook2'
    title = 'YouCook2: 2,000 cooking videos, their steps described'
    splits = {'training': 'train', 'validation': 'validation', 'testing': 'test'}

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        path = folder.find_one('youcookii_annotations_trainval.json')
        test_path = folder.find_optional('youcookii_annotations_test_segments_only.json')
        # ActivityNet's format: one object, in which 'database' has the videos.
        databases = [folder.json(path, 'database')['database']]
        if test_path is not None:
            databases.append(folder.json(test_path, 'database')['database'])
        recipe_names = self._read_recipe_names(folder)

        try:
            entries: dict[str, Mapping[str, Any]] = {}
            for database in databases:
                # Both files have ids of their own: no video is in two.
                entries.update(database.items())
            # Recipes are named by numbers: shorter ones first sorts '9' before '10'.
            # Recipe types do not count from 0 (113, for example), so classes are numbered anew.
            recipes = sorted(
                {str(entry['recipe_type']) for entry in entries.values()},
                key=lambda recipe: (len(recipe), recipe),
            )
            number_of = numbered(recipes)
            clips = []
            for video_id, entry in entries.items():
                where = f'{path}: {video_id}'
                split = folder.look_up(entry['subset'], self.splits, where, 'subset')
                labels = {'recipe': number_of[str(entry['recipe_type'])]}
                steps = []
                for step in entry['annotations']:
                    start, end = step['segment']
                    # The test file has segments without sentences.
                    caption = step.get('sentence')
                    caption = '' if is_missing(caption) else caption
                    steps.append(segment(labels, float(start), float(end), caption))
                clips.append(Clip([video_id], split, steps))
        # Not to be caught below: it already names file and reason.
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f'youcook2: an entry of {path} is not {{"subset", "recipe_type", "annotations": '
                f'[{{"segment", "sentence"}}]}} ({type(error).__name__}: {error})'
            ) from None
        return clips, {'recipe': [recipe_names.get(recipe, recipe) for recipe in recipes]}

    def _read_recipe_names(self, folder: AnnotationFolder) -> dict[str, str]:
        """Recipe number, as written -> name; empty without the file."""
        path = folder.find_optional('label_foodtype.csv')
        if path is None:
            return {}
        rows = folder.table(path, ('number', 'name'), header=False)
        # Strings, since recipe types are compared as strings.
        return {row['number']: row['name'] for _, row in rows}


class MSRVTT(Dataset):
    """`msrvtt`: split test is 1k-A, each clip with its one caption; all others are train.
    `msrvtt_full`: the owners' train, validation and test; all twenty sentences of a clip are its
    captions, and retrieval counts each (docs/data.md). Label `category`.

        train_val_videodatainfo.json, test_videodatainfo.json
                                        or MSRVTT_data.json, which holds both
        MSRVTT_JSFUSION_test.csv        msrvtt: the thousand clips and captions of the 1k-A split
        category.txt                    optional: names of the 20 categories
        anywhere: video0.mp4 … video9999.mp4
                                        TrainValVideo and TestVideo
    """

    # The owners' names -> ours; 6,513, 497 and 2,990 clips.
    official_splits = {'train': 'train', 'validate': 'validation', 'test': 'test'}

    def __init__(self, official: bool):
        self.official = official
        self.name = 'msrvtt_full' if official else 'msrvtt'
        division = "the owners' splits" if official else '1k-A split'
        self.title = f'MSR-VTT, {division}: 10,000 clips with 20 sentences each'

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        videos, sentences = self._read_videos(folder)
        test_captions: dict[str, str] = {}  # of the 1k-A split
        if not self.official:
            # The 1,000 pairs of JSFusion (Yu et al., ECCV 2018), on which retrieval is usually
            # reported; the other 9,000 clips are for training.
            path = folder.find_one('MSRVTT_JSFUSION_test.csv')
            for where, row in folder.table(path, ('video_id', 'sentence')):
                folder.look_up(row['video_id'], videos, where, 'video')
                test_captions[row['video_id']] = row['sentence']

        category_names = self._read_category_names(folder)
        # Enough classes for the named categories and for any number that a video has.
        numbers = list(category_names)
        for video_id, video in videos.items():
            numbers.append(folder.parse_int(video.get('category', -1), video_id))
        num_categories = max(numbers, default=-1) + 1

        clips = []
        for video_id, video in videos.items():
            captions = sentences.get(video_id, [])
            if self.official:
                split = folder.look_up(
                    video.get('split', ''), self.official_splits, video_id, 'split'
                )
            elif video_id in test_captions:
                split = 'test'
                # One text for each video, as retrieval pairs them; the other nineteen sentences
                # would be further correct answers.
                captions = [test_captions[video_id]]
            else:
                split = 'train'
            # -1, unknown, in files without categories.
            labels = {'category': int(video.get('category', -1))}
            clips.append(described([video_id], split, captions, labels))
        return clips, {
            'category': [category_names.get(i, f'category {i}') for i in range(num_categories)]
        }

    def _read_videos(
        self, folder: AnnotationFolder
    ) -> tuple[dict[str, Mapping[str, Any]], dict[str, list[str]]]:
        """Video id -> what is known of it, and video id -> its sentences."""
        path = folder.find_optional('MSRVTT_data.json')
        if path is not None:
            paths = [path]
        else:
            paths = [
                folder.find_one('train_val_videodatainfo.json'),
                folder.find_one('test_videodatainfo.json'),
            ]
        videos: dict[str, Mapping[str, Any]] = {}
        sentences: dict[str, list[str]] = {}
        # Train and test come in two files in one format; ids do not overlap.
        for path in paths:
            content = folder.json(path, 'videos', 'sentences')
            try:
                for video in content['videos']:
                    videos[video['video_id']] = video
                for sentence in content['sentences']:
                    captions = sentences.setdefault(sentence['video_id'], [])
                    if not is_missing(sentence['caption']):
                        captions.append(str(sentence['caption']))
            except (KeyError, TypeError):
                raise DataError(
                    f'{self.name}: {path}: expected "videos" with a "video_id" and "sentences" '
                    'with "video_id" and "caption"'
                ) from None
        return videos, sentences

    def _read_category_names(self, folder: AnnotationFolder) -> dict[int, str]:
        """Category number -> name; empty without the file."""
        names: dict[int, str] = {}
        path = folder.find_optional('category.txt')
        if path is None:
            return names
        for where, line in folder.lines(path):
            # The file is found with tabs and with commas.
            name, _, number = line.replace(',', '\t').rpartition('\t')
            names[folder.parse_int(number.strip(), where)] = name.strip()
        return names


class HowTo100M(Dataset):
    """Only videos that are there and in the list are used. Label `category`. All are in train;
    --validation and --test hold out a share by a hash of the name.

        HowTo100M_v1.csv                        of HowTo100M.zip: the ids, and the category of each
        (or another csv with a column video_id)
        caption.json or raw_caption.json        of HowTo100M.zip, raw_caption.zip:
                                                {ID: {"start", "end", "text"}}
        howto100m_captions/ID.csv (start,end,text) or ID.json
                                                or instead: one file per video
        anywhere: the videos                    as ID.mp4 (or webm, mkv)
    """

    name = 'howto100m'
    title = 'HowTo100M: 1,200,000 narrated instructional videos'

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        list_path = folder.find_optional('HowTo100M_v1.csv')
        if list_path is None:
            list_path = folder.find_one('howto100m_videos.csv', 'HowTo100M*.csv', 'ids.csv')
        # The list has a million rows: it is read again for the clips.
        categories = {row.get('category_1', '') for _, row in folder.table(list_path, _COLUMNS)}
        # category_1 is the upper level of the WikiHow categories, category_2 the lower.
        category_names = sorted(categories - {''})

        all_captions = self._read_all_captions(folder)
        # Said at once, not after a million rows.
        if all_captions is None and not (folder.root / _PER_VIDEO).is_dir():
            # Raises: there are no captions.
            folder.find_one('raw_caption.json', 'caption.json', f'{_PER_VIDEO}/ID.csv')
        clips = self._clips(folder, list_path, numbered(category_names), all_captions)
        return clips, {'category': category_names}

    def _clips(
        self,
        folder: AnnotationFolder,
        list_path: pathlib.Path,
        number_of: Mapping[str, int],
        all_captions: Mapping[str, Any] | None,
    ) -> Iterator[Clip]:
        """The clips of the list.

        Args:
            folder: of the dataset.
            list_path: the list.
            number_of: name of a category -> its number.
            all_captions: as of `_read_all_captions`.
        """
        for _, row in folder.table(list_path, _COLUMNS):
            video_id = row['video_id']
            category = number_of.get(row.get('category_1', ''), -1)
            # '' as split: `prepare` draws one from a hash of the name.
            clip = Clip([video_id], '', [segment({'category': category})])
            # Captions are read only of the videos that are there.
            if folder.resolver(video_id) is not None:
                clip.sentences = self._sentences(folder, video_id, all_captions)
            yield clip

    def _read_all_captions(self, folder: AnnotationFolder) -> Mapping[str, Any] | None:
        """Captions of the videos that are there, if one JSON file has them."""
        # raw_caption.json first: in caption.json, the owners have removed stop words.
        path = folder.find_optional('raw_caption.json')
        if path is None:
            path = folder.find_optional('caption.json')
        if path is None:
            return None
        captions = folder.json(path)
        if captions is None:
            return None
        if not isinstance(captions, Mapping):
            raise DataError(f'howto100m: {path} is not {{ID: {{"start", "end", "text"}}}}')
        # The file is in no order, so that looking a video up would mean to read it all.
        stored = StoredDict(folder.resolver.store)
        for video_id, entry in captions.items():
            if folder.resolver(video_id) is not None:
                stored[video_id] = entry
        return stored

    def _sentences(
        self,
        folder: AnnotationFolder,
        video_id: str,
        all_captions: Mapping[str, Any] | None,
    ) -> list[dict[str, Any]]:
        """What is said in one video."""
        per_video = folder.root / _PER_VIDEO
        csv_path = per_video / f'{video_id}.csv'
        json_path = per_video / f'{video_id}.json'
        captions: Mapping[str, Any]  # {'start', 'end', 'text'}, a list each
        if all_captions is not None:
            where = f'the captions of {video_id}'
            # A video of the list without narration.
            captions = all_captions.get(video_id, {'start': [], 'end': [], 'text': []})
        elif csv_path.is_file():
            where = str(csv_path)
            columns = ('start', 'end', 'text')
            rows = [row for _, row in folder.table(csv_path, columns)]
            # Columns, as in the JSON files.
            captions = {column: [row.get(column, '') for row in rows] for column in columns}
        elif json_path.is_file():
            where = str(json_path)
            captions = folder.json(json_path, 'start', 'end', 'text')
        else:
            return []

        sentences = []
        try:
            # strict: lists of different lengths would shift texts against times.
            for start, end, text in zip(
                captions['start'], captions['end'], captions['text'], strict=True
            ):
                start = folder.parse_float(start, where)
                end = folder.parse_float(end, where)
                # Speech recognition left some without words (NaN), and some that end before they
                # start.
                has_words = isinstance(text, str) and not is_missing(text)
                if has_words and start >= 0:
                    sentences.append({'text': text, 'start': start, 'end': max(start, end)})
        except DataError:
            raise
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f'howto100m: {where}: expected "start", "end" and "text" of one length'
            ) from None
        return sentences
