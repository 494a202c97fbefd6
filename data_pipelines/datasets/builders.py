"""The named datasets as tfds builders, for `tfds build` and `tfds.builder`; what they write is what `data_pipelines.prepare` writes.

    import data_pipelines.datasets.builders
    builder = tfds.builder('our_ucf101', data_dir='data', fps=10, size=128)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=FOLDER))

or  tfds build --imports=data_pipelines.datasets.builders --manual_dir=FOLDER --data_dir=data "our_ucf101/fps=10,size=128"
(the `tfds` command of tfds 4.9.10 needs apache-beam and mlcroissant to be installed, whatever it builds).

They are called our_NAME, because tfds has datasets of some of these names. The keywords of `prepare` (fps, size, rate, …) are keywords of the
builders. The folder that comes out (DATA_DIR/our_ucf101/1.0.0) is what config.data.train wants as `path`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines.datasets import folder, named
from data_pipelines.errors import DataError
from data_pipelines.prepare import prepare

PREFIX = 'our_'


class Named(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """dataset: the entry of named.DATASETS. settings: keywords of `prepare`."""

    VERSION = tfds.core.Version('1.0.0')
    url_infos: dict = {}
    dataset: named.Dataset

    def __init__(
        self,
        *,
        data_dir: Any = None,
        config: Any = None,
        version: Any = None,
        file_format: Any = None,
        **settings,
    ):
        self._settings, self._known = settings, None
        super().__init__(
            data_dir=data_dir,
            config=config,
            version=version,
            file_format=file_format or 'array_record',
        )

    @property
    def info(self) -> tfds.core.DatasetInfo:
        """What is on disk; before that, without the labels."""
        if self._known is None:
            self._known = self._info()
        return self._known

    def _info(self) -> tfds.core.DatasetInfo:
        stored = pathlib.Path(self.data_dir, 'features.json').is_file()
        features = (
            tfds.features.FeatureConnector.from_config(self.data_dir)
            if stored
            else folder.features({})
        )
        title, text, files = self.dataset.page()
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=f'{title}. {text}\n\n{files}'
        )

    def download_and_prepare(
        self, *, download_dir=None, download_config=None, file_format=None, **_
    ) -> None:
        """As `prepare`; nothing is downloaded. Raises DataError."""
        manual_dir = download_config.manual_dir if download_config else None
        if not manual_dir:
            raise DataError(
                f'--manual_dir is not given; it is the folder with these files:\n{self.dataset.page()[2]}'
            )
        overwrite = bool(download_config.download_mode.overwrite_dataset)
        prepare(
            dataset=self.dataset.name,
            manual_dir=str(manual_dir),
            out=str(self.data_dir),
            name=self.name,
            overwrite=overwrite,
            **self._settings,
        )
        self._known = None
        self.info.read_from_directory(self.data_dir)

    def _split_generators(self, dl_manager):
        raise NotImplementedError('download_and_prepare writes the dataset')

    def _generate_examples(self):
        raise NotImplementedError('download_and_prepare writes the dataset')


for _dataset in named.DATASETS.values():
    _class = ''.join(part.title() for part in (PREFIX + _dataset.name).split('_'))
    globals()[_class] = type(
        _class,
        (Named,),
        {
            'name': PREFIX + _dataset.name,
            'dataset': _dataset,
            '__module__': __name__,
            '__doc__': _dataset.title,
        },
    )
