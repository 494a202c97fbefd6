"""The named datasets as tfds builders, for `tfds build` and `tfds.builder`.

What they write is what `data_pipelines.prepare` writes.

    import data_pipelines.datasets.builders
    builder = tfds.builder('our_ucf101', data_dir='data', fps=10, size=128)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=FOLDER))

or, on the command line (the `tfds` command of tfds 4.9.10 needs apache-beam and mlcroissant to be
installed, whatever it builds):

    tfds build --imports=data_pipelines.datasets.builders --manual_dir=FOLDER --data_dir=data \\
        "our_ucf101/fps=10,size=128"

They are called our_NAME, because tfds has datasets of some of these names. The keywords of
`prepare` (fps, size, rate, …) are keywords of the builders. The folder that comes out
(DATA_DIR/our_ucf101/1.0.0) is what config.data.train takes as `path`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines.datasets import folder, named
from data_pipelines.errors import DataError
from data_pipelines.prepare import prepare

PREFIX = 'our_'  # tfds itself has a ucf101, for example


class Named(
    tfds.core.GeneratorBasedBuilder,
    # The base class is not a dataset; only the subclasses are registered.
    skip_registration=True,  # type: ignore[call-arg]  # tfds has no types
):
    """Builder of one named dataset; the subclasses are made below.

    Args:
        data_dir: as of tfds, like the three that follow.
        config: as of tfds.
        version: as of tfds.
        file_format: as of tfds; ArrayRecord by default.
        settings: keywords of `prepare`.
    """

    VERSION = tfds.core.Version('1.0.0')
    # Nothing is downloaded. The inherited property looks for a checksum file beside this module.
    url_infos: dict = {}
    dataset: named.Dataset  # the entry of named.DATASETS, set by each subclass

    def __init__(
        self,
        *,
        data_dir: Any = None,
        config: Any = None,
        version: Any = None,
        file_format: Any = None,
        **settings: Any,
    ):
        # Set first: the constructor of tfds reads `info`.
        self._settings = settings
        self._current_info: tfds.core.DatasetInfo | None = None
        super().__init__(
            data_dir=data_dir,
            config=config,
            version=version,
            file_format=file_format or 'array_record',
        )

    @property
    def info(self) -> tfds.core.DatasetInfo:
        """What is on disk; before that, without the labels.

        tfds caches this property. It is not cached for good here, because the labels are known only
        when the annotation files have been read.
        """
        if self._current_info is None:
            self._current_info = self._info()
        return self._current_info

    def _info(self) -> tfds.core.DatasetInfo:
        # Written by an earlier run; it has the labels too.
        if pathlib.Path(self.data_dir, 'features.json').is_file():
            features = tfds.features.FeatureConnector.from_config(self.data_dir)
        else:
            features = folder.features({})
        title, text, files = self.dataset.page()
        return tfds.core.DatasetInfo(
            builder=self, features=features, description=f'{title}. {text}\n\n{files}'
        )

    def download_and_prepare(
        self,
        *,
        download_dir: Any = None,
        download_config: Any = None,
        file_format: Any = None,
        **unused: Any,
    ) -> None:
        """Prepare the dataset from the files in `download_config.manual_dir`.

        Nothing is downloaded. Other arguments of tfds have no effect.

        Raises:
            DataError: as of `prepare`.
        """
        manual_dir = download_config.manual_dir if download_config else None
        if not manual_dir:
            _, _, files = self.dataset.page()
            raise DataError(
                f'--manual_dir is not given; it is the folder with these files:\n{files}'
            )
        prepare(
            dataset=self.dataset.name,
            manual_dir=str(manual_dir),
            out=str(self.data_dir),
            name=self.name,
            # `prepare` resumes and compares settings itself; only the mode "overwrite" is passed
            # on.
            overwrite=bool(download_config.download_mode.overwrite_dataset),
            **self._settings,
        )
        # Built again, now with the labels from features.json.
        self._current_info = None
        self.info.read_from_directory(self.data_dir)

    def _split_generators(self, dl_manager: Any) -> Any:
        # tfds declares both as abstract, but nothing calls them.
        raise NotImplementedError('download_and_prepare writes the dataset')

    def _generate_examples(self) -> Any:
        raise NotImplementedError('download_and_prepare writes the dataset')


def _builder_class(dataset: named.Dataset) -> type[Named]:
    """The builder of a dataset, which tfds registers when its class is created."""
    name = PREFIX + dataset.name
    class_name = ''.join(part.title() for part in name.split('_'))  # OurUcf101
    members = {
        'name': name,
        'dataset': dataset,
        '__module__': __name__,
        '__doc__': dataset.title,
    }
    # The attribute `name` has to be there when the class is created: tfds would otherwise derive
    # it from the class name.
    return type(class_name, (Named,), members)


# tfds finds builders as members of their module.
for _dataset in named.DATASETS.values():
    _class = _builder_class(_dataset)
    globals()[_class.__name__] = _class
