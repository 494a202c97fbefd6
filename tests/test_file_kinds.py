"""Files of other kinds that are given to an importer."""

import gzip
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.importers import __main__ as importers
from vatt_jax.importers import file_kinds

# Content of a file -> what is said of it by --format=vatt_tf.
CONTENTS = {
    'page': (b'\n<!DOCTYPE html><html>', 'a web page'),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    'model.gz': (gzip.compress(b'numbers'), 'unpack it first'),
    'model.h5': (b'\x89HDF\r\n\x1a\n', r'HDF5 \(Keras\), which no importer reads'),
    'model.npy': (b'\x93NUMPY\x01\x00', 'an array of NumPy'),
    'model.pkl': (pickle.dumps({'params': {}}), 'give --format=mmv'),
    'model.safetensors': ((8).to_bytes(8, 'little') + b'{}      ', '--format=safetensors'),
}


@pytest.mark.parametrize('name', CONTENTS)
def test_files_of_other_kinds(tmp_path, name):
    content, message = CONTENTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    arguments = ['--format=vatt_tf', f'--checkpoint={path}', f'--out={tmp_path / "out"}']
    with pytest.raises(ConfigError, match=f'for --format=vatt_tf, got .*{message}'):
        importers.main(arguments)
    assert not (tmp_path / 'out').exists()


def test_archives(tmp_path):
    (tmp_path / 'a').write_bytes(b'a')
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        archive.add(tmp_path / 'a', 'a')
    with zipfile.ZipFile(tmp_path / 'torch.pt', 'w') as archive:
        archive.writestr('data.pkl', b'')
    np.savez(tmp_path / 'a.npz', a=np.zeros(3))
    for name, message in (
        ('a.tar', 'an archive; unpack it'),
        ('torch.pt', 'give --format=mmv'),
        ('a.npz', 'arrays of NumPy, which no importer reads'),
    ):
        with pytest.raises(ConfigError, match=message):
            file_kinds.check(tmp_path / name, 'vatt_tf')
    file_kinds.check(tmp_path / 'torch.pt', 'mmv')


def test_folders_of_other_kinds(tmp_path, plain_run):
    with pytest.raises(ConfigError, match='got a folder without a checkpoint'):
        file_kinds.check(tmp_path, 'mmv')
    for folder in (plain_run, plain_run / 'checkpoints' / '2'):
        with pytest.raises(ConfigError, match='got a run of this library, which vatt_jax.load'):
            file_kinds.check(folder, 'vatt_tf')

    (tmp_path / 'ckpt').mkdir()
    (tmp_path / 'ckpt.index').write_bytes(b'')
    for given in (tmp_path, tmp_path / 'ckpt.index'):
        with pytest.raises(ConfigError, match='give --format=vatt_tf'):
            file_kinds.check(given, 'mmv')
    # A prefix, whatever else is called so; a file that is not there; and what may be read.
    for given in ('ckpt', 'ckpt.index', 'nothing'):
        file_kinds.check(tmp_path / given, 'vatt_tf')


def test_a_copy_that_lacks_a_part_is_told_by_its_importer(tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(b'')
    file_kinds.check(tmp_path, 'safetensors')
    with pytest.raises(ConfigError, match='a model of another library'):
        file_kinds.check(tmp_path, 'mmv')
