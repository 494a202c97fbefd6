"""Named datasets, from the files and annotation formats that their owners distribute; nothing is downloaded.

    python -m data_pipelines.prepare --dataset=NAME --manual_dir=FOLDER --out=data/NAME

A class says what differs: which annotation files there are and what a row of them means. Its docstring is its page (docs/datasets.md, which
`python -m data_pipelines.datasets.named` prints, and `prepare --dataset=NAME --help`).
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, media_catalog
from data_pipelines.preparation.media_catalog import Clip

INF = float('inf')


class Place:
    """The folder of a dataset: finds and reads its annotation files. files: ids of the media files; names: which file a name means."""

    def __init__(
        self, dataset: str, root: pathlib.Path, files: Sequence[str], names: annotation_files.NameResolver
    ):
        self.dataset, self.root, self.files, self.names = dataset, root, files, names
        self.read: dict[pathlib.Path, str] = {}  # annotation files and their digests

    def find(self, *patterns: str) -> list[pathlib.Path]:
        """Files that any of the patterns names, in the folder or one or two folders below."""
        for above in ('', '*/', '*/*/'):
            hits = {
                p for pattern in patterns for p in self.root.glob(above + pattern) if p.is_file()
            }
            if hits:
                return sorted(hits)
        return []

    def one(self, *patterns: str, optional: bool = False) -> pathlib.Path | None:
        """The one file that the patterns, tried in turn, name. Raises DataError if there is none (None if optional) or several."""
        for pattern in patterns:
            hits = self.find(pattern)
            if len(hits) > 1:
                raise DataError(
                    f'{self.dataset}: {hits[0]} and {hits[1]} both could be the file {pattern}; leave one'
                )
            if hits:
                return hits[0]
        if optional:
            return None
        raise DataError(
            f'{self.dataset}: the annotation file {" or ".join(patterns)} is not in {self.root} nor two folders below it; '
            f'--dataset={self.dataset} --help says which files to place there'
        )

    def text(self, path: pathlib.Path) -> str:
        try:
            raw = path.read_bytes()
            self.read[path] = hashlib.sha256(raw).hexdigest()
            return raw.decode('utf-8-sig')
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f'{self.dataset}: {path} is not readable text in UTF-8: {e}') from None

    def lines(self, path: pathlib.Path) -> Iterator[tuple[str, str]]:
        """(where, line) of those that say something."""
        for number, line in enumerate(self.text(path).splitlines(), 1):
            if line.strip():
                yield f'{path}, line {number}', line.strip()

    def table(
        self,
        path: pathlib.Path,
        columns: Sequence[str],
        header: bool = True,
        delimiter: str = ',',
        comment: str = '',
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """(where, row) of a CSV. columns: those that must be there; without a header, all of them in order."""
        rows = csv.reader(io.StringIO(self.text(path)), delimiter=delimiter, skipinitialspace=True)
        names = None if header else list(columns)
        try:
            for row in rows:
                if not row or comment and row[0].startswith(comment):
                    continue
                where = f'{path}, line {rows.line_num}'
                if names is None:
                    names = [c.strip().lower() for c in row]
                    if not set(columns) <= set(names):
                        raise DataError(
                            f'{self.dataset}: {path} has the columns {", ".join(names)}; wanted {", ".join(columns)}'
                        )
                    continue
                if len(row) < len(columns):
                    raise DataError(
                        f'{self.dataset}: {where} has {len(row)} fields ({delimiter.join(row)[:60]!r}); wanted {delimiter.join(columns)}'
                    )
                yield where, dict(zip(names, map(str.strip, row)))
        except csv.Error as e:
            raise DataError(f'{self.dataset}: {path} is not readable CSV: {e}') from None
        if names is None:
            raise DataError(
                f'{self.dataset}: {path} is empty; wanted the columns {", ".join(columns)}'
            )

    def json(self, path: pathlib.Path, *keys: str) -> Any:
        """A JSON object that has these keys."""
        try:
            content = json.loads(self.text(path))
        except ValueError as e:
            if isinstance(e, DataError):
                raise
            raise DataError(f'{self.dataset}: {path} is not readable JSON: {e}') from None
        for key in keys:
            if not isinstance(content, Mapping) or key not in content:
                raise DataError(
                    f'{self.dataset}: {path} has no {key!r} at its top level; is it another file?'
                )
        return content

    def number(self, text: Any, where: str, kind: type = float) -> Any:
        try:
            return kind(text)
        except (TypeError, ValueError):
            raise DataError(
                f'{self.dataset}: {where}: {str(text)[:40]!r} is not a {"number" if kind is float else "whole number"}'
            ) from None

    def choice(self, value: str, allowed: Mapping[str, Any], where: str, what: str) -> Any:
        if value not in allowed:
            some = list(allowed)
            raise DataError(
                f'{self.dataset}: {where}: {what} {value!r} is unknown; wanted {", ".join(some[:6])}{", …" if len(some) > 6 else ""}'
            )
        return allowed[value]


class Dataset:
    """One named dataset. folds: official divisions into train and test. suffixes: of its media files."""

    name = ''
    title = ''
    folds = 0
    suffixes: tuple[str, ...] = media.SUFFIXES

    def clips(self, at: Place) -> tuple[list[Clip], dict[str, list[str]]]:
        """(clips, classes of each label). Raises DataError, one sentence that names file and line."""
        raise NotImplementedError

    def page(self) -> tuple[str, str, str]:
        """(title, what comes out, which files to place where): a docstring's last paragraph lists the files."""
        text, _, files = inspect.getdoc(type(self)).rpartition('\n\n')
        return self.title, text, textwrap.dedent(files)


def segment(
    labels: Mapping[str, Any], start: float = 0.0, end: float = INF, caption: str = ''
) -> dict[str, Any]:
    return {'start': start, 'end': end, 'caption': caption, 'labels': dict(labels)}


def youtube(id: str, start: float, end: float) -> dict[str, Any]:
    """names, videos and part of a clip of a YouTube video: the names that the usual downloaders give to it."""
    names = []
    for stem in (id, f'Y{id}'):
        for a, b in (
            (f'{int(start):06d}', f'{int(end):06d}'),
            (f'{int(start)}', f'{int(end)}'),
            (f'{start:.3f}', f'{end:.3f}'),
            (f'{start:.1f}', f'{end:.1f}'),
            (f'{round(start * 1000)}', f'{round(end * 1000)}'),
        ):
            names += [f'{stem}_{a}_{b}', f'{stem}_{a}']
    return {'names': names, 'videos': (id, f'Y{id}', f'v_{id}'), 'part': (start, end)}


# ---- actions


class UCF101(Dataset):
    """Label `class` (101, in the order of classInd.txt). Three folds: `config.data.train.NAME.fold` and `config.data.eval.fold` choose one.

    UCF-101/CLASS/v_CLASS_g01_c01.avi           UCF101.rar, unpacked
    ucfTrainTestlist/classInd.txt               UCF101TrainTestSplits-RecognitionTask.zip, unpacked
    ucfTrainTestlist/trainlist01.txt … 03.txt
    ucfTrainTestlist/testlist01.txt … 03.txt
    """

    name, title, folds = 'ucf101', 'UCF101: 13,320 clips of 101 human actions', 3

    def clips(self, at):
        classes = {}
        for where, line in at.lines(at.one('classInd.txt')):
            number, _, label = line.partition(' ')
            if at.number(number, where, int) != len(classes) + 1 or not label:
                raise DataError(f'ucf101: {where} is {line!r}; wanted "{len(classes) + 1} CLASS"')
            classes[label] = len(classes)
        splits: dict[str, list[str]] = {}
        for fold in range(3):
            for split in ('train', 'test'):
                for where, line in at.lines(at.one(f'{split}list0{fold + 1}.txt')):
                    path = line.split(' ')[0]
                    at.choice(path.split('/')[0], classes, where, 'the class of')
                    splits.setdefault(path, [''] * 3)[fold] = split
        return [
            Clip([path], tuple(of), [segment({'class': classes[path.split('/')[0]]})])
            for path, of in splits.items()
        ], {'class': list(classes)}


class HMDB51(Dataset):
    """Label `class` (51, alphabetical). Three folds of 3570 training and 1530 test clips; the clips marked 0 in a list are in neither part of
    that fold. `config.data.train.NAME.fold` and `config.data.eval.fold` choose one.

        CLASS/*.avi                                 hmdb51_org.rar, unpacked, and the archives in it unpacked too
        testTrainMulti_7030_splits/CLASS_test_split1.txt … 3.txt      test_train_splits.rar, unpacked
    """

    name, title, folds = 'hmdb51', 'HMDB51: 6,766 clips of 51 human actions', 3

    def clips(self, at):
        lists = at.find('*_test_split[123].txt')
        labels = sorted({p.name.rpartition('_test_split')[0] for p in lists})
        if not lists:
            at.one('CLASS_test_split1.txt')  # says it
        splits: dict[tuple[str, str], list[str]] = {}
        for label in labels:
            for fold in range(3):
                for where, line in at.lines(at.one(f'{label}_test_split{fold + 1}.txt')):
                    file, _, part = line.rpartition(' ')
                    splits.setdefault((label, file.strip()), [''] * 3)[fold] = at.choice(
                        part, {'0': '', '1': 'train', '2': 'test'}, where, 'the mark'
                    )
        return [
            Clip([f'{label}/{file}'], tuple(of), [segment({'class': labels.index(label)})])
            for (label, file), of in splits.items()
        ], {'class': labels}


class Kinetics(Dataset):
    """Label `class`, alphabetical. Splits train, validation, test. Clips of a test list without labels are prepared with unknown ones. A file ID.mp4
    that is longer than its clip is taken for the whole video and cut. Names like kinetics-400_train.csv are found too.

        train.csv, val.csv (or validate.csv), test.csv      of the owners' annotations; any that is there is used
        anywhere: the clips, as ID_000010_000020.mp4 (start and end in seconds, six digits), in class folders or not
    """

    classes = 0

    def __init__(self, classes: int, size: str):
        self.classes, self.name, self.title = (
            classes,
            f'kinetics{classes}',
            f'Kinetics-{classes}: {size} clips of {classes} human actions',
        )

    def clips(self, at):
        rows = []
        for split, patterns in (
            ('train', ('train.csv', '*[_-]train.csv')),
            ('validation', ('val.csv', 'validate.csv', '*[_-]val*.csv')),
            ('test', ('test.csv', '*[_-]test.csv')),
        ):
            path = at.one(*patterns, optional=True)
            if path is not None:
                rows += [
                    (where, split, row)
                    for where, row in at.table(path, ('youtube_id', 'time_start', 'time_end'))
                ]
        if not rows:
            at.one('train.csv', 'val.csv', 'validate.csv', 'test.csv')
        labels = sorted({row['label'] for _, _, row in rows if row.get('label')})
        if len(labels) > self.classes:
            raise DataError(
                f'{self.name}: the annotation files in {at.root} name {len(labels)} classes; this is another edition of Kinetics'
            )
        number, out = {label: i for i, label in enumerate(labels)}, []
        for where, split, row in rows:
            start, end = (at.number(row[f'time_{x}'], where) for x in ('start', 'end'))
            out.append(
                Clip(
                    **youtube(row['youtube_id'], start, end),
                    split=split,
                    segments=[segment({'class': number.get(row.get('label'), -1)})],
                )
            )
        return out, {'class': labels}


class MomentsInTime(Dataset):
    """Label `class`, with the numbers of moments_categories.txt. Splits train and validation.

    moments_categories.txt, trainingSet.csv, validationSet.csv      of the owners' archive (version 1: one label per video)
    training/CLASS/*.mp4, validation/CLASS/*.mp4                    of the same
    """

    name, title = 'moments_in_time', 'Moments in Time: about 1,000,000 videos of 3 seconds'

    def clips(self, at):
        classes: dict[str, int] = {}
        for where, line in at.lines(at.one('moments_categories.txt')):
            label, _, number = line.rpartition(',')
            classes[label or line] = at.number(number, where, int) if label else len(classes)
        if sorted(classes.values()) != list(range(len(classes))):
            raise DataError(
                f'{self.name}: the numbers of moments_categories.txt are not 0 to {len(classes) - 1}, each once'
            )
        out = []
        for split, folder, name in (
            ('train', 'training', 'trainingSet.csv'),
            ('validation', 'validation', 'validationSet.csv'),
        ):
            for where, row in at.table(at.one(name), ('path', 'label'), header=False):
                out.append(
                    Clip(
                        [f'{folder}/{row["path"]}'],
                        split,
                        [segment({'class': at.choice(row['label'], classes, where, 'class')})],
                    )
                )
        return out, {'class': sorted(classes, key=classes.get)}


# ---- sounds


class ESC50(Dataset):
    """Label `class` (50, with the numbers of the column target). Five folds: in fold k the clips of the column's fold k are test, the others
    train. `config.data.train.NAME.fold` and `config.data.eval.fold` choose one. Without pictures: use --rate, the other settings do not matter.

        audio/*.wav          of the owners' repository
        meta/esc50.csv
    """

    name, title, folds = 'esc50', 'ESC-50: 2,000 environmental sounds of 5 seconds, 50 classes', 5

    def clips(self, at):
        classes, out = {}, []
        for where, row in at.table(at.one('esc50.csv'), ('filename', 'fold', 'target', 'category')):
            fold, number = (at.number(row[x], where, int) for x in ('fold', 'target'))
            at.choice(str(fold), dict.fromkeys('12345'), where, 'fold')
            if classes.setdefault(number, row['category']) != row['category']:
                raise DataError(
                    f'esc50: {where}: target {number} is {row["category"]!r} here and {classes[number]!r} before'
                )
            out.append(
                Clip(
                    [row['filename']],
                    tuple('test' if k == fold else 'train' for k in range(1, 6)),
                    [segment({'class': number})],
                    ground_truth={
                        'esc10': row.get('esc10') == 'True',
                        'source': row.get('src_file', ''),
                    },
                )
            )
        return out, {
            'class': [classes.get(i, f'target {i}') for i in range(max(classes, default=-1) + 1)]
        }


class AudioSet(Dataset):
    """A clip may be called ID, YID, ID_START, or ID_START_END, times in seconds (30, 30.0, 30.000, 000030) or milliseconds. A file ID that is longer
    than the clip is taken for the whole video and cut. Label `class`, multi-hot. Splits: train (both training lists) and test (eval). Without
    class_labels_indices.csv the classes are those of the ontology that the lists use, in its order: place all three lists then.
    The ground truth of a record holds `parents`: the ancestors of its classes in the ontology.

        balanced_train_segments.csv, unbalanced_train_segments.csv, eval_segments.csv      any that is there is used
        class_labels_indices.csv                                                           numbers and names of the 527 classes
        ontology.json                                                                      names and parents, instead or besides
        anywhere: clips (pictures and sound, or sound alone)
    """

    name, title = 'audioset', 'AudioSet: 2,100,000 clips of 10 seconds, 527 kinds of sound'

    def clips(self, at):
        rows = []
        for split, name in (
            ('train', 'balanced_train_segments.csv'),
            ('train', 'unbalanced_train_segments.csv'),
            ('test', 'eval_segments.csv'),
        ):
            path = at.one(name, optional=True)
            if path is not None:
                rows += [
                    (where, split, row)
                    for where, row in at.table(
                        path, ('ytid', 'start', 'end', 'labels'), header=False, comment='#'
                    )
                ]
        if not rows:
            at.one(
                'balanced_train_segments.csv', 'unbalanced_train_segments.csv', 'eval_segments.csv'
            )
        numbers = at.one('class_labels_indices.csv', optional=True)
        ontology = at.one('ontology.json', optional=numbers is not None)
        kinds = {}
        if ontology is not None:
            try:
                kinds = {k['id']: (k['name'], k['child_ids']) for k in at.json(ontology)}
            except (TypeError, KeyError):
                raise DataError(
                    f'audioset: {ontology} is not a list of {{"id", "name", "child_ids"}}'
                ) from None
        if numbers is not None:
            listed = sorted(
                (at.number(row['index'], where, int), row['mid'], row['display_name'])
                for where, row in at.table(numbers, ('index', 'mid', 'display_name'))
            )
            classes = {mid: name for _, mid, name in listed}
        else:
            used = {mid for _, _, row in rows for mid in row['labels'].split(',')}
            classes = {mid: name for mid, (name, _) in kinds.items() if mid in used}
        place = {mid: i for i, mid in enumerate(classes)}
        above: dict[str, set[str]] = {}
        for mid, (_, children) in kinds.items():
            for child in children:
                above.setdefault(child, set()).add(mid)
        out = []
        for where, split, row in rows:
            mids = row['labels'].split(',')
            labels = sorted(at.choice(mid, place, where, 'class') for mid in mids)
            out.append(
                Clip(
                    **youtube(
                        row['ytid'], at.number(row['start'], where), at.number(row['end'], where)
                    ),
                    split=split,
                    segments=[segment({'class': labels})],
                    ground_truth={'parents': sorted(kinds[m][0] for m in _ancestors(mids, above))}
                    if kinds
                    else {},
                )
            )
        return out, {'class': list(classes.values())}


def _ancestors(nodes: Sequence[str], above: Mapping[str, set[str]]) -> set[str]:
    out, waiting = set(), list(nodes)
    while waiting:
        new = above.get(waiting.pop(), set()) - out
        out |= new
        waiting += new
    return out


class VGGSound(Dataset):
    """A file ID.mp4 that is longer than ten seconds is taken for the whole video and cut. Label `class`, alphabetical. Splits train and test.

    vggsound.csv                                   of the owners (no header: ID, start in seconds, label, train or test)
    anywhere: the clips, as ID_000030.mp4 or ID_000030_000040.mp4, or as ID.mp4
    """

    name, title = 'vggsound', 'VGG-Sound: 200,000 clips of 10 seconds, 309 kinds of sound'

    def clips(self, at):
        rows = list(
            at.table(at.one('vggsound.csv'), ('ytid', 'start', 'label', 'split'), header=False)
        )
        labels = sorted({row['label'] for _, row in rows})
        number, out = {label: i for i, label in enumerate(labels)}, []
        for where, row in rows:
            start = at.number(row['start'], where)
            split = at.choice(row['split'], {'train': 'train', 'test': 'test'}, where, 'split')
            out.append(
                Clip(
                    **youtube(row['ytid'], start, start + 10),
                    split=split,
                    segments=[segment({'class': number[row['label']]})],
                )
            )
        return out, {'class': labels}


class AVE(Dataset):
    """Label `class` (28, alphabetical) on the seconds of the event; the rest of a video has an unknown one. A video with several events is one
    record with several segments. Splits train, validation, test.

        Annotations.txt, trainSet.txt, valSet.txt, testSet.txt      of AVE_Dataset.zip
        AVE/*.mp4                                                   of the same, ten seconds each
    """

    name, title = 'ave', 'AVE: 4,143 audio-visual events in videos of 10 seconds'
    columns = ('category', 'videoid', 'quality', 'starttime', 'endtime')

    def clips(self, at):
        labels = sorted(
            {
                row['category']
                for _, row in at.table(
                    at.one('Annotations.txt', 'annotations.txt'), self.columns, delimiter='&'
                )
            }
        )
        number, out = {label: i for i, label in enumerate(labels)}, []
        for split, name in (
            ('train', 'trainSet.txt'),
            ('validation', 'valSet.txt'),
            ('test', 'testSet.txt'),
        ):
            for where, row in at.table(at.one(name), self.columns, header=False, delimiter='&'):
                start, end = (at.number(row[f'{x}time'], where) for x in ('start', 'end'))
                out.append(
                    Clip(
                        [row['videoid']],
                        split,
                        [
                            segment(
                                {'class': at.choice(row['category'], number, where, 'category')},
                                start,
                                end,
                            )
                        ],
                    )
                )
        return out, {'class': labels}


# ---- words


class YouCook2(Dataset):
    """A video is one record, a step of the recipe one segment with its caption; label `recipe`. Splits train, validation (some 3,300 steps: the
    usual text-to-video retrieval) and test (steps without captions).

        youcookii_annotations_trainval.json                    of YouCookII/annotations
        youcookii_annotations_test_segments_only.json          of the same, if wanted
        label_foodtype.csv                                     of the same, if wanted: names of the recipes
        raw_videos/SPLIT/RECIPE/ID.mp4 (or webm, mkv)          or anywhere
    """

    name, title = 'youcook2', 'YouCook2: 2,000 cooking videos, their steps described'

    def clips(self, at):
        path = at.one('youcookii_annotations_trainval.json')
        more = at.one('youcookii_annotations_test_segments_only.json', optional=True)
        listed = [at.json(p, 'database')['database'] for p in (path, more) if p is not None]
        food = at.one('label_foodtype.csv', optional=True)
        names = (
            {
                row['number']: row['name']
                for _, row in at.table(food, ('number', 'name'), header=False)
            }
            if food is not None
            else {}
        )
        out = []
        try:
            entries = {id: e for some in listed for id, e in some.items()}
            kinds = sorted(
                {str(e['recipe_type']) for e in entries.values()}, key=lambda k: (len(k), k)
            )
            recipes = {k: i for i, k in enumerate(kinds)}
            for id, e in entries.items():
                split = at.choice(
                    e['subset'],
                    {'training': 'train', 'validation': 'validation', 'testing': 'test'},
                    f'{path}: {id}',
                    'subset',
                )
                steps = [
                    segment(
                        {'recipe': recipes[str(e['recipe_type'])]},
                        *map(float, s['segment']),
                        s.get('sentence', ''),
                    )
                    for s in e['annotations']
                ]
                out.append(Clip([id], split, steps))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, DataError):
                raise
            raise DataError(
                f'youcook2: an entry of {path} is not {{"subset", "recipe_type", "annotations": [{{"segment", "sentence"}}]}} '
                f'({type(e).__name__}: {e})'
            ) from None
        return out, {'recipe': [names.get(k, k) for k in kinds]}


class MSRVTT(Dataset):
    """`msrvtt`: split test is 1k-A, each clip with its one caption; all others are train. `msrvtt_full`: the owners' train, validation and test. A
    training clip has its twenty sentences, its segment the first of them as caption. Label `category`.

        train_val_videodatainfo.json, test_videodatainfo.json       or MSRVTT_data.json, which holds both
        MSRVTT_JSFUSION_test.csv                                    msrvtt: the thousand clips and captions of the 1k-A split
        category.txt                                                if wanted: names of the 20 categories
        anywhere: video0.mp4 … video9999.mp4                        TrainValVideo and TestVideo
    """

    def __init__(self, full: bool):
        self.full, self.name = full, 'msrvtt_full' if full else 'msrvtt'
        self.title = f'MSR-VTT, {"the owners" + chr(39) + " splits" if full else "1k-A split"}: 10,000 clips with 20 sentences each'

    def clips(self, at):
        whole = at.one('MSRVTT_data.json', optional=True)
        paths = (
            [whole]
            if whole is not None
            else [at.one('train_val_videodatainfo.json'), at.one('test_videodatainfo.json')]
        )
        videos, sentences = {}, {}
        for path in paths:
            content = at.json(path, 'videos', 'sentences')
            try:
                videos |= {v['video_id']: v for v in content['videos']}
                for s in content['sentences']:
                    sentences.setdefault(s['video_id'], []).append(str(s['caption']))
            except (KeyError, TypeError):
                raise DataError(
                    f'{self.name}: {path} wants "videos" with a "video_id" and "sentences" with "video_id" and "caption"'
                ) from None
        chosen = {}
        if not self.full:
            path = at.one('MSRVTT_JSFUSION_test.csv')
            for where, row in at.table(path, ('video_id', 'sentence')):
                at.choice(row['video_id'], videos, where, 'video')
                chosen[row['video_id']] = row['sentence']
        named = at.one('category.txt', optional=True)
        categories = {}
        for where, line in at.lines(named) if named is not None else ():
            label, number = (line.replace(',', '\t').rpartition('\t')[i].strip() for i in (0, 2))
            categories[at.number(number, where, int)] = label
        count = (
            max(
                [
                    *categories,
                    *(at.number(v.get('category', -1), id, int) for id, v in videos.items()),
                ],
                default=-1,
            )
            + 1
        )
        out = []
        for id, video in videos.items():
            said = [chosen[id]] if id in chosen else sentences.get(id, [])
            split = (
                at.choice(
                    video.get('split', ''),
                    {'train': 'train', 'validate': 'validation', 'test': 'test'},
                    id,
                    'split',
                )
                if self.full
                else ('test' if id in chosen else 'train')
            )
            out.append(
                Clip(
                    [id],
                    split,
                    [
                        segment(
                            {'category': int(video.get('category', -1))},
                            caption=said[0] if said else '',
                        )
                    ],
                    [{'text': t, 'start': 0.0, 'end': INF} for t in said],
                )
            )
        return out, {'category': [categories.get(i, f'category {i}') for i in range(count)]}


class HowTo100M(Dataset):
    """Only videos that are there and in the list are used. One file per video is the better form: the one JSON takes tens of gigabytes of memory.
    Label `category`. All are in train; --validation and --test hold out a share by a hash of the name.

        HowTo100M_v1.csv (or another csv with a column video_id)       of HowTo100M.zip: the ids, and the category of each
        caption.json or raw_caption.json                               of HowTo100M.zip, raw_caption.zip: {ID: {"start", "end", "text"}}
        howto100m_captions/ID.csv (start,end,text) or ID.json           or instead: one file per video
        anywhere: the videos, as ID.mp4 (or webm, mkv)
    """

    name, title = 'howto100m', 'HowTo100M: 1,200,000 narrated instructional videos'

    def clips(self, at):
        path = at.one('HowTo100M_v1.csv', optional=True) or at.one(
            'howto100m_videos.csv', 'HowTo100M*.csv', 'ids.csv'
        )
        rows = list(at.table(path, ('video_id',)))
        labels = sorted({row.get('category_1', '') for _, row in rows} - {''})
        number = {label: i for i, label in enumerate(labels)}
        together = at.one('raw_caption.json', optional=True) or at.one(
            'caption.json', optional=True
        )
        captions = at.json(together) if together is not None else None
        if captions is not None and not isinstance(captions, Mapping):
            raise DataError(f'howto100m: {together} is not {{ID: {{"start", "end", "text"}}}}')
        folder = at.root / 'howto100m_captions'
        if captions is None and not folder.is_dir():
            at.one('raw_caption.json', 'caption.json', 'howto100m_captions/ID.csv')
        out = []
        for _, row in rows:
            id = row['video_id']
            clip = Clip([id], '', [segment({'category': number.get(row.get('category_1'), -1)})])
            if at.names(id) is not None:
                clip.sentences = self._said(at, id, captions, folder)
            out.append(clip)
        return out, {'category': labels}

    @staticmethod
    def _said(at: Place, id: str, captions: Any, folder: pathlib.Path) -> list[dict[str, Any]]:
        if captions is not None:
            where, said = (
                f'the captions of {id}',
                captions.get(id, {'start': [], 'end': [], 'text': []}),
            )
        elif (path := folder / f'{id}.csv').is_file():
            read = list(at.table(path, ('start', 'end', 'text')))
            where, said = (
                str(path),
                {k: [row.get(k, '') for _, row in read] for k in ('start', 'end', 'text')},
            )
        elif (path := folder / f'{id}.json').is_file():
            where, said = str(path), at.json(path, 'start', 'end', 'text')
        else:
            return []
        try:
            times = [
                (at.number(a, where), at.number(b, where), t)
                for a, b, t in zip(said['start'], said['end'], said['text'], strict=True)
            ]
        except (KeyError, TypeError, ValueError) as e:
            if isinstance(e, DataError):
                raise
            raise DataError(
                f'howto100m: {where}: wanted "start", "end" and "text" of one length'
            ) from None
        # Speech recognition left some without words (NaN) and some that end before they start.
        return [
            {'text': t, 'start': a, 'end': max(a, b)}
            for a, b, t in times
            if isinstance(t, str) and t.strip() and a >= 0
        ]


# ---- images


class ImageNet(Dataset):
    """An image is a record of one frame; a clip repeats it (deflation in evaluation, inflation in fine-tuning). Label `class`: folders below train
    and val, alphabetical, which is the usual numbering. Splits train and validation. The folders may also lie below ILSVRC/Data/CLS-LOC.

        train/WNID/*.JPEG                        ILSVRC2012_img_train.tar, and the archives in it, unpacked
        val/WNID/*.JPEG                          ILSVRC2012_img_val.tar, sorted into class folders
        or val/*.JPEG and LOC_val_solution.csv   as the images come, with the list of their classes
        LOC_synset_mapping.txt                   if wanted: names of the classes
    """

    name, title, suffixes = (
        'imagenet',
        'ImageNet (ILSVRC2012): 1,280,000 images of 1000 classes',
        media.IMAGES,
    )

    def clips(self, at):
        solution = at.one('LOC_val_solution.csv', optional=True)
        flat = {}
        if solution is not None:
            flat = {
                row['imageid']: row['predictionstring'].split(' ')[0]
                for _, row in at.table(solution, ('imageid', 'predictionstring'))
            }
        found = []
        for path in at.files:
            parts = path.split('/')
            folder = next(
                (i for i, p in enumerate(parts[:-1]) if p in ('train', 'val', 'validation')), None
            )
            if folder is None:
                continue
            inner = parts[folder + 1 : -1]
            wnid = inner[0] if inner else flat.get(parts[-1].rpartition('.')[0])
            if wnid is None:
                raise DataError(
                    f'imagenet: {path} is in no class folder and LOC_val_solution.csv does not list it; place that file in {at.root}'
                )
            found.append((path, 'train' if parts[folder] == 'train' else 'validation', wnid))
        if not found:
            raise DataError(
                f'imagenet: no image below a folder train or val in {at.root}; --dataset=imagenet --help says what to place there'
            )
        wnids = sorted({w for _, _, w in found})
        mapping = at.one('LOC_synset_mapping.txt', optional=True)
        titles = (
            dict((line.split(' ')[0], line) for _, line in at.lines(mapping))
            if mapping is not None
            else {}
        )
        number = {w: i for i, w in enumerate(wnids)}
        return [Clip([path], split, [segment({'class': number[w]})]) for path, split, w in found], {
            'class': [titles.get(w, w) for w in wnids]
        }


DATASETS: dict[str, Dataset] = {
    d.name: d
    for d in (
        UCF101(),
        HMDB51(),
        Kinetics(400, '300,000'),
        Kinetics(600, '480,000'),
        Kinetics(700, '650,000'),
        MomentsInTime(),
        ESC50(),
        AudioSet(),
        VGGSound(),
        AVE(),
        YouCook2(),
        MSRVTT(False),
        MSRVTT(True),
        HowTo100M(),
        ImageNet(),
    )
}


def read(name: str, manual_dir: str, videos: str = '') -> media_catalog.MediaCatalog:
    """What the annotation files of a named dataset say of the media files below manual_dir (or the folder `videos`). Raises DataError."""
    dataset = of(name)
    root = pathlib.Path(manual_dir)
    if not manual_dir or not root.is_dir():
        raise DataError(
            f'--manual_dir={manual_dir} is not a folder; it holds the files of {name} (--dataset={name} --help says which)'
        )
    files = media_catalog.scan(pathlib.Path(videos or manual_dir), dataset.suffixes)
    names = annotation_files.NameResolver(f.id for f in files)
    at = Place(name, root, [f.id for f in files], names)
    clips, classes = dataset.clips(at)
    out = media_catalog.match_clips(clips, files, names, classes, dataset.folds)
    if not out.files:
        raise DataError(
            f'{name}: none of the {len(clips)} clips of its annotation files is below {videos or root} (the first would be '
            f'{out.missing[0]!r}, a file is {files[0].id!r})'
            if clips
            else f'{name}: its annotation files list no clip'
        )
    read = [f'{p.relative_to(root).as_posix()} {hash}' for p, hash in sorted(at.read.items())]
    out.identity = {
        'dataset': name,
        'annotations': hashlib.sha256('\n'.join(read).encode()).hexdigest(),
    }
    return out


def of(name: str) -> Dataset:
    if name not in DATASETS:
        raise DataError(f'--dataset={name} is unknown; datasets are {", ".join(DATASETS)}')
    return DATASETS[name]


def pages() -> str:
    """docs/datasets.md."""
    out = [
        '# Named datasets',
        '',
        'Printed by `python -m data_pipelines.datasets.named`.',
        '',
        inspect.cleandoc("""
        ```
        python -m data_pipelines.prepare --dataset=NAME --manual_dir=FOLDER --out=data/NAME
        ```

        Nothing is downloaded: place the files that the owners distribute below FOLDER, as listed here. Annotation files may lie in FOLDER or one or
        two folders below; media files anywhere below (or below `--videos`). Clips of the lists that are not there (videos disappear from
        the web) are counted and listed in `skipped.json`; an annotation file that is missing or malformed is one sentence and exit code 2. All other
        flags, what comes out, and what happens when it is killed: [data.md](data.md). `--help` with `--dataset=NAME` shows one of these pages.

        The same as tfds builders: `import data_pipelines.datasets.builders` registers them for `tfds.builder`, with the prefix `our_` (`our_ucf101`),
        because tfds has datasets of some of these names. `tfds build --imports=data_pipelines.datasets.builders --manual_dir=FOLDER our_ucf101` works
        too where apache-beam and mlcroissant are installed, which the `tfds` command of tfds 4.9.10 needs whatever it builds."""),
        '',
    ]
    for dataset in DATASETS.values():
        title, text, files = dataset.page()
        out += [f'## {dataset.name}', '', f'{title}.', '', '```', files, '```', '', text, '']
    return '\n'.join(out)


if __name__ == '__main__':
    print(pages(), end='')
