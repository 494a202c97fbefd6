"""Official MMV checkpoints: what is imported computes what the official weights compute.

The files here are in exactly the official layout, only narrow. The reference is an independent
NumPy forward pass, in float64, on the official names.
"""

import json
import pickle

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import vatt_jax
from configs import default, mmv
from tests.test_mmv_towers import conv, pool, shifted
from tests.test_pickles import Flat, stand_in
from vatt_jax.config import ConfigError
from vatt_jax.importers import mmv as importer
from vatt_jax.importers import parameter_map
from vatt_jax.inputs.spectrogram import log_mel
from vatt_jax.models import presets
from vatt_jax.models.towers import resnet_v2
from vatt_jax.training import checkpoint

ROOT = 'text_audio_video'
S3D = f'{ROOT}/visual_module/~/S3D'
TSM = f'{ROOT}/visual_module/~/TSMResNetV2'
AUDIO = f'{ROOT}/audio_module/~/res_net_v2'
TEXT = f'{ROOT}/text_module/~'
HEADS = f'{ROOT}/~_get_pair_embedding_heads'
UNUSED_HEADS = (
    f'{HEADS}/audio2txt_embd/final_projection',
    f'{HEADS}/txt2audio_embd/final_projection',
)
NORM = '__cross_replica_batch_norm'

MULTIPLIER = 1 / 8  # of all published widths
VOCAB, WORD_WIDTH, TEXT_WIDTH, VA, VAT = 20, 6, 24, 16, 8
PUBLISHED_BLOCKS = (3, 4, 6, 3)  # of the four units of a ResNet-50
# Of the ResNets beside each backbone here.
BLOCKS = {'tsm_resnet': (2, 1, 1, 1), 's3d': (1, 2, 1, 1)}
# Published widths of the branches: 0, 1 reduced, 1, 2 reduced, 2, 3.
MIXED = {
    '3b': (64, 96, 128, 16, 32, 32),
    '3c': (128, 128, 192, 32, 96, 64),
    '4b': (192, 96, 208, 16, 48, 64),
    '4c': (160, 112, 224, 24, 64, 64),
    '4d': (128, 128, 256, 24, 64, 64),
    '4e': (112, 144, 288, 32, 64, 64),
    '4f': (256, 160, 320, 32, 128, 128),
    '5b': (256, 160, 320, 32, 128, 128),
    '5c': (384, 192, 384, 48, 128, 128),
}


def narrowed(width):
    """The width here of a published one."""
    return int(width * MULTIPLIER)


class ResNetNames:
    """How the modules of a ResNet are called: the two of the release differ."""

    def __init__(self, root, stem, block, child):
        self.root = root
        self.stem = f'{root}/{stem}'
        self._block = block
        self._child = child

    def block(self, unit, index):
        """The path of a block of a unit."""
        return f'{self.root}/{self._block.format(unit, index)}'

    def convolution(self, block, name):
        """The path of a convolution of a block."""
        return f'{block}/{self._child}{name}'


TSM_NAMES = ResNetNames(TSM, 'tsm_resnet_stem', 'tsm_resnet_unit_{}/block_{}', '')
AUDIO_NAMES = ResNetNames(AUDIO, '~/initial_conv', '~/block_group_{}/block_{}', '~/')


def numbered(path, index):
    """Haiku's name of the module's instance: `path`, `path_1`, …"""
    return f'{path}_{index}' if index else path


# ---- the official layout: {module path: {name: shape}}, of parameters and of state
class Layout:
    """Both trees of shapes; each method adds a part of the model."""

    def __init__(self):
        self.params, self.state = {}, {}

    def add_norm(self, path, width, rank):
        """A batch norm for inputs of this rank, with its two moving averages."""
        shape = (1,) * (rank - 1) + (width,)
        self.params[path] = {'scale': shape, 'offset': shape}
        for moment in ('mean_ema', 'var_ema'):
            self.state[f'{path}/~/{moment}'] = {'average': shape, 'hidden': shape, 'counter': ()}

    def add_dense(self, path, inputs, outputs, bias=True):
        """A dense layer."""
        self.params[path] = {'w': (inputs, outputs)}
        if bias:
            self.params[path]['b'] = (outputs,)

    def add_unit(self, path, kernels, width, gated=True):
        """A unit of S3D; kernels: (time, height, width, inputs) of each convolution."""
        for i, kernel in enumerate(kernels):
            self.params[numbered(f'{path}/~/conv3_d', i)] = {'w': (*kernel, width)}
            self.add_norm(numbered(f'{path}/{NORM}', i), width, rank=5)
        if gated:
            self.add_dense(f'{path}/self_gating', width, width)

    def add_pointwise_unit(self, path, inputs, outputs, gated=True):
        """A unit with one convolution of 1 x 1 x 1."""
        self.add_unit(path, [(1, 1, 1, inputs)], outputs, gated)

    def add_separable_unit(self, path, inputs, outputs):
        """A unit with a convolution over space and one over time."""
        self.add_unit(path, [(1, 3, 3, inputs), (3, 1, 1, outputs)], outputs)

    def add_s3d(self):
        """The video network S3D; returns the width of its features."""
        narrow_64, width = narrowed(64), narrowed(192)
        self.add_unit(f'{S3D}/Conv2d_1a_7x7', [(2, 4, 4, 24)], narrow_64, gated=False)
        self.add_pointwise_unit(f'{S3D}/Conv2d_2b_1x1', narrow_64, narrow_64, gated=False)
        self.add_separable_unit(f'{S3D}/Conv2d_2c_3x3', narrow_64, width)
        for name, widths in MIXED.items():
            zero, one_reduced, one, two_reduced, two, three = (narrowed(n) for n in widths)
            block = f'{S3D}/Mixed_{name}'
            self.add_pointwise_unit(f'{block}/Branch_0_Conv2d_0a_1x1', width, zero)
            self.add_pointwise_unit(
                f'{block}/Branch_1_Conv2d_0a_1x1', width, one_reduced, gated=False
            )
            self.add_separable_unit(f'{block}/Branch_1_Conv2d_0b_3x3', one_reduced, one)
            self.add_pointwise_unit(
                f'{block}/Branch_2_Conv2d_0a_1x1', width, two_reduced, gated=False
            )
            self.add_separable_unit(f'{block}/Branch_2_Conv2d_0b_3x3', two_reduced, two)
            self.add_pointwise_unit(f'{block}/Branch_3_Conv2d_0b_1x1', width, three)
            width = zero + one + two + three
        return width

    def add_resnet(self, names, channels, blocks):
        """A ResNet v2 with bottlenecks; returns the width of its features."""
        width = narrowed(64)
        self.params[names.stem] = {'w': (7, 7, channels, width)}
        for unit, count in enumerate(blocks):
            outputs = narrowed(256 << unit)
            inner = outputs // 4
            for index in range(count):
                block = names.block(unit, index)
                for i, inputs in enumerate((width, inner, inner)):
                    self.add_norm(numbered(f'{block}/{NORM}', i), inputs, rank=4)
                shapes = {
                    'conv_0': (1, 1, width, inner),
                    'conv_1': (3, 3, inner, inner),
                    'conv_2': (1, 1, inner, outputs),
                }
                if index == 0:
                    shapes['shortcut_conv'] = (1, 1, width, outputs)
                for name, shape in shapes.items():
                    self.params[names.convolution(block, name)] = {'w': shape}
                width = outputs
        self.add_norm(f'{names.root}/{NORM}', width, rank=4)
        return width

    def add_text(self):
        """Words and their projection."""
        self.params[f'{TEXT}/embed'] = {'embeddings': (VOCAB, WORD_WIDTH)}
        self.params[f'{TEXT}/text_conv1'] = {'w': (1, WORD_WIDTH, TEXT_WIDTH), 'b': (TEXT_WIDTH,)}

    def add_mlp(self, path, inputs, outputs):
        """A head of two layers with norms."""
        self.add_dense(f'{path}/final_projection_inner', inputs, outputs)
        self.add_norm(f'{path}/{NORM}', outputs, rank=2)
        self.add_dense(f'{path}/final_projection', outputs, outputs, bias=False)
        self.add_norm(f'{path}/{NORM}_1', outputs, rank=2)

    def add_other_heads(self, graph, video, audio):
        """The heads of a graph that was not released."""
        if graph == 'fac_bnrelu':
            self.add_heads(video, audio)
            self.add_norm(f'{ROOT}/~_activate_interaction/{NORM}', VA, rank=2)
            return
        self.add_mlp(f'{HEADS}/vis_embd', video, VA)
        self.add_dense(f'{HEADS}/audio_embd/final_projection', audio, VA)
        self.add_dense(f'{HEADS}/txt_embd/final_projection', TEXT_WIDTH, VA)
        if graph == 'disjoint':
            self.add_mlp(f'{HEADS}/vid2audio_embd', video, VA)
            self.add_dense(f'{HEADS}/audio2txt_embd/final_projection', audio, VA)
            self.add_dense(f'{HEADS}/txt2audio_embd/final_projection', TEXT_WIDTH, VA)

    def add_heads(self, video, audio):
        """The heads of the FAC graph, on features of these widths, and two that nothing uses."""
        self.add_mlp(f'{HEADS}/vid2audio_embd', video, VA)
        self.add_dense(f'{HEADS}/vis_embd/final_projection', VA, VAT)
        self.add_norm(f'{HEADS}/vis_embd/{NORM}', VAT, rank=2)
        self.add_dense(f'{HEADS}/audio_embd/final_projection', audio, VA)
        self.add_dense(f'{HEADS}/txt_embd/final_projection', TEXT_WIDTH, VAT)
        self.add_dense(f'{HEADS}/audio2txt_embd/final_projection', audio, VA)
        self.add_dense(f'{HEADS}/txt2audio_embd/final_projection', TEXT_WIDTH, VA)


def official_layout(backbone, graph='fac'):
    """The layout of a model with this video network."""
    layout = Layout()
    if backbone == 's3d':
        video = layout.add_s3d()
    else:
        video = layout.add_resnet(TSM_NAMES, 3, BLOCKS[backbone])
    audio = layout.add_resnet(AUDIO_NAMES, 1, BLOCKS[backbone])
    layout.add_text()
    if graph == 'fac':
        layout.add_heads(video, audio)
    else:
        layout.add_other_heads(graph, video, audio)
    return layout


def random_values(noise, path, name, shape, counter):
    """Values that keep features apart: kernels are scaled by their inputs, variances positive."""
    values = noise.normal(size=shape)
    if name == 'counter':
        return np.array(counter, np.int32)
    if name == 'scale' or (name == 'average' and 'var_ema' in path):
        values = np.abs(values) * 0.3 + 0.7
    elif name == 'average':
        values = 0.2 * values
    elif name == 'w':
        values = values * (1.4 * np.prod(shape[:-1]) ** -0.5)
    else:
        values = values * 0.3
    return values.astype(np.float32)


def random_checkpoint(layout, counter=7):
    """{'params', 'state'}, with moving averages as `counter` steps of training leave them."""
    noise = np.random.default_rng(0)
    tree = {'params': {}, 'state': {}}
    for group, modules in (('params', layout.params), ('state', layout.state)):
        for path, shapes in modules.items():
            tree[group][path] = {
                name: random_values(noise, path, name, shape, counter)
                for name, shape in shapes.items()
            }
    # An average is the hidden value without its bias to zero: hidden / (1 - decay^counter).
    for values in tree['state'].values():
        values['hidden'] = (values['average'] * (1 - 0.9**counter)).astype(np.float32)
    return tree


# ---- the forward pass, from the fact sheet, on official names
def to_float64(modules):
    """{module path: {name: float64 array}}."""
    return {
        path: {name: value.astype(np.float64) for name, value in values.items()}
        for path, values in modules.items()
    }


class Forward:
    """The official model in evaluation."""

    def __init__(self, tree):
        self.params = to_float64(tree['params'])
        self.state = to_float64(tree['state'])

    def kernel(self, path):
        """The weights of a convolution."""
        return self.params[path]['w']

    def norm(self, path, x):
        """A batch norm with its moving averages."""
        scale, offset = (self.params[path][name].reshape(-1) for name in ('scale', 'offset'))
        mean = self.state[f'{path}/~/mean_ema']['average'].reshape(-1)
        variance = self.state[f'{path}/~/var_ema']['average'].reshape(-1)
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + offset

    def norm_relu(self, path, x):
        """A batch norm and a ReLU."""
        return np.maximum(self.norm(path, x), 0)

    def dense(self, path, x):
        """A dense layer with or without a bias."""
        return x @ self.params[path]['w'] + self.params[path].get('b', 0)

    def unit(self, path, x):
        """A unit of S3D: one or two convolutions with their norms, and perhaps a gate."""
        for i in range(2):
            convolution = numbered(f'{path}/~/conv3_d', i)
            if convolution in self.params:
                x = conv(x, self.kernel(convolution), (1, 1, 1))
                x = self.norm_relu(numbered(f'{path}/{NORM}', i), x)
        gating = f'{path}/self_gating'
        if gating in self.params:
            gate = 1 / (1 + np.exp(-self.dense(gating, x.mean((1, 2, 3)))))
            x = x * gate[:, None, None, None]
        return x

    def mixed(self, path, x):
        """A block of four branches."""
        one = self.unit(f'{path}/Branch_1_Conv2d_0a_1x1', x)
        two = self.unit(f'{path}/Branch_2_Conv2d_0a_1x1', x)
        three = pool(x, (3, 3, 3), (1, 1, 1))
        branches = [
            self.unit(f'{path}/Branch_0_Conv2d_0a_1x1', x),
            self.unit(f'{path}/Branch_1_Conv2d_0b_3x3', one),
            self.unit(f'{path}/Branch_2_Conv2d_0b_3x3', two),
            self.unit(f'{path}/Branch_3_Conv2d_0b_1x1', three),
        ]
        return np.concatenate(branches, -1)

    def s3d(self, video):
        """[B, T, H, W, 3] -> [B, width]."""
        batch, frames, height, width, channels = video.shape
        x = video.reshape(batch, frames // 2, 2, height // 2, 2, width // 2, 2, channels)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        x = x.reshape(batch, frames // 2, height // 2, width // 2, 8 * channels)
        x = pool(self.unit(f'{S3D}/Conv2d_1a_7x7', x), (1, 3, 3), (1, 2, 2))
        x = self.unit(f'{S3D}/Conv2d_2b_1x1', x)
        x = pool(self.unit(f'{S3D}/Conv2d_2c_3x3', x), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name == '4b':
                x = pool(x, (3, 3, 3), (2, 2, 2))
            elif name == '5b':
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = self.mixed(f'{S3D}/Mixed_{name}', x)
        return x.mean((1, 2, 3))

    def resnet(self, names, x, blocks, clip=0):
        """[N, H, W, channels] -> [N, width]; `clip`: frames of a clip, whose channels shift."""
        x = pool(conv(x, self.kernel(names.stem), (2, 2)), (3, 3), (2, 2))
        for unit, count in enumerate(blocks):
            for index in range(count):
                block = names.block(unit, index)
                stride = (2, 2) if unit and index == 0 else (1, 1)
                x = self.bottleneck(names, block, x, stride, index == 0, clip)
        return self.norm_relu(f'{names.root}/{NORM}', x).mean((1, 2))

    def bottleneck(self, names, block, x, stride, projected, clip):
        """A block of a ResNet v2."""

        def convolve(name, x, stride):
            return conv(x, self.kernel(names.convolution(block, name)), stride)

        y = self.norm_relu(f'{block}/{NORM}', x)
        shortcut = convolve('shortcut_conv', y, stride) if projected else x
        if clip:
            y = shifted(y, clip)
        y = convolve('conv_0', y, (1, 1))
        y = convolve('conv_1', self.norm_relu(f'{block}/{NORM}_1', y), stride)
        y = convolve('conv_2', self.norm_relu(f'{block}/{NORM}_2', y), (1, 1))
        return shortcut + y

    def tsm(self, video):
        """[B, T, H, W, 3] -> [B, width]."""
        clips, frames = video.shape[:2]
        pictures = video.reshape(-1, *video.shape[2:])
        features = self.resnet(TSM_NAMES, pictures, BLOCKS['tsm_resnet'], clip=frames)
        return features.reshape(clips, frames, -1).mean(1)

    def audio(self, mel, blocks):
        """[B, frames, bins] -> [B, width]."""
        return self.resnet(AUDIO_NAMES, mel[..., None], blocks)

    def text(self, ids):
        """[B, words] -> [B, width]."""
        words = self.params[f'{TEXT}/embed']['embeddings'][ids]
        convolution = self.params[f'{TEXT}/text_conv1']
        return np.maximum(words @ convolution['w'][0] + convolution['b'], 0).max(-2)

    def coarse(self, fine):
        """From the space of video and audio to that of all three."""
        projected = self.dense(f'{HEADS}/vis_embd/final_projection', np.maximum(fine, 0))
        return self.norm(f'{HEADS}/vis_embd/{NORM}', projected)

    def spaces(self, video, audio, text):
        """Features of the FAC head, {(space, modality): array}, from pooled features."""
        hidden = self.dense(f'{HEADS}/vid2audio_embd/final_projection_inner', video)
        hidden = self.norm_relu(f'{HEADS}/vid2audio_embd/{NORM}', hidden)
        fine_video = self.dense(f'{HEADS}/vid2audio_embd/final_projection', hidden)
        fine_video = self.norm(f'{HEADS}/vid2audio_embd/{NORM}_1', fine_video)
        fine_audio = self.dense(f'{HEADS}/audio_embd/final_projection', audio)
        return {
            ('va', 'video'): fine_video,
            ('va', 'audio'): fine_audio,
            ('vat', 'video'): self.coarse(fine_video),
            ('vat', 'audio'): self.coarse(fine_audio),
            ('vat', 'text'): self.dense(f'{HEADS}/txt_embd/final_projection', text),
        }


# ---- configs and files
def small_inputs(config):
    """The config with short inputs of low resolution."""
    config.model.inputs.video.update({'frames': 8, 'size': 32})
    config.model.inputs.audio.update({'samples': 2048, 'rate': 8000})
    config.model.inputs.audio.mel = {
        **presets.MMV_MEL,
        'bins': 20,
        'window': 128,
        'hop': 64,
        'low': 60.0,
        'high': 3800.0,
    }
    config.model.inputs.text.update({'candidates': 2, 'words': 5})
    return config


def narrow_config(name):
    """A config of configs/mmv.py, at the size of the files here."""
    config = mmv.get_config(name)
    config.model.towers.video.multiplier = MULTIPLIER
    if 'audio' in config.model.towers:
        config.model.towers.audio.multiplier = MULTIPLIER
        config.model.head.va = VA
    if 'text' in config.model.towers:
        text = {'vocab': VOCAB, 'word_width': WORD_WIDTH, 'width': TEXT_WIDTH}
        config.model.towers.text.update(text)
        config.model.head.update({'va': VA, 'vat': VAT})
    return small_inputs(config)


def set_blocks(monkeypatch, backbone, blocks):
    """Sets the blocks of the ResNets, in the files here and in our towers."""
    monkeypatch.setitem(BLOCKS, backbone, blocks)
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (blocks, *resnet_v2.DEPTHS[50][1:]))


@pytest.fixture(scope='module', params=['s3d', 'tsm_resnet'])
def imported(request, tmp_path_factory):
    """(backbone, tree, folder of the run, report, imported config).

    The sizes come once from the config (s3d) and once from the file (tsm_resnet), whose mappings
    are then Haiku's.
    """
    backbone, folder = request.param, tmp_path_factory.mktemp('mmv')
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, backbone, BLOCKS[backbone])
        tree = random_checkpoint(official_layout(backbone))
        flat_class = type('FlatMapping', (Flat,), {})
        flat = stand_in(patch, 'haiku._src.data_structures.FlatMapping', flat_class)
        if backbone == 's3d':
            config = narrow_config('s3d_fac_vat')
            written = dict(tree)
        else:
            config = None
            written = {}
            for group, modules in tree.items():
                written[group] = flat({path: flat(values) for path, values in modules.items()})
        (folder / 'official.pkl').write_bytes(pickle.dumps({**written, 'step': 5}, 4))
        words = ['<pad>', 'the', '<unk>', *(f'w{i}' for i in range(VOCAB - 3))]
        config, report = importer.import_checkpoint(
            folder / 'official.pkl',
            folder / 'run',
            config,
            small_inputs(default.get_config()),
            words,
        )
        yield backbone, tree, folder, report, config


# ---- the layout
# Arrays of the released trees, counted in the fact sheet: of parameters, of state.
RELEASED = {'s3d': (475, 768), 'tsm_resnet': (324, 606)}


@pytest.mark.parametrize('backbone', RELEASED)
def test_the_layout_is_the_released_one(monkeypatch, backbone):
    monkeypatch.setitem(BLOCKS, backbone, PUBLISHED_BLOCKS)
    layout = official_layout(backbone)
    params = sum(len(shapes) for shapes in layout.params.values())
    state = sum(len(shapes) for shapes in layout.state.values())
    assert (params, state) == RELEASED[backbone]


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, backbone', [('s3d_fac_vat', 's3d'), ('tsm50_fac_vat', 'tsm_resnet')]
)
def test_published_sizes(name, backbone):
    """Ours are the same without the four of two unused heads, and one counter for a norm's two."""
    params, state = RELEASED[backbone]
    ours = parameter_map.variables(parameter_map.abstract_state(mmv.get_config(name), {}))
    entries = importer.layout(ours)
    assert {entry.ours for entry in entries} == set(ours)
    assert len({entry.theirs for entry in entries}) == len(entries)
    groups = [entry.ours[0] for entry in entries]
    assert groups.count('params') == params - 4
    assert groups.count('batch_stats') * 2 == state


# ---- what is imported
def test_it_computes_what_the_official_weights_compute(imported):
    backbone, tree, folder, report, config = imported
    count = sum(len(values) for values in tree['params'].values())
    norms = len(tree['state']) // 2
    expected_unused = [f'params/{head}/{leaf}' for head in UNUSED_HEADS for leaf in 'bw']
    assert report.unused == expected_unused
    # Of a norm, two averages and one counter are read; two hidden values and one counter are not.
    assert report.read == count - 4 + 3 * norms
    assert report.bookkeeping == 3 * norms
    assert config.compute_dtype == 'float32'

    noise = np.random.default_rng(1)
    video = noise.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
    audio = noise.integers(-9999, 9999, (2, 2048)).astype(np.int16)
    sentences = ['w1 w2', 'w9 unheard w0 w5 w5 w6']
    ids = np.array([[4, 5, 0, 0, 0], [12, 2, 3, 8, 8]])
    waveform = jnp.asarray(audio, jnp.float32) / 32768
    mel = np.asarray(log_mel(waveform, 8000, config.model.inputs.audio.mel), np.float64)

    found = vatt_jax.load(folder / 'run').embed(video=video, audio=audio, text=sentences)
    chex.assert_tree_all_finite(found)
    reference = Forward(tree)
    video_features = reference.s3d if backbone == 's3d' else reference.tsm
    pooled = {
        'video': video_features(video / 255),
        'audio': reference.audio(mel, BLOCKS[backbone]),
        'text': reference.text(ids),
    }
    for modality, expected in pooled.items():
        assert np.std(expected) > 1e-3
        chex.assert_shape(found[modality]['pooled'], expected.shape)
        np.testing.assert_allclose(
            found[modality]['pooled'],
            expected,
            rtol=1e-4,
            atol=2e-5 * np.abs(expected).max(),
            err_msg=modality,
        )
    for (space, modality), features in reference.spaces(**pooled).items():
        expected = features / np.linalg.norm(features, axis=-1, keepdims=True)
        chex.assert_shape(found[modality][space], expected.shape)
        np.testing.assert_allclose(
            found[modality][space],
            expected,
            rtol=1e-4,
            atol=2e-5,
            err_msg=f'{space} {modality}',
        )


def test_round_trip_is_exact(imported):
    _, tree, folder, _, _ = imported
    importer.export_checkpoint(folder / 'run', folder / 'back.pkl')
    back = pickle.loads((folder / 'back.pkl').read_bytes())
    params = {path: values for path, values in tree['params'].items() if path not in UNUSED_HEADS}
    expected = {'params': params, 'state': tree['state']}
    chex.assert_trees_all_equal_shapes_and_dtypes(back, expected)
    chex.assert_trees_all_equal(back, expected)


def test_running_statistics_go_on_where_the_release_stopped(imported):
    _, tree, folder, _, _ = imported
    found = checkpoint.read_model(checkpoint.find(folder / 'run'))['batch_stats']
    norm = f'{HEADS}/vis_embd/{NORM}/~'
    expected = {
        'mean': tree['state'][f'{norm}/mean_ema']['average'][0],
        'var': tree['state'][f'{norm}/var_ema']['average'][0],
        'count': 7,
    }
    chex.assert_trees_all_equal(dict(found['head']['va_to_vat_norm']), expected)


def test_sizes_come_from_the_file(imported):
    backbone, _, _, _, config = imported
    towers = config.model.towers
    assert towers.video.name == backbone
    assert towers.video.multiplier == MULTIPLIER
    assert towers.audio.multiplier == MULTIPLIER
    text = towers.text
    assert (text.vocab, text.word_width, text.width) == (VOCAB, WORD_WIDTH, TEXT_WIDTH)
    graph = presets.MMV_GRAPHS['fac'][0]
    assert config.model.head.to_dict() == {'name': graph, 'va': VA, 'vat': VAT}
    assert tuple(config.model.inputs.video.range) == (0.0, 1.0)


def test_each_dimension_has_its_field(imported):
    backbone, _, folder, _, _ = imported
    fields = {}
    for entry in importer.layout(parameter_map.read_run(folder / 'run')[2]):
        name = '/'.join(entry.ours[1:])
        fields[name] = [field.removeprefix('model.') for field in entry.fields]
    words = ['towers.text.vocab', 'towers.text.word_width']
    projection = ['', 'towers.text.word_width', 'towers.text.width']
    assert fields['head/text_vat/kernel'] == ['towers.text.width', 'head.vat']
    assert fields['head/va_to_vat_norm/scale'] == ['', 'head.vat']
    assert fields['nets_text/word_table'] == words
    assert fields['nets_text/projection/kernel'] == projection
    assert fields['nets_audio/resnet/stem/kernel'][-1] == 'towers.audio.multiplier'
    if backbone == 's3d':
        stem = ['towers.video.space_to_depth'] * 4 + ['towers.video.multiplier']
        assert fields['nets_video/conv_1a/conv_0/conv/kernel'] == stem


# ---- what does not fit
def leave(tree):
    """The file as it is."""


def remove_a_gate(tree):
    """A file without one module."""
    del tree['params'][f'{S3D}/Mixed_4d/Branch_0_Conv2d_0a_1x1/self_gating']


def add_a_string(tree):
    """A file with a value that is no array."""
    tree['params'][f'{S3D}/a'] = {'w': 'text'}


def replace_the_parameters(tree):
    """A file of another model."""
    tree['params'] = {'net/linear': {'w': np.ones(2)}}


def remove_the_state(tree):
    """A file of parameters alone."""
    del tree['state']


@pytest.mark.parametrize(
    'name, change, multiplier, message',
    [
        pytest.param(
            's3d_fac_vat',
            leave,
            0.25,
            r'projection_inner/w has shape \[128, 16\], this config expects \[256, 16\] '
            r'.*video_va_hidden/kernel.; set config.model.towers.video.multiplier',
            id='multiplier',
        ),
        pytest.param(
            'tsm50_fac_vat',
            leave,
            MULTIPLIER,
            r'lacks \d+ of the \d+ variables this config expects: .*TSMResNetV2',
            id='video network',
        ),
        pytest.param(
            's3d_disjoint_vat',
            leave,
            None,
            r"config.model.head.name='mmv_disjoint' .checkpoint: 'mmv_fac_relu'.; set these",
            id='graph',
        ),
        pytest.param(
            's3d_fac_vat',
            remove_a_gate,
            MULTIPLIER,
            r'lacks 2 of .*Mixed_4d/Branch_0_Conv2d_0a_1x1/self_gating/b',
            id='missing module',
        ),
        pytest.param(
            's3d_fac_vat',
            add_a_string,
            MULTIPLIER,
            r'S3D/a w: expected an array, got a str',
            id='string',
        ),
        pytest.param(
            's3d_fac_vat',
            replace_the_parameters,
            MULTIPLIER,
            r'no MMV checkpoint: no module path starts with text_audio',
            id='another model',
        ),
        pytest.param(
            's3d_fac_vat',
            remove_the_state,
            MULTIPLIER,
            r"holds a dict of 'params'; an MMV checkpoint is a dict with params and state",
            id='no state',
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, monkeypatch, name, change, multiplier, message):
    """multiplier: of the video tower in the config; None for a config of published sizes."""
    set_blocks(monkeypatch, 's3d', (1, 1, 1, 1))
    tree = random_checkpoint(official_layout('s3d'))
    change(tree)
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    if multiplier is None:
        config = mmv.get_config(name)
    else:
        config = narrow_config(name)
        config.model.towers.video.multiplier = multiplier
    with pytest.raises(ConfigError, match=message):
        importer.import_checkpoint(tmp_path / 'f', tmp_path / 'run', config)
    assert not (tmp_path / 'run').exists()


def other_spelling(path):
    """The path with a plain batch norm and one more `~`."""
    return path.replace(NORM, '__batch_norm').replace('TSMResNetV2/tsm', 'TSMResNetV2/~/tsm')


def test_the_command_line_takes_other_spellings_and_goes_back(tmp_path, monkeypatch, capsys):
    """Sizes come from the file, onto the default config."""
    from vatt_jax.importers.__main__ import main

    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    tree = {}
    for group, modules in random_checkpoint(official_layout('tsm_resnet')).items():
        tree[group] = {other_spelling(path): values for path, values in modules.items()}
    (tmp_path / 'f').write_bytes(pickle.dumps(tree, 2))
    main(['--format=mmv', f'--checkpoint={tmp_path / "f"}', f'--out={tmp_path / "run"}'])
    printed = capsys.readouterr().out
    assert 'audio2txt_embd/final_projection/w' in printed
    assert 'missing: none' in printed

    main(['--format=mmv', f'--export={tmp_path / "run"}', f'--out={tmp_path / "back"}'])
    assert f'→ {tmp_path / "back"}\n' in capsys.readouterr().out
    back = pickle.loads((tmp_path / 'back').read_bytes())
    path = f'{TSM}/tsm_resnet_unit_2/block_0/conv_1'
    np.testing.assert_array_equal(
        back['params'][path]['w'], tree['params'][other_spelling(path)]['w']
    )

    arguments = [f'--checkpoint={tmp_path / "f"}', f'--out={tmp_path / "x"}']
    with pytest.raises(ConfigError, match='--classes'):
        main(['--format=mmv', *arguments, f'--classes={tmp_path / "f"}'])


def test_a_config_may_take_a_part_of_a_file(tmp_path, monkeypatch):
    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    tree = random_checkpoint(official_layout('tsm_resnet'))
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    config = narrow_config('tsm50_fac_va')
    _, report = importer.import_checkpoint(tmp_path / 'f', tmp_path / 'run', config)
    assert f'params/{ROOT}/text_module/embed/embeddings' in report.unused
    assert any('vis_embd' in name for name in report.unused)
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert saved['model']['head'] == {'name': 'mmv_fac_relu', 'va': VA}


# ---- other graphs, and parts of a model
class Heads(Forward):
    """The heads of the graphs that were not released, on pooled features."""

    def mlp(self, name, x):
        hidden = self.dense(f'{HEADS}/{name}/final_projection_inner', x)
        hidden = self.norm_relu(f'{HEADS}/{name}/{NORM}', hidden)
        return self.norm(
            f'{HEADS}/{name}/{NORM}_1', self.dense(f'{HEADS}/{name}/final_projection', hidden)
        )

    def linear(self, name, x):
        return self.dense(f'{HEADS}/{name}/final_projection', x)

    def spaces_of(self, graph, video, audio, text):
        """{(space, modality): features}."""
        if graph == 'fac_bnrelu':
            fine = {
                'video': self.mlp('vid2audio_embd', video),
                'audio': self.linear('audio_embd', audio),
            }
            spaces = {('vat', 'text'): self.linear('txt_embd', text)}
            for modality, features in fine.items():
                between = self.norm_relu(f'{ROOT}/~_activate_interaction/{NORM}', features)
                coarse = self.norm(f'{HEADS}/vis_embd/{NORM}', self.linear('vis_embd', between))
                spaces |= {('va', modality): features, ('vat', modality): coarse}
            return spaces
        if graph == 'shared':
            return {
                ('joint', 'video'): self.mlp('vis_embd', video),
                ('joint', 'audio'): self.linear('audio_embd', audio),
                ('joint', 'text'): self.linear('txt_embd', text),
            }
        return {
            ('va', 'video'): self.mlp('vid2audio_embd', video),
            ('va', 'audio'): self.linear('audio_embd', audio),
            ('vt', 'video'): self.mlp('vis_embd', video),
            ('vt', 'text'): self.linear('txt_embd', text),
            ('at', 'audio'): self.linear('audio2txt_embd', audio),
            ('at', 'text'): self.linear('txt2audio_embd', text),
        }


def base_config():
    """The default config with the inputs of the files here."""
    return small_inputs(default.get_config())


def inputs_and_features(reference):
    """Sounds and sentences, and what the official towers make of them."""
    noise = np.random.default_rng(1)
    audio = noise.integers(-9999, 9999, (2, 2048)).astype(np.int16)
    ids = np.array([[4, 5, 0, 0, 0], [12, 1, 3, 8, 8]])
    waveform = jnp.asarray(audio, jnp.float32) / 32768
    mel = log_mel(waveform, 8000, base_config().model.inputs.audio.mel)
    mel = np.asarray(mel, np.float64)
    given = {'audio': audio, 'text': ['w1 w2', 'w9 the w0 w5 w5']}
    pooled = {'audio': reference.audio(mel, BLOCKS['tsm_resnet']), 'text': reference.text(ids)}
    return given, pooled


WORDS = ['<pad>', 'the', '<unk>', *(f'w{i}' for i in range(VOCAB - 3))]


@pytest.mark.parametrize('graph', ['fac_bnrelu', 'shared', 'disjoint'])
def test_other_graphs_come_from_the_file_and_go_back(tmp_path, monkeypatch, graph):
    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    tree = random_checkpoint(official_layout('tsm_resnet', graph))
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    config, report = importer.import_checkpoint(
        tmp_path / 'f', tmp_path / 'run', None, base_config(), WORDS
    )
    assert config.model.head.name == presets.MMV_GRAPHS[graph][0]
    assert not report.assumed
    assert bool(report.unused) == (graph == 'fac_bnrelu')  # its heads between sound and words

    noise = np.random.default_rng(2)
    video = noise.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
    reference = Heads(tree)
    given, pooled = inputs_and_features(reference)
    pooled['video'] = reference.tsm(video / 255)
    found = vatt_jax.load(tmp_path / 'run').embed(video=video, **given)
    for (space, modality), features in reference.spaces_of(graph, **pooled).items():
        expected = features / np.linalg.norm(features, axis=-1, keepdims=True)
        np.testing.assert_allclose(
            found[modality][space], expected, rtol=1e-4, atol=2e-5, err_msg=f'{space} {modality}'
        )

    importer.export_checkpoint(tmp_path / 'run', tmp_path / 'back')
    back = pickle.loads((tmp_path / 'back').read_bytes())
    for unused in report.unused:
        module, name = unused.removeprefix('params/').rsplit('/', 1)
        del tree['params'][module][name]
    tree['params'] = {path: values for path, values in tree['params'].items() if values}
    chex.assert_trees_all_equal(back, tree)


@pytest.mark.parametrize(
    'modality, heads',
    [
        ('visual', True),
        ('visual', False),
        ('audio', True),
        ('audio', False),
        ('text', True),
        ('text', False),
    ],
)
def test_a_tower_alone_is_imported(tmp_path, monkeypatch, modality, heads):
    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    full = random_checkpoint(official_layout('tsm_resnet'))
    head = {
        'visual': ('vid2audio_embd', 'vis_embd'),
        'audio': ('audio_embd',),
        'text': ('txt_embd',),
    }
    prefixes = [f'{ROOT}/{modality}_module/']
    if heads:
        prefixes += [f'{HEADS}/{name}/' for name in head[modality]]
    tree = {}
    for group, modules in full.items():
        tree[group] = {
            path: values for path, values in modules.items() if path.startswith(tuple(prefixes))
        }
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    words = WORDS if modality == 'text' else None
    config, report = importer.import_checkpoint(
        tmp_path / 'f', tmp_path / 'run', None, base_config(), words
    )
    tower = 'video' if modality == 'visual' else modality
    assert list(config.model.towers) == [tower]
    assert report.unused == []
    assert (config.model.head.name == 'none') == (not heads)

    reference = Forward(full)
    given, pooled = inputs_and_features(reference)
    if tower == 'video':
        given[tower] = np.random.default_rng(2).integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
        pooled[tower] = reference.tsm(given[tower] / 255)
    found = vatt_jax.load(tmp_path / 'run').embed(**{tower: given[tower]})[tower]
    expected_keys = {'video': {'va', 'vat'}, 'audio': {'va'}, 'text': {'vat'}}[tower]
    assert set(found) == {'pooled'} | (expected_keys if heads else set())
    scale = np.abs(pooled[tower]).max()
    np.testing.assert_allclose(found['pooled'], pooled[tower], rtol=1e-4, atol=2e-5 * scale)

    importer.export_checkpoint(tmp_path / 'run', tmp_path / 'back')
    chex.assert_trees_all_equal(pickle.loads((tmp_path / 'back').read_bytes()), tree)


def in_place_of(path, name, value):
    """A change of a file: an array replaced, or removed where it is None."""

    def change(tree):
        if value is None:
            del tree['params'][path][name]
        else:
            tree['params'][path][name] = value

    return change


@pytest.mark.parametrize(
    'change, message',
    [
        pytest.param(
            in_place_of(f'{TSM}/tsm_resnet_stem', 'w', None),
            r'has no params/.*tsm_resnet_stem/w; without it its sizes are unknown',
            id='no stem',
        ),
        pytest.param(
            in_place_of(f'{TSM}/tsm_resnet_stem', 'w', np.ones((7, 7, 8), np.float32)),
            r'tsm_resnet_stem/w has shape \[7, 7, 8\], expected 4 axes \[H W C D\]',
            id='stem of another rank',
        ),
        pytest.param(
            in_place_of(f'{TEXT}/embed', 'embeddings', np.ones(VOCAB, np.float32)),
            r'embed/embeddings has shape \[20\], expected 2 axes \[words C\]',
            id='word table of rank 1',
        ),
        pytest.param(
            in_place_of(f'{TEXT}/text_conv1', 'w', np.float32(1)),
            r'text_conv1/w has shape \[\], expected 3 axes',
            id='scalar',
        ),
        pytest.param(
            in_place_of(f'{HEADS}/audio_embd/final_projection', 'w', np.ones(8, np.float32)),
            r'audio_embd/final_projection/w has shape \[8\], expected 2 axes \[C E\]',
            id='head of rank 1',
        ),
        pytest.param(
            in_place_of(f'{HEADS}/audio_embd/final_projection', 'b', None),
            r'lacks 1 of .*audio_embd/final_projection/b',
            id='one array missing',
        ),
        pytest.param(
            in_place_of(f'{TEXT}/text_conv1', 'b', np.array(['a'] * TEXT_WIDTH)),
            r'text_conv1/b: expected real numbers, got <U1 of shape \[24\]',
            id='text',
        ),
        pytest.param(
            in_place_of(f'{TEXT}/text_conv1', 'b', np.ones(TEXT_WIDTH, np.complex64)),
            r'text_conv1/b: expected real numbers, got complex64',
            id='complex',
        ),
        pytest.param(
            in_place_of(f'{TEXT}/text_conv1', 'b', 'x' * 10_000),
            r'text_conv1 b: expected an array, got a str',
            id='a string',
        ),
    ],
)
def test_arrays_that_are_no_weights_are_named(tmp_path, monkeypatch, change, message):
    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    tree = random_checkpoint(official_layout('tsm_resnet'))
    change(tree)
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        importer.import_checkpoint(tmp_path / 'f', tmp_path / 'run', None, base_config())
    assert not (tmp_path / 'run').exists()


def test_weights_that_are_not_finite_and_guesses_are_reported(tmp_path, monkeypatch, capsys):
    from vatt_jax.importers.__main__ import main

    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    tree = random_checkpoint(official_layout('tsm_resnet'))
    tree['params'][f'{TEXT}/text_conv1']['b'][3] = np.nan
    huge = np.full((TEXT_WIDTH, VAT), 1e300)  # of float64: no number of float32
    tree['params'][f'{HEADS}/txt_embd/final_projection']['w'] = huge
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    main(['--format=mmv', f'--checkpoint={tmp_path / "f"}', f'--out={tmp_path / "run"}'])
    printed = capsys.readouterr().out
    assert 'not finite: 2 of them' in printed
    assert 'text_conv1/b' in printed
    assert 'assumed: the graph fac, which was released' in printed


@pytest.mark.parametrize('count', [VOCAB - 1, VOCAB + 10])
def test_a_vocabulary_has_a_word_for_each_row(tmp_path, monkeypatch, count):
    set_blocks(monkeypatch, 'tsm_resnet', (1, 1, 1, 1))
    tree = random_checkpoint(official_layout('tsm_resnet'))
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    words = ['<pad>', '<unk>', *(f'w{i}' for i in range(count - 2))]
    with pytest.raises(ConfigError, match=f'expected {VOCAB} words.*got {count}'):
        importer.import_checkpoint(tmp_path / 'f', tmp_path / 'run', None, base_config(), words)
    assert not (tmp_path / 'run').exists()
