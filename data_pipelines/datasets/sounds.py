"""Named datasets of sounds and audio-visual events: ESC-50, AudioSet, VGG-Sound, AVE."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping

from data_pipelines.datasets.named_dataset import (
    AnnotationFolder,
    Dataset,
    numbered,
    segment,
    youtube,
)
from data_pipelines.errors import DataError
from data_pipelines.preparation.media_catalog import Clip


class ESC50(Dataset):
    """Label `class` (50, with the numbers of the column target). Five folds: in fold k the clips of
    the column's fold k are test, the others train. `config.data.train.NAME.fold` and
    `config.data.eval.fold` choose one. Without pictures: use --rate, the other settings do not
    matter.

        audio/*.wav          of the owners' repository
        meta/esc50.csv
    """

    name = 'esc50'
    title = 'ESC-50: 2,000 environmental sounds of 5 seconds, 50 classes'
    folds = 5

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        columns = ('filename', 'fold', 'target', 'category')
        classes: dict[int, str] = {}
        clips = []
        for where, row in folder.table(folder.find_one('esc50.csv'), columns):
            test_fold = folder.parse_int(row['fold'], where)
            number = folder.parse_int(row['target'], where)
            # Only for its check: folds are 1 to 5.
            folder.look_up(str(test_fold), dict.fromkeys('12345'), where, 'fold')
            # The names come from the rows: there is no list of classes.
            known_name = classes.setdefault(number, row['category'])
            if known_name != row['category']:
                raise DataError(
                    f'esc50: {where}: target {number} is {row["category"]!r} here and '
                    f'{known_name!r} before'
                )
            # Cross-validation: each clip is test in one fold and train in four.
            splits = tuple('test' if fold == test_fold else 'train' for fold in range(1, 6))
            ground_truth = {
                # A subset of ten classes, on which results are reported too.
                'esc10': row.get('esc10') == 'True',
                'source': row.get('src_file', ''),
            }
            clips.append(
                Clip(
                    [row['filename']],
                    splits,
                    [segment({'class': number})],
                    ground_truth=ground_truth,
                )
            )
        # Numbers are used as they are, so a gap in them gets a stand-in name.
        num_classes = max(classes, default=-1) + 1
        return clips, {'class': [classes.get(i, f'target {i}') for i in range(num_classes)]}


class AudioSet(Dataset):
    """A clip may be called ID, YID, ID_START, or ID_START_END, times in seconds (30, 30.0, 30.000,
    000030) or milliseconds. A file ID that is longer than the clip is taken for the whole video and
    cut. Label `class`, multi-hot. Splits: train (both training lists) and test (eval). Without
    class_labels_indices.csv the classes are those of the ontology that the lists use, in its order:
    place all three lists then. The ground truth of a record holds `parents`: the ancestors of its
    classes in the ontology.

        balanced_train_segments.csv, unbalanced_train_segments.csv, eval_segments.csv
                                     any that is there is used
        class_labels_indices.csv     numbers and names of the 527 classes
        ontology.json                names and parents, instead or besides
        anywhere: the clips          pictures and sound, or sound alone
    """

    name = 'audioset'
    title = 'AudioSet: 2,100,000 clips of 10 seconds, 527 kinds of sound'
    lists = {
        'balanced_train_segments.csv': 'train',
        'unbalanced_train_segments.csv': 'train',
        'eval_segments.csv': 'test',
    }

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        # Two million rows: they are read again where they are needed again.
        if next(self._rows(folder), None) is None:
            folder.find_one(*self.lists)  # raises, unless there is a list without rows
        numbers_path = folder.find_optional('class_labels_indices.csv')
        if numbers_path is None:
            # One of the two has to be there, for names of the classes.
            ontology_path: pathlib.Path | None = folder.find_one('ontology.json')
        else:
            ontology_path = folder.find_optional('ontology.json')
        names: dict[str, str] = {}
        # A graph of 632 nodes, of which 527 are classes of the lists.
        children: dict[str, list[str]] = {}
        if ontology_path is not None:
            names, children = self._read_ontology(folder, ontology_path)

        # Machine ids ('/m/0jbk') are what the lists use; `classes` has them in class order.
        if numbers_path is not None:
            classes = self._read_class_numbers(folder, numbers_path)
        else:
            used = set()
            for _, _, row in self._rows(folder):
                used.update(row['labels'].split(','))
            # In the order of the ontology. With fewer lists there would be fewer classes, and so
            # other numbers: all three are needed.
            classes = {mid: name for mid, name in names.items() if mid in used}

        return self._clips(folder, numbered(list(classes)), names, _invert(children)), {
            'class': list(classes.values())
        }

    def _clips(
        self,
        folder: AnnotationFolder,
        number_of: Mapping[str, int],
        names: Mapping[str, str],
        parents_of: Mapping[str, set[str]],
    ) -> Iterator[Clip]:
        """The clips of all lists.

        Args:
            folder: of the dataset.
            number_of: machine id -> class number.
            names: machine id -> name, of the ontology; empty without one.
            parents_of: machine id -> machine ids of its parents.
        """
        for where, split, row in self._rows(folder):
            mids = row['labels'].split(',')
            numbers = sorted(folder.look_up(mid, number_of, where, 'class') for mid in mids)
            ground_truth = {}
            if names:
                ancestors = _ancestors(mids, parents_of)
                # By name, sorted: a set has no order that lasts from run to run.
                ground_truth = {'parents': sorted(names[mid] for mid in ancestors)}
            start = folder.parse_float(row['start'], where)
            end = folder.parse_float(row['end'], where)
            # Some distributions have clips under the id alone, others the whole videos: both are
            # covered.
            yield Clip(
                **youtube(row['ytid'], start, end),
                split=split,
                segments=[segment({'class': numbers})],
                ground_truth=ground_truth,
            )

    def _rows(self, folder: AnnotationFolder) -> Iterator[tuple[str, str, dict[str, str]]]:
        """(file and line, split, row) of all clips."""
        columns = ('ytid', 'start', 'end', 'labels')
        for list_name, split in self.lists.items():
            path = folder.find_optional(list_name)
            if path is None:
                continue
            # Three lines of comments, one of which has the names of the columns, stand above.
            for where, row in folder.table(path, columns, header=False, comment='#'):
                yield where, split, row

    def _read_ontology(
        self, folder: AnnotationFolder, path: pathlib.Path
    ) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Machine id -> name, and machine id -> machine ids of its children."""
        names = {}
        children = {}
        try:
            for entry in folder.json(path):
                names[entry['id']] = entry['name']
                children[entry['id']] = entry['child_ids']
        except (TypeError, KeyError):
            raise DataError(
                f'audioset: {path} is not a list of {{"id", "name", "child_ids"}}'
            ) from None
        return names, children

    def _read_class_numbers(self, folder: AnnotationFolder, path: pathlib.Path) -> dict[str, str]:
        """Machine id -> name, in the order of the class numbers."""
        listed = []
        for where, row in folder.table(path, ('index', 'mid', 'display_name')):
            number = folder.parse_int(row['index'], where)
            # Rows need not be in the order of their numbers.
            listed.append((number, row['mid'], row['display_name']))
        return {mid: name for _, mid, name in sorted(listed)}


def _invert(children: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Node -> its parents. In AudioSet's ontology, a node may have several."""
    parents_of: dict[str, set[str]] = {}
    for parent, nodes in children.items():
        for node in nodes:
            parents_of.setdefault(node, set()).add(parent)
    return parents_of


def _ancestors(nodes: Iterable[str], parents_of: Mapping[str, set[str]]) -> set[str]:
    """All nodes above any of the given ones."""
    ancestors: set[str] = set()
    waiting = list(nodes)
    while waiting:
        # Only what is new goes on the list, so nodes with several paths to them are visited once,
        # and a cycle would end.
        new = parents_of.get(waiting.pop(), set()) - ancestors
        ancestors |= new
        waiting += new
    return ancestors


class VGGSound(Dataset):
    """A file ID.mp4 that is longer than ten seconds is taken for the whole video and cut. Label
    `class`, alphabetical. Splits train and test.

    vggsound.csv            of the owners (no header: ID, start in seconds, label, train or test)
    anywhere: the clips     as ID_000030.mp4 or ID_000030_000040.mp4, or as ID.mp4
    """

    name = 'vggsound'
    title = 'VGG-Sound: 200,000 clips of 10 seconds, 309 kinds of sound'
    seconds = 10  # of each clip; the list has starts only
    splits = {'train': 'train', 'test': 'test'}

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        columns = ('ytid', 'start', 'label', 'split')
        path = folder.find_one('vggsound.csv')
        # Of both splits together; the list has no numbers.
        class_names = sorted({row['label'] for _, row in folder.table(path, columns, header=False)})
        rows = folder.table(path, columns, header=False)
        return self._clips(folder, rows, numbered(class_names)), {'class': class_names}

    def _clips(
        self,
        folder: AnnotationFolder,
        rows: Iterable[tuple[str, dict[str, str]]],
        number_of: Mapping[str, int],
    ) -> Iterator[Clip]:
        for where, row in rows:
            start = folder.parse_float(row['start'], where)
            yield Clip(
                **youtube(row['ytid'], start, start + self.seconds),
                split=folder.look_up(row['split'], self.splits, where, 'split'),
                segments=[segment({'class': number_of[row['label']]})],
            )


class AVE(Dataset):
    """Label `class` (28, alphabetical) on the seconds of the event; the rest of a video has an
    unknown one. A video with several events is one record with several segments. Splits train,
    validation, test.

        Annotations.txt, trainSet.txt, valSet.txt, testSet.txt      of AVE_Dataset.zip
        AVE/*.mp4                                                   of the same, ten seconds each
    """

    name = 'ave'
    title = 'AVE: 4,143 audio-visual events in videos of 10 seconds'
    # The same columns in all four files, separated by '&'.
    columns = ('category', 'videoid', 'quality', 'starttime', 'endtime')
    lists = {'train': 'trainSet.txt', 'validation': 'valSet.txt', 'test': 'testSet.txt'}

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        # The lists have no header and all their classes are in Annotations.txt, which has one.
        path = folder.find_one('Annotations.txt', 'annotations.txt')
        rows = folder.table(path, self.columns, delimiter='&')
        class_names = sorted({row['category'] for _, row in rows})
        number_of = numbered(class_names)

        clips = []
        for split, list_name in self.lists.items():
            list_path = folder.find_one(list_name)
            # One row for each event; rows of one video become one record in `match_clips`.
            for where, row in folder.table(list_path, self.columns, header=False, delimiter='&'):
                # Times are whole seconds from the beginning of the clip.
                start = folder.parse_float(row['starttime'], where)
                end = folder.parse_float(row['endtime'], where)
                number = folder.look_up(row['category'], number_of, where, 'category')
                clips.append(
                    Clip([row['videoid']], split, [segment({'class': number}, start, end)])
                )
        return clips, {'class': class_names}
