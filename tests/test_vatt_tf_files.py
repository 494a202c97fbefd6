"""VATT checkpoints whose files are not whole, or not what a config expects; the preset mmv_fac."""

import pathlib
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_importers as layout
from tests import tiny
from tests.test_importers import (
    FINETUNED,
    HEAD,
    TOWERS,
    VOCAB,
    assert_checkpoint_holds,
    assert_close,
    batch_norm_shapes,
    fac_spaces,
    finetuned_shapes,
    forward,
    linear_text_shapes,
    linear_text_tower,
    make_batch,
    make_config,
    tx_fac_shapes,
    wat_shapes,
    write_checkpoint,
)
from tests.test_mmv_towers import conv, pool
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.importers import vatt_tf
from vatt_jax.importers.__main__ import main
from vatt_jax.inputs.spectrogram import log_mel

# ---- I3D and ResNet-50 of mmv_fac: names and shapes as the official modules have them
# Of each Mixed block: 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; 1x1x1 after the pool.
MIXED = {
    'mixed_3b': (64, 96, 128, 16, 32, 32),
    'mixed_3c': (128, 128, 192, 32, 96, 64),
    'mixed_4b': (192, 96, 208, 16, 48, 64),
    'mixed_4c': (160, 112, 224, 24, 64, 64),
    'mixed_4d': (128, 128, 256, 24, 64, 64),
    'mixed_4e': (112, 144, 288, 32, 64, 64),
    'mixed_4f': (256, 160, 320, 32, 128, 128),
    'mixed_5b': (256, 160, 320, 32, 128, 128),
    'mixed_5c': (384, 192, 384, 48, 128, 128),
}
FEW_BLOCKS = ('mixed_3b', 'mixed_4b', 'mixed_5b')
VIDEO, AUDIO = f'{TOWERS}/vid_backbone/_base', f'{TOWERS}/aud_backbone/_base'


def unit_shapes(key, kernel):
    """A convolution in three dimensions and its batch norm."""
    return {f'{key}/conv3d/kernel': kernel} | batch_norm_shapes(f'{key}/bn', kernel[-1])


def i3d_shapes(key, blocks):
    """(shapes, width of the features)."""
    shapes = unit_shapes(f'{key}/conv3d_1a_7x7', (7, 7, 7, 3, 64))
    shapes |= unit_shapes(f'{key}/conv3d_2b_1x1', (1, 1, 1, 64, 64))
    shapes |= unit_shapes(f'{key}/conv3d_2c_3x3', (3, 3, 3, 64, 192))
    width = 192
    for block in blocks:
        zero, one_reduced, one, two_reduced, two, three = MIXED[block]
        kernels = {
            'b0_0': (1, 1, 1, width, zero),
            'b1_0': (1, 1, 1, width, one_reduced),
            'b1_1': (3, 3, 3, one_reduced, one),
            'b2_0': (1, 1, 1, width, two_reduced),
            'b2_1': (3, 3, 3, two_reduced, two),
            'b3_1': (1, 1, 1, width, three),
        }
        for name, kernel in kernels.items():
            shapes |= unit_shapes(f'{key}/{block}/unit3d_{name}', kernel)
        width = zero + one + two + three
    return shapes, width


def listed_shapes(key, convolution, norm, kernel):
    """A convolution and its batch norm by their places in a list of layers."""
    return {f'{key}/{convolution}/conv2d/kernel': kernel} | batch_norm_shapes(
        f'{key}/{norm}/bn', kernel[-1]
    )


def resnet_shapes(key, blocks):
    """(shapes, width of the features)."""
    shapes = listed_shapes(f'{key}/initial_conv_relu_max_pool', 0, 2, (7, 7, 1, 64))
    width = 64
    for group, count in enumerate(blocks):
        inner = 64 * 2**group
        for block in range(count):
            layer = f'{key}/block_groups/{group}/layers/{block}'
            layers = f'{layer}/conv_relu_dropblock_layers'
            shapes |= listed_shapes(layers, 0, 1, (1, 1, width, inner))
            shapes |= listed_shapes(layers, 3, 4, (3, 3, inner, inner))
            shapes |= listed_shapes(layers, 6, 7, (1, 1, inner, 4 * inner))
            if block == 0:
                shapes |= listed_shapes(
                    f'{layer}/projection_layers', 0, 1, (1, 1, width, 4 * inner)
                )
            width = 4 * inner
    return shapes, width


def mmv_fac_shapes(mixed, blocks):
    """The preset mmv_fac, with these Mixed blocks and blocks of the ResNet's groups."""
    video, video_width = i3d_shapes(VIDEO, mixed)
    audio, audio_width = resnet_shapes(AUDIO, blocks)
    text = linear_text_shapes(f'{TOWERS}/txt_backbone')
    return video | audio | text | layout.head_shapes(video_width, audio_width, layout.WIDTH)


def norm_relu(weights, key, x):
    return np.maximum(layout.batch_norm(weights, key, x), 0)


def i3d_unit(weights, key, x, strides=(1, 1, 1)):
    return norm_relu(weights, f'{key}/bn', conv(x, weights[f'{key}/conv3d/kernel'], strides))


def i3d(weights, key, x, blocks):
    """[B T H W 3] -> [B width]."""
    x = i3d_unit(weights, f'{key}/conv3d_1a_7x7', x, (2, 2, 2))
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = i3d_unit(weights, f'{key}/conv3d_2b_1x1', x)
    x = i3d_unit(weights, f'{key}/conv3d_2c_3x3', x)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for block in blocks:
        if block == 'mixed_4b':
            x = pool(x, (3, 3, 3), (2, 2, 2))
        elif block == 'mixed_5b':
            x = pool(x, (2, 2, 2), (2, 2, 2))
        unit = f'{key}/{block}/unit3d'
        one = i3d_unit(weights, f'{unit}_b1_0', x)
        two = i3d_unit(weights, f'{unit}_b2_0', x)
        branches = [
            i3d_unit(weights, f'{unit}_b0_0', x),
            i3d_unit(weights, f'{unit}_b1_1', one),
            i3d_unit(weights, f'{unit}_b2_1', two),
            i3d_unit(weights, f'{unit}_b3_1', pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        x = np.concatenate(branches, -1)
    return x.mean((1, 2, 3))


def resnet(weights, key, x, blocks):
    """[B frames bands] -> [B width]; convolutions with a stride are padded on both sides."""

    def convolved(place, norm, x, stride):
        kernel = weights[f'{place[0]}/{place[1]}/conv2d/kernel']
        x = conv(x, kernel, (stride, stride), even=stride > 1)
        return layout.batch_norm(weights, f'{place[0]}/{norm}/bn', x)

    x = convolved((f'{key}/initial_conv_relu_max_pool', 0), 2, x[..., None], 2)
    x = pool(np.maximum(x, 0), (3, 3), (2, 2))
    for group, count in enumerate(blocks):
        for block in range(count):
            layer = f'{key}/block_groups/{group}/layers/{block}'
            layers = f'{layer}/conv_relu_dropblock_layers'
            stride = 2 if group and block == 0 else 1
            shortcut = x
            if block == 0:
                shortcut = convolved((f'{layer}/projection_layers', 0), 1, x, stride)
            y = np.maximum(convolved((layers, 0), 1, x, 1), 0)
            y = np.maximum(convolved((layers, 3), 4, y, stride), 0)
            x = np.maximum(convolved((layers, 6), 7, y, 1) + shortcut, 0)
    return x.mean((1, 2))


def test_the_layout_of_mmv_fac_is_the_official_one():
    config = configs.load('configs/vatt.py:mmv')
    config.model.towers.text.update({'vocab': VOCAB, 'word_width': layout.WORD_WIDTH})
    found = {entry.theirs: entry.shape for entry in vatt_tf.layout(vatt_tf.filled(config))}
    video, _ = i3d_shapes(VIDEO, MIXED)
    audio, _ = resnet_shapes(AUDIO, (3, 4, 6, 3))
    # 57 and 53 convolutions, each with four arrays of its norm.
    assert (len(video), len(audio)) == (285, 265)
    towers = video | audio
    assert {name: shape for name, shape in found.items() if name in towers} == towers
    others = set(found) - set(towers)
    assert all(name.startswith((f'{TOWERS}/txt_backbone/', f'{HEAD}/')) for name in others)


def test_mmv_fac_computes_what_the_official_weights_compute_and_goes_back(tmp_path):
    shapes = mmv_fac_shapes(FEW_BLOCKS, (1, 2))
    weights = write_checkpoint(tmp_path / 'a', shapes, optimizer_state=False)
    base = tiny.config()
    base.model.inputs.audio.mel = {'bins': 20, 'window': 128, 'hop': 64, 'low': 10.0, 'high': 900.0}
    config, report = vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, base)
    assert report.read == len(weights)
    assert report.unused == []
    assert report.assumed == []
    assert config.model.towers.video.to_dict() == {'name': 'i3d', 'blocks': (1, 1, 1)}
    assert config.model.towers.audio.to_dict() == {'name': 'resnet2d', 'blocks': (1, 2)}

    batch = make_batch()
    mel = log_mel(jnp.asarray(batch['audio']['data']), 2000, config.model.inputs.audio.mel)
    batch['audio']['data'] = np.asarray(mel)
    found = forward(tmp_path / 'run', batch)
    pooled = {
        'video': i3d(weights, VIDEO, batch['video']['data'].astype(np.float64), FEW_BLOCKS),
        'audio': resnet(weights, AUDIO, np.asarray(mel, np.float64), (1, 2)),
        'text': layout.each_text(
            linear_text_tower, weights, f'{TOWERS}/txt_backbone', batch['text']['data']
        ),
    }
    for modality, expected in pooled.items():
        scale = np.abs(expected).max()
        assert_close(found.encoded[modality].pooled / scale, expected / scale)
    for (space, modality), expected in fac_spaces(weights, **pooled).items():
        scale = np.abs(expected).max()
        assert_close(found.spaces[space][modality] / scale, expected / scale)

    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(weights)
    assert_checkpoint_holds(tmp_path / 'b', weights)


@pytest.mark.parametrize('tower', ['i3d', 'resnet2d'])
def test_finetuned_convolutional_towers(tmp_path, tower):
    if tower == 'i3d':
        shapes, width = i3d_shapes(FINETUNED, FEW_BLOCKS)
    else:
        shapes, width = resnet_shapes(FINETUNED, (1, 1))
    weights = write_checkpoint(tmp_path / 'a', finetuned_shapes(shapes, width), False)
    base = tiny.config()
    base.model.inputs.audio.mel = {'bins': 20, 'window': 128, 'hop': 64, 'low': 10.0, 'high': 900.0}
    config, report = vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, base)
    modality = 'video' if tower == 'i3d' else 'audio'
    assert config.model.towers[modality].name == tower
    assert report.read == len(weights)
    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(weights)
    assert_checkpoint_holds(tmp_path / 'b', weights)


# ---- files that are not whole
@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(prefix, weights) of a fine-tuned tower with what an optimizer leaves."""
    prefix = tmp_path_factory.mktemp('whole') / 'ckpt'
    return prefix, write_checkpoint(prefix, finetuned_shapes(wat_shapes(FINETUNED)))


def copied(whole, tmp_path):
    """The prefix of a copy."""
    for file in whole[0].parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / whole[0].name


def data_file(prefix):
    return pathlib.Path(f'{prefix}.data-00000-of-00001')


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def empty(path):
    path.write_bytes(b'')


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    'damage, message',
    [
        (remove, r'index is there and no file .*ckpt.data-00000-of-00001; fetch it too'),
        (cut, r'cannot be read from .*ckpt.data-00000-of-00001 .*cut short or damaged; fetch it'),
        (empty, r'cannot be read from .*ckpt.data-00000-of-00001 .*cut short or damaged; fetch it'),
        (flip, r'cannot be read from .*ckpt.data-00000-of-00001 .*cut short or damaged; fetch it'),
    ],
)
def test_a_data_file_that_is_not_whole_is_one_sentence(whole, tmp_path, damage, message):
    prefix = copied(whole, tmp_path)
    damage(data_file(prefix))
    with pytest.raises(ConfigError, match=message) as error:
        vatt_tf.import_checkpoint(str(prefix), tmp_path / 'run', None, tiny.config())
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('damage', [cut, empty, flip])
def test_an_index_that_is_not_whole_is_one_sentence(whole, tmp_path, damage):
    prefix = copied(whole, tmp_path)
    damage(pathlib.Path(f'{prefix}.index'))
    with pytest.raises(ConfigError, match=r'ckpt.index cannot be read') as error:
        vatt_tf.import_checkpoint(str(prefix), tmp_path / 'run', None, tiny.config())
    assert '\n' not in str(error.value)


def test_one_of_several_data_files_is_missing(whole, tmp_path):
    prefix = copied(whole, tmp_path)
    data_file(prefix).rename(f'{prefix}.data-00000-of-00002')
    with pytest.raises(ConfigError, match=r'expected 2 files .*ckpt.data-…, got 1'):
        vatt_tf.open_checkpoint(str(prefix))


def test_a_cut_that_loses_the_optimizer_alone_is_reported(whole, tmp_path, capsys):
    """A slot of the optimizer is the last variable of the file."""
    prefix = copied(whole, tmp_path)
    content = data_file(prefix).read_bytes()
    data_file(prefix).write_bytes(content[:-12])
    _, report = vatt_tf.import_checkpoint(str(prefix), tmp_path / 'run', None, tiny.config())
    assert report.unreadable == [f'{FINETUNED}/wave_to_patch/bias/.OPTIMIZER_SLOT/optimizer/m']
    assert report.read == len(whole[1])

    main([f'--checkpoint={prefix}', f'--out={tmp_path / "again"}'])
    assert 'lost in the file: 1 of the optimizer' in capsys.readouterr().out

    _, report = vatt_tf.import_checkpoint(str(whole[0]), tmp_path / 'whole', None, tiny.config())
    assert report.unreadable == []


def test_a_file_of_the_official_writer_counts_as_whole(tmp_path):
    """Objects, their description and slots: no byte too many is expected of the files."""
    vatt_tf.write_checkpoint(str(tmp_path / 'c'), {f'{FINETUNED}/a': np.ones(3, np.float32)})
    shapes, read = vatt_tf.open_checkpoint(str(tmp_path / 'c'))
    assert vatt_tf._lost_bookkeeping(str(tmp_path / 'c'), shapes, read) == []


# ---- parts of a model
OWN = {'video': 'vid_backbone', 'audio': 'aud_backbone', 'text': 'txt_backbone'}
LAYERS = {
    'video': ('vid_to_hid', 'hid_to_va', 'va_to_vat'),
    'audio': ('aud_to_va',),
    'text': ('txt_to_vat',),
}


def part_of(modalities, heads):
    """Shapes of these towers of the modality-specific model, with the head's layers or without."""
    prefixes = [f'{TOWERS}/{OWN[modality]}/' for modality in modalities]
    if heads:
        prefixes += [f'{HEAD}/{layer}/' for modality in modalities for layer in LAYERS[modality]]
    shapes = tx_fac_shapes()
    return {name: shape for name, shape in shapes.items() if name.startswith(tuple(prefixes))}


@pytest.mark.parametrize('heads', [True, False])
@pytest.mark.parametrize(
    'modalities', [('video',), ('audio',), ('text',), ('video', 'text'), ('audio', 'text')]
)
def test_a_part_of_a_checkpoint_is_imported(tmp_path, modalities, heads):
    weights = write_checkpoint(tmp_path / 'a', part_of(modalities, heads), False)
    config, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config()
    )
    assert set(config.model.towers) == set(modalities)
    assert report.read == len(weights)
    assert (config.model.head.name == 'none') == (not heads)

    batch = {modality: make_batch()[modality] for modality in modalities}
    found = forward(tmp_path / 'run', batch)
    if 'audio' in modalities:
        key = f'{TOWERS}/aud_backbone/_base'
        data = batch['audio']['data']
        expected = np.stack([layout.own_tower(weights, key, 'wat', x)[0] for x in data])
        assert_close(found.encoded['audio'].pooled, expected)
        if heads:
            expected = layout.dense(weights, f'{HEAD}/aud_to_va', expected)
            assert_close(found.spaces['va']['audio'], expected)

    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(weights)
    assert_checkpoint_holds(tmp_path / 'b', weights)


def test_a_shared_encoder_with_one_modality(tmp_path):
    unified = layout.UNIFIED
    left_out = ('/audio', '/text', f'{unified}/aud_', f'{unified}/txt_', f'{HEAD}/')
    shapes = {
        name: shape
        for name, shape in layout.ut_fac_shapes().items()
        if not any(part in name for part in left_out)
    }
    weights = write_checkpoint(tmp_path / 'a', shapes, False)
    config, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config()
    )
    assert list(config.model.towers) == ['video']
    assert config.model.head.name == 'none'
    assert report.read == len(weights)
    video = make_batch()['video']
    found = forward(tmp_path / 'run', {'video': video}).encoded['video'].pooled
    assert_close(found, [layout.unified(weights, 'video', x)[0] for x in video['data']])


def test_a_checkpoint_without_a_tower(tmp_path):
    write_checkpoint(tmp_path / 'a', {f'{TOWERS}/odd\x1b[2J': (3,)})
    with pytest.raises(ConfigError, match='has no tower of video, audio or text') as error:
        vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config())
    assert str(error.value).isprintable()


# ---- how a checkpoint is named
@pytest.mark.parametrize('ending', ['.index', '.data-00000-of-00001'])
def test_any_of_its_files_names_a_checkpoint(whole, ending):
    shapes, read = vatt_tf.open_checkpoint(f'{whole[0]}{ending}')
    assert set(whole[1]) <= set(shapes)
    assert read('save_counter') == 1


def test_what_is_no_prefix_is_told_from_one(whole, tmp_path):
    with pytest.raises(ConfigError, match=r'there are .*whole\d*/ckpt'):
        vatt_tf.open_checkpoint(str(whole[0].parent))
    (tmp_path / 'mmv.pkl').write_bytes(b'')
    with pytest.raises(ConfigError, match='name its kind with --format'):
        vatt_tf.open_checkpoint(str(tmp_path / 'mmv.pkl'))


# ---- what a checkpoint does not record, or does not fit
def test_heads_of_another_width_are_not_guessed(tmp_path, monkeypatch):
    """Advice for a config that does not fit is not to leave it out: that cannot work."""
    monkeypatch.setattr(layout, 'HEAD_WIDTH', 8)
    write_checkpoint(tmp_path / 'a', finetuned_shapes(wat_shapes(FINETUNED)))
    prefix = str(tmp_path / 'a')
    message = r'give a --config with config.model.towers.audio.heads × head_width = 16'
    with pytest.raises(ConfigError, match=message):
        vatt_tf.import_checkpoint(prefix, tmp_path / 'run', None, tiny.config())

    monkeypatch.setattr(layout, 'HEAD_WIDTH', 64)
    config = make_config()
    config.model.head = {'name': 'none'}
    config.objective = {'name': 'classification', 'stream': 'audio'}
    config.model.towers.audio.heads = 12
    with pytest.raises(ConfigError) as error:
        vatt_tf.import_checkpoint(prefix, tmp_path / 'run', config)
    assert 'audio.heads × head_width=12 × 64 (checkpoint: 16 in all)' in str(error.value)
    assert '--config is needed' in str(error.value)
    assert 'leave out --config' not in str(error.value)

    config.model.towers.audio.update({'heads': 2, 'head_width': 8})
    vatt_tf.import_checkpoint(prefix, tmp_path / 'run', config)


def test_the_number_of_heads_is_reported_as_assumed(whole, tmp_path):
    _, report = vatt_tf.import_checkpoint(str(whole[0]), tmp_path / 'run', None, tiny.config())
    assert report.assumed == [
        'heads of 64 in model.towers.audio: a checkpoint does not record how many there are'
    ]


def test_a_long_list_is_its_beginning_and_a_count(whole, tmp_path):
    config = make_config()
    config.model.head = {'name': 'none'}
    config.objective = {'name': 'classification', 'stream': 'audio'}
    config.model.towers.audio.layers = 24
    with pytest.raises(ConfigError) as error:
        vatt_tf.import_checkpoint(str(whole[0]), tmp_path / 'run', config)
    assert 'lacks 368 of the' in str(error.value)
    assert ', and 363 more' in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize('count', [VOCAB - 1, VOCAB + 10])
def test_a_vocabulary_has_a_word_for_each_row(tmp_path, count):
    write_checkpoint(tmp_path / 'a', tx_fac_shapes())
    words = ['<pad>', '<unk>', *(f'w{i}' for i in range(count - 2))]
    with pytest.raises(ConfigError, match=f'expected {VOCAB} words.*got {count}'):
        vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config(), words)
    assert not (tmp_path / 'run').exists()


def test_a_vocabulary_needs_a_word_table(whole, tmp_path):
    with pytest.raises(ConfigError, match='no word table; leave it out'):
        vatt_tf.import_checkpoint(
            str(whole[0]), tmp_path / 'run', None, tiny.config(), ['<pad>', '<unk>']
        )


@pytest.mark.parametrize(
    'content, message',
    [(b'<pad>\n\xff\xfe', 'not UTF-8'), (None, 'No such file')],
)
def test_a_vocabulary_that_is_no_text(whole, tmp_path, content, message):
    if content is not None:
        (tmp_path / 'words').write_bytes(content)
    flags = [f'--checkpoint={whole[0]}', f'--out={tmp_path / "run"}']
    with pytest.raises(ConfigError, match=message):
        main([*flags, f'--vocabulary={tmp_path / "words"}'])


@pytest.mark.parametrize(
    'name, shape, message',
    [
        ('agg_embedding', (), r'agg_embedding has shape \[\], this config expects \[12\]'),
        ('wave_to_patch/kernel', (64, 12), r'kernel has shape \[64, 12\], expected 3 axes'),
        ('tx/layers/0/mha/q/kernel', (12,), r'q/kernel has shape \[12\], expected 2 axes'),
        (
            'tx/layers/0/mha/q/kernel',
            (12, 0),
            r'q/kernel has shape \[12, 0\], expected 2 axes, none',
        ),
    ],
)
def test_variables_of_another_rank_are_named(tmp_path, name, shape, message):
    shapes = finetuned_shapes(wat_shapes(FINETUNED)) | {f'{FINETUNED}/{name}': shape}
    write_checkpoint(tmp_path / 'a', shapes)
    with pytest.raises(ConfigError, match=message):
        vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config())


@pytest.mark.parametrize(
    'value, message',
    [
        (np.array(['a'] * 12, object), 'expected real numbers, got object'),
        (np.ones(12, np.complex64), 'expected real numbers, got complex64'),
        (np.ones(12, bool), 'expected real numbers, got bool'),
    ],
)
def test_what_is_no_number_is_refused(whole, tmp_path, value, message):
    import tensorflow as tf

    weights = {**whole[1], f'{FINETUNED}/agg_embedding': value}
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / 'a'),
        tensor_names=[f'{name}/.ATTRIBUTES/VARIABLE_VALUE' for name in weights],
        shape_and_slices=[''] * len(weights),
        tensors=[tf.constant(value) for value in weights.values()],
    )
    with pytest.raises(ConfigError, match=f'agg_embedding: {message}'):
        vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config())


def test_an_export_replaces_nothing_unless_asked(whole, tmp_path):
    vatt_tf.import_checkpoint(str(whole[0]), tmp_path / 'run', None, tiny.config())
    prefix = copied(whole, tmp_path)
    before = data_file(prefix).read_bytes()
    flags = [f'--export={tmp_path / "run"}', f'--out={prefix}']
    with pytest.raises(ConfigError, match=r'exists and is left as it is; .* add --overwrite'):
        main(flags)
    assert data_file(prefix).read_bytes() == before
    main([*flags, '--overwrite'])
    assert_checkpoint_holds(prefix, whole[1])
    # Half of a checkpoint is one, too.
    pathlib.Path(f'{prefix}.index').unlink()
    with pytest.raises(ConfigError, match='data-00000-of-00001 exists'):
        main(flags)
    with pytest.raises(ConfigError, match='is a folder'):
        main(['--format=mmv', f'--export={tmp_path / "run"}', f'--out={tmp_path}'])


@pytest.mark.parametrize('name', ['vatt_tf', 'safetensors'])
def test_a_place_that_cannot_be_written_is_one_sentence(whole, tmp_path, name):
    vatt_tf.import_checkpoint(str(whole[0]), tmp_path / 'run', None, tiny.config())
    # As on a disk with room for 1 KiB.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
    try:
        with pytest.raises(ConfigError, match='cannot be written .*make room') as error:
            main([f'--format={name}', f'--export={tmp_path / "run"}', f'--out={tmp_path / "out"}'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert '\n' not in str(error.value)
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot be (made|written)'):
        main([f'--checkpoint={whole[0]}', f'--out={tmp_path / "file" / "run"}'])


def test_an_import_goes_into_a_new_folder(whole, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text('{}')
    for out, message in (('file', 'is a file'), ('run', 'is the folder of a run')):
        with pytest.raises(ConfigError, match=message):
            main([f'--checkpoint={whole[0]}', f'--out={tmp_path / out}'])
