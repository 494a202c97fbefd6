"""Named datasets of human actions: UCF101, HMDB51, Kinetics, Moments in Time."""

from __future__ import annotations

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


class UCF101(Dataset):
    """Label `class` (101, in the order of classInd.txt). Three folds:
    `config.data.train.NAME.fold` and `config.data.eval.fold` choose one.

    UCF-101/CLASS/v_CLASS_g01_c01.avi           UCF101.rar, unpacked
    ucfTrainTestlist/classInd.txt               UCF101TrainTestSplits-RecognitionTask.zip, unpacked
    ucfTrainTestlist/trainlist01.txt … 03.txt
    ucfTrainTestlist/testlist01.txt … 03.txt
    """

    name = 'ucf101'
    title = 'UCF101: 13,320 clips of 101 human actions'
    folds = 3

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        classes: dict[str, int] = {}
        for where, line in folder.lines(folder.find_one('classInd.txt')):
            # '1 ApplyEyeMakeup'
            number, _, class_name = line.partition(' ')
            expected = len(classes) + 1  # the file counts from 1
            if folder.parse_int(number, where) != expected or not class_name:
                raise DataError(f'ucf101: {where}: expected "{expected} CLASS", got {line!r}')
            classes[class_name] = len(classes)

        splits: dict[str, list[str]] = {}  # path -> its split in each fold
        for fold in range(3):
            # No fold has a validation split.
            for split in ('train', 'test'):
                list_path = folder.find_one(f'{split}list0{fold + 1}.txt')
                for where, line in folder.lines(list_path):
                    # Training lists have 'ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1', test
                    # lists the path alone; the class is the folder in both.
                    path = line.split(' ')[0]
                    class_name = path.split('/')[0]
                    folder.look_up(class_name, classes, where, 'the class of')
                    # '' in a fold whose lists do not have the clip.
                    splits.setdefault(path, [''] * 3)[fold] = split

        clips = []
        for path, split_in_fold in splits.items():
            labels = {'class': classes[path.split('/')[0]]}
            clips.append(Clip([path], tuple(split_in_fold), [segment(labels)]))
        return clips, {'class': list(classes)}


class HMDB51(Dataset):
    """Label `class` (51, alphabetical). Three folds of 3570 training and 1530 test clips; the
    clips marked 0 in a list are in neither part of that fold. `config.data.train.NAME.fold` and
    `config.data.eval.fold` choose one.

        CLASS/*.avi                                     hmdb51_org.rar, unpacked, and the
                                                        archives in it unpacked too
        testTrainMulti_7030_splits/CLASS_test_split1.txt … 3.txt
                                                        test_train_splits.rar, unpacked
    """

    name = 'hmdb51'
    title = 'HMDB51: 6,766 clips of 51 human actions'
    folds = 3
    # A mark of 0 is neither in training nor in test: the lists have 70 + 30 clips of each class
    # and leave the others out.
    marks = {'0': '', '1': 'train', '2': 'test'}

    def clips(self, folder: AnnotationFolder) -> tuple[list[Clip], dict[str, list[str]]]:
        lists = folder.find_all('*_test_split[123].txt')
        if not lists:
            folder.find_one('CLASS_test_split1.txt')  # raises, with this name in the message
        class_names = sorted({path.name.rpartition('_test_split')[0] for path in lists})

        clips = []
        for number, class_name in enumerate(class_names):
            splits: dict[str, list[str]] = {}  # file -> its split in each fold
            for fold in range(3):
                list_path = folder.find_one(f'{class_name}_test_split{fold + 1}.txt')
                for where, line in folder.lines(list_path):
                    # 'April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 '; from the right, as a name may
                    # contain spaces.
                    file, _, mark = line.rpartition(' ')
                    split = folder.look_up(mark, self.marks, where, 'the mark')
                    splits.setdefault(file.strip(), [''] * 3)[fold] = split
            for file, split_in_fold in splits.items():
                path = f'{class_name}/{file}'
                clips.append(Clip([path], tuple(split_in_fold), [segment({'class': number})]))
        return clips, {'class': class_names}


class Kinetics(Dataset):
    """Label `class`, alphabetical. Splits train, validation, test. Clips of a test list without
    labels are prepared with unknown ones. A file ID.mp4 that is longer than its clip is taken for
    the whole video and cut. Names like kinetics-400_train.csv are found too.

        train.csv, val.csv (or validate.csv), test.csv
                                of the owners' annotations; any that is there is used
        anywhere: the clips     as ID_000010_000020.mp4 (start and end in seconds, six digits),
                                in class folders or not
    """

    # The owners' names first, then patterns for renamed copies; the first that matches is used.
    lists = {
        'train': ('train.csv', '*[_-]train.csv'),
        'validation': ('val.csv', 'validate.csv', '*[_-]val*.csv'),
        'test': ('test.csv', '*[_-]test.csv'),
    }

    def __init__(self, num_classes: int, num_clips: str):
        self.num_classes = num_classes
        self.name = f'kinetics{num_classes}'
        self.title = f'Kinetics-{num_classes}: {num_clips} clips of {num_classes} human actions'

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        if next(self._rows(folder), None) is None:
            # Raises, unless there is a list without rows.
            folder.find_one('train.csv', 'val.csv', 'validate.csv', 'test.csv')

        # From all lists together, so that one class has one number in every split.
        class_names = sorted({row['label'] for _, _, row in self._rows(folder) if row.get('label')})
        # Fewer is possible, if only some lists are there. More means that the files are those of
        # another edition.
        if len(class_names) > self.num_classes:
            raise DataError(
                f'{self.name}: the annotation files in {folder.root} name {len(class_names)} '
                'classes; this is another edition of Kinetics'
            )
        return self._clips(folder, numbered(class_names)), {'class': class_names}

    def _clips(self, folder: AnnotationFolder, number_of: Mapping[str, int]) -> Iterator[Clip]:
        for where, split, row in self._rows(folder):
            start = folder.parse_float(row['time_start'], where)
            end = folder.parse_float(row['time_end'], where)
            # Some test lists have no column `label`.
            class_number = number_of.get(row.get('label', ''), -1)
            yield Clip(
                **youtube(row['youtube_id'], start, end),
                split=split,
                segments=[segment({'class': class_number})],
            )

    def _rows(self, folder: AnnotationFolder) -> Iterator[tuple[str, str, dict[str, str]]]:
        """(file and line, split, row) of all clips."""
        for split, patterns in self.lists.items():
            path = folder.find_optional(*patterns)
            if path is None:
                continue
            for where, row in folder.table(path, ('youtube_id', 'time_start', 'time_end')):
                yield where, split, row


class MomentsInTime(Dataset):
    """Label `class`, with the numbers of moments_categories.txt. Splits train and validation.

    moments_categories.txt, trainingSet.csv, validationSet.csv
                            of the owners' archive (version 1: one label per video)
    training/CLASS/*.mp4, validation/CLASS/*.mp4
                            of the same
    """

    name = 'moments_in_time'
    title = 'Moments in Time: about 1,000,000 videos of 3 seconds'

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        classes: dict[str, int] = {}
        for where, line in folder.lines(folder.find_one('moments_categories.txt')):
            # 'clapping,0'
            class_name, _, number = line.rpartition(',')
            if class_name:
                classes[class_name] = folder.parse_int(number, where)
            else:  # a line without a number counts on
                classes[line] = len(classes)
        # Class numbers index an array of names, so a gap or a repetition would shift them.
        if sorted(classes.values()) != list(range(len(classes))):
            raise DataError(
                f'{self.name}: the numbers of moments_categories.txt are not 0 to '
                f'{len(classes) - 1}, each once'
            )

        # Names in the order of their numbers.
        class_names = sorted(classes, key=classes.__getitem__)
        return self._clips(folder, classes), {'class': class_names}

    def _clips(self, folder: AnnotationFolder, classes: Mapping[str, int]) -> Iterator[Clip]:
        for split, subfolder, list_name in (
            ('train', 'training', 'trainingSet.csv'),
            ('validation', 'validation', 'validationSet.csv'),
        ):
            # path,label and two counts of votes, which are not used.
            list_path = folder.find_one(list_name)
            for where, row in folder.table(list_path, ('path', 'label'), header=False):
                class_number = folder.look_up(row['label'], classes, where, 'class')
                path = f'{subfolder}/{row["path"]}'
                yield Clip([path], split, [segment({'class': class_number})])
