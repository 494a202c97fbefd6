"""Official MMV checkpoints: files in exactly their layout (narrow), against an independent NumPy forward pass on the official names."""

import json
import pickle

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

R = 'text_audio_video'
BN = '__cross_replica_batch_norm'
M = 1 / 8  # of all published widths
VOCAB, EMBED, TEXT, VA, VAT = 20, 6, 24, 16, 8
BLOCKS = {
    'tsm_resnet': (2, 1, 1, 1),
    's3d': (1, 2, 1, 1),
}  # of the four units; published: 3, 4, 6, 3
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


# ---- the official layout: {module path: {name: shape}}, twice
class Layout:
    def __init__(self):
        self.params, self.state = {}, {}

    def norm(self, path, width, axes):
        shape = (1,) * (axes - 1) + (width,)
        self.params[path] = {'scale': shape, 'offset': shape}
        for of in ('mean_ema', 'var_ema'):
            self.state[f'{path}/~/{of}'] = {'average': shape, 'hidden': shape, 'counter': ()}

    def unit(self, path, kernels, width, gated=True):
        """kernels: (time, height, width, input) of each convolution."""
        for i, k in enumerate(kernels):
            self.params[f'{path}/~/conv3_d{"_1" * i}'] = {'w': (*k, width)}
            self.norm(f'{path}/{BN}{"_1" * i}', width, 5)
        if gated:
            self.params[f'{path}/self_gating'] = {'w': (width, width), 'b': (width,)}

    def s3d(self):
        m = lambda n: int(n * M)
        at = f'{R}/visual_module/~/S3D'
        self.unit(f'{at}/Conv2d_1a_7x7', [(2, 4, 4, 24)], m(64), False)
        self.unit(f'{at}/Conv2d_2b_1x1', [(1, 1, 1, m(64))], m(64), False)
        self.unit(f'{at}/Conv2d_2c_3x3', [(1, 3, 3, m(64)), (3, 1, 1, m(192))], m(192))
        width = m(192)
        for name, sizes in MIXED.items():
            b0, b1r, b1, b2r, b2, b3 = map(m, sizes)
            here = f'{at}/Mixed_{name}'
            one = lambda branch, i, o, gated=True: self.unit(
                f'{here}/{branch}', [(1, 1, 1, i)], o, gated
            )  # noqa: B023
            three = lambda branch, i, o: self.unit(
                f'{here}/{branch}', [(1, 3, 3, i), (3, 1, 1, o)], o
            )  # noqa: B023
            one('Branch_0_Conv2d_0a_1x1', width, b0)
            one('Branch_1_Conv2d_0a_1x1', width, b1r, False)
            three('Branch_1_Conv2d_0b_3x3', b1r, b1)
            one('Branch_2_Conv2d_0a_1x1', width, b2r, False)
            three('Branch_2_Conv2d_0b_3x3', b2r, b2)
            one('Branch_3_Conv2d_0b_1x1', width, b3)
            width = b0 + b1 + b2 + b3
        return width

    def resnet(self, at, stem, block, made, channels, blocks):
        x = int(64 * M)
        self.params[f'{at}/{stem}'] = {'w': (7, 7, channels, x)}
        for u, count in enumerate(blocks):
            for b in range(count):
                path, w = f'{at}/{block.format(u, b)}', int((256 << u) * M)
                inner = w // 4
                for i, width in enumerate((x, inner, inner)):
                    self.norm(f'{path}/{BN}{f"_{i}" if i else ""}', width, 4)
                for name, shape in {
                    'conv_0': (1, 1, x, inner),
                    'conv_1': (3, 3, inner, inner),
                    'conv_2': (1, 1, inner, w),
                    **({} if b else {'shortcut_conv': (1, 1, x, w)}),
                }.items():
                    self.params[f'{path}/{made}{name}'] = {'w': shape}
                x = w
        self.norm(f'{at}/{BN}', x, 4)
        return x

    def heads(self, video, audio):
        h = f'{R}/~_get_pair_embedding_heads'
        dense = lambda name, i, o, bias=True: self.params.update(
            {f'{h}/{name}': {'w': (i, o), **({'b': (o,)} if bias else {})}}
        )
        dense('vid2audio_embd/final_projection_inner', video, VA)
        self.norm(f'{h}/vid2audio_embd/{BN}', VA, 2)
        dense('vid2audio_embd/final_projection', VA, VA, False)
        self.norm(f'{h}/vid2audio_embd/{BN}_1', VA, 2)
        dense('vis_embd/final_projection', VA, VAT)
        self.norm(f'{h}/vis_embd/{BN}', VAT, 2)
        dense('audio_embd/final_projection', audio, VA)
        dense('txt_embd/final_projection', TEXT, VAT)
        dense('audio2txt_embd/final_projection', audio, VA)
        dense('txt2audio_embd/final_projection', TEXT, VA)


def official(backbone):
    l = Layout()
    if backbone == 's3d':
        video = l.s3d()
    else:
        video = l.resnet(
            f'{R}/visual_module/~/TSMResNetV2',
            'tsm_resnet_stem',
            'tsm_resnet_unit_{}/block_{}',
            '',
            3,
            BLOCKS[backbone],
        )
    audio = l.resnet(
        f'{R}/audio_module/~/res_net_v2',
        '~/initial_conv',
        '~/block_group_{}/block_{}',
        '~/',
        1,
        BLOCKS[backbone],
    )
    l.params[f'{R}/text_module/~/embed'] = {'embeddings': (VOCAB, EMBED)}
    l.params[f'{R}/text_module/~/text_conv1'] = {'w': (1, EMBED, TEXT), 'b': (TEXT,)}
    l.heads(video, audio)
    return l


def filled(layout, seed=0, counter=7):
    """{'params', 'state'} with random values; moving averages as three steps or more of training leave them."""
    noise = np.random.default_rng(seed)

    def value(path, name, shape):
        x = noise.normal(size=shape)
        if name == 'counter':
            return np.array(counter, np.int32)
        if name in ('scale', 'average'):
            return (
                np.abs(x) * 0.3 + 0.7 if name == 'scale' or 'var_ema' in path else 0.2 * x
            ).astype(np.float32)
        return (x * (1.4 * np.prod(shape[:-1]) ** -0.5 if name == 'w' else 0.3)).astype(np.float32)

    tree = {
        group: {
            path: {n: value(path, n, s) for n, s in names.items()}
            for path, names in getattr(layout, group).items()
        }
        for group in ('params', 'state')
    }
    for names in tree['state'].values():
        names['hidden'] = (names['average'] * (1 - 0.9**counter)).astype(np.float32)
    return tree


# ---- the forward pass, from the fact sheet, on official names
class Forward:
    def __init__(self, tree):
        self.w = {
            g: {
                k: {n: v.astype(np.float64) for n, v in names.items()}
                for k, names in modules.items()
            }
            for g, modules in tree.items()
        }

    def norm(self, path, x):
        p, s = self.w['params'][path], self.w['state']
        mean, var = (s[f'{path}/~/{of}_ema']['average'].reshape(-1) for of in ('mean', 'var'))
        return (x - mean) / np.sqrt(var + 1e-5) * p['scale'].reshape(-1) + p['offset'].reshape(-1)

    def linear(self, path, x):
        p = self.w['params'][path]
        return x @ p['w'] + p.get('b', 0)

    def s3d(self, x):
        at = f'{R}/visual_module/~/S3D'

        def unit(path, x):
            for i in ('', '_1'):
                if f'{at}/{path}/~/conv3_d{i}' in self.w['params']:
                    x = conv(x, self.w['params'][f'{at}/{path}/~/conv3_d{i}']['w'], (1, 1, 1))
                    x = np.maximum(self.norm(f'{at}/{path}/{BN}{i}', x), 0)
            if f'{at}/{path}/self_gating' in self.w['params']:
                x = (
                    x
                    / (1 + np.exp(-self.linear(f'{at}/{path}/self_gating', x.mean((1, 2, 3)))))[
                        :, None, None, None
                    ]
                )
            return x

        b, t, h, w, c = x.shape
        x = (
            x.reshape(b, t // 2, 2, h // 2, 2, w // 2, 2, c)
            .transpose(0, 1, 3, 5, 2, 4, 6, 7)
            .reshape(b, t // 2, h // 2, w // 2, 8 * c)
        )
        x = pool(unit('Conv2d_1a_7x7', x), (1, 3, 3), (1, 2, 2))
        x = pool(unit('Conv2d_2c_3x3', unit('Conv2d_2b_1x1', x)), (1, 3, 3), (1, 2, 2))
        for block in MIXED:
            x = (
                pool(x, (3, 3, 3), (2, 2, 2))
                if block == '4b'
                else pool(x, (2, 2, 2), (2, 2, 2))
                if block == '5b'
                else x
            )
            u = lambda branch, x: unit(f'Mixed_{block}/{branch}', x)  # noqa: B023
            x = np.concatenate(
                [
                    u('Branch_0_Conv2d_0a_1x1', x),
                    u('Branch_1_Conv2d_0b_3x3', u('Branch_1_Conv2d_0a_1x1', x)),
                    u('Branch_2_Conv2d_0b_3x3', u('Branch_2_Conv2d_0a_1x1', x)),
                    u('Branch_3_Conv2d_0b_1x1', pool(x, (3, 3, 3), (1, 1, 1))),
                ],
                -1,
            )
        return x.mean((1, 2, 3))

    def resnet(self, x, at, stem, block, made, blocks, clip=0):
        kernel = lambda path: self.w['params'][f'{at}/{path}']['w']
        active = lambda path, x: np.maximum(self.norm(f'{at}/{path}', x), 0)
        x = pool(conv(x, kernel(stem), (2, 2)), (3, 3), (2, 2))
        for u, count in enumerate(blocks):
            for b in range(count):
                name, s = block.format(u, b), 2 if u and not b else 1
                p = active(f'{name}/{BN}', x)
                short = x if b else conv(p, kernel(f'{name}/{made}shortcut_conv'), (s, s))
                y = conv(shifted(p, clip) if clip else p, kernel(f'{name}/{made}conv_0'), (1, 1))
                y = conv(active(f'{name}/{BN}_1', y), kernel(f'{name}/{made}conv_1'), (s, s))
                x = short + conv(
                    active(f'{name}/{BN}_2', y), kernel(f'{name}/{made}conv_2'), (1, 1)
                )
        return active(BN, x).mean((1, 2))

    def tsm(self, x):
        y = self.resnet(
            x.reshape(-1, *x.shape[2:]),
            f'{R}/visual_module/~/TSMResNetV2',
            'tsm_resnet_stem',
            'tsm_resnet_unit_{}/block_{}',
            '',
            BLOCKS['tsm_resnet'],
            x.shape[1],
        )
        return y.reshape(*x.shape[:2], -1).mean(1)

    def audio(self, x, blocks):
        return self.resnet(
            x[..., None],
            f'{R}/audio_module/~/res_net_v2',
            '~/initial_conv',
            '~/block_group_{}/block_{}',
            '~/',
            blocks,
        )

    def text(self, ids):
        t, c = (self.w['params'][f'{R}/text_module/~/{n}'] for n in ('embed', 'text_conv1'))
        return np.maximum(t['embeddings'][ids] @ c['w'][0] + c['b'], 0).max(-2)

    def spaces(self, video, audio, text):
        h = f'{R}/~_get_pair_embedding_heads'
        fine = np.maximum(
            self.norm(
                f'{h}/vid2audio_embd/{BN}',
                self.linear(f'{h}/vid2audio_embd/final_projection_inner', video),
            ),
            0,
        )
        fine = self.norm(
            f'{h}/vid2audio_embd/{BN}_1', self.linear(f'{h}/vid2audio_embd/final_projection', fine)
        )
        heard = self.linear(f'{h}/audio_embd/final_projection', audio)
        coarse = lambda x: self.norm(
            f'{h}/vis_embd/{BN}', self.linear(f'{h}/vis_embd/final_projection', np.maximum(x, 0))
        )
        return {
            ('va', 'video'): fine,
            ('va', 'audio'): heard,
            ('vat', 'video'): coarse(fine),
            ('vat', 'audio'): coarse(heard),
            ('vat', 'text'): self.linear(f'{h}/txt_embd/final_projection', text),
        }


# ---- configs and inputs
def narrow(config, backbone='s3d'):
    """configs/mmv.py's, at the size of the files here."""
    config.model.towers.video.multiplier = M
    if 'audio' in config.model.towers:
        config.model.towers.audio.multiplier = M
        config.model.head.va = VA
    if 'text' in config.model.towers:
        config.model.towers.text.update({'vocab': VOCAB, 'word_width': EMBED, 'width': TEXT})
        config.model.head.update({'va': VA, 'vat': VAT})
    return small(config)


def small(config):
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


@pytest.fixture(scope='module', params=['s3d', 'tsm_resnet'])
def imported(request, tmp_path_factory):
    """(backbone, tree, folder of the run, report, imported config)."""
    backbone, folder = request.param, tmp_path_factory.mktemp('mmv')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet_v2.DEPTHS, 50, (BLOCKS[backbone], *resnet_v2.DEPTHS[50][1:]))
        tree = filled(official(backbone))
        flat = stand_in(
            patch, 'haiku._src.data_structures.FlatMapping', type('FlatMapping', (Flat,), {})
        )
        told = backbone == 's3d'  # once with sizes from the config, once from the file
        given = (
            tree if told else {g: flat({k: flat(v) for k, v in m.items()}) for g, m in tree.items()}
        )
        (folder / 'official.pkl').write_bytes(pickle.dumps({**given, 'step': 5}, 4))
        config = narrow(mmv.get_config('s3d_fac_vat')) if told else None
        words = ['<pad>', 'the', '<unk>', *(f'w{i}' for i in range(VOCAB - 3))]
        config, report = importer.import_checkpoint(
            folder / 'official.pkl', folder / 'run', config, small(default.get_config()), words
        )
        yield backbone, tree, folder, report, config


def test_the_layout_is_the_released_one(monkeypatch):
    """Arrays of the released trees, counted in the fact sheet."""
    for of, params, states in (('s3d', 475, 768), ('tsm_resnet', 324, 606)):
        monkeypatch.setitem(BLOCKS, of, (3, 4, 6, 3))
        layout = official(of)
        assert (
            sum(map(len, layout.params.values())) == params
            and sum(map(len, layout.state.values())) == states
        )


@pytest.mark.slow
def test_published_sizes():
    """Ours are the same without the four of two unused heads, and with one counter for each norm's two."""
    for name, params, states in (('s3d_fac_vat', 475, 768), ('tsm50_fac_vat', 324, 606)):
        ours = parameter_map.variables(parameter_map.abstract_state(mmv.get_config(name), {}))
        entries = importer.layout(ours)
        assert {e.ours for e in entries} == set(ours) and len({e.theirs for e in entries}) == len(
            entries
        )
        assert sum(e.ours[0] == 'params' for e in entries) == params - 4
        assert sum(e.ours[0] == 'batch_stats' for e in entries) * 2 == states


def test_it_computes_what_the_official_weights_compute(imported):
    backbone, tree, folder, report, config = imported
    count = sum(len(v) for v in tree['params'].values())
    heads = [
        f'params/{R}/~_get_pair_embedding_heads/{n}_embd/final_projection/{leaf}'
        for n in ('audio2txt', 'txt2audio')
        for leaf in 'bw'
    ]
    assert report.unused == heads and report.read == count - 4 + len(tree['state']) // 2 * 3
    assert report.bookkeeping == len(tree['state']) // 2 * 3 and config.compute_dtype == 'float32'
    noise = np.random.default_rng(1)
    frames = noise.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
    sound = noise.integers(-9999, 9999, (2, 2048)).astype(np.int16)
    mel = np.asarray(
        log_mel(jnp.asarray(sound, jnp.float32) / 32768, 8000, config.model.inputs.audio.mel),
        np.float64,
    )
    got = vatt_jax.load(folder / 'run').embed(
        video=frames, audio=sound, text=['w1 w2', 'w9 unheard w0 w5 w5 w6']
    )
    f = Forward(tree)
    want = {
        'video': f.s3d(frames / 255) if backbone == 's3d' else f.tsm(frames / 255),
        'audio': f.audio(mel, BLOCKS[backbone]),
        'text': f.text(np.array([[4, 5, 0, 0, 0], [12, 2, 3, 8, 8]])),
    }
    for m, x in want.items():
        assert np.std(x) > 1e-3
        np.testing.assert_allclose(
            got[m]['pooled'], x, rtol=1e-4, atol=2e-5 * np.abs(x).max(), err_msg=m
        )
    for (space, m), x in f.spaces(**want).items():
        np.testing.assert_allclose(
            got[m][space],
            x / np.linalg.norm(x, axis=-1, keepdims=True),
            rtol=1e-4,
            atol=2e-5,
            err_msg=f'{space} {m}',
        )


def test_round_trip_is_exact(imported):
    _, tree, folder, _, _ = imported
    unused = [
        f'{R}/~_get_pair_embedding_heads/{n}_embd/final_projection'
        for n in ('audio2txt', 'txt2audio')
    ]
    importer.export_checkpoint(folder / 'run', folder / 'back.pkl')
    with open(folder / 'back.pkl', 'rb') as file:
        back = pickle.load(file)
    assert set(back['params']) == set(tree['params']) - set(unused) and set(back['state']) == set(
        tree['state']
    )
    for group in back:
        for path, names in back[group].items():
            assert set(names) == set(tree[group][path])
            for name, x in names.items():
                assert (x.dtype, x.shape) == (
                    tree[group][path][name].dtype,
                    tree[group][path][name].shape,
                )
                np.testing.assert_array_equal(
                    x, tree[group][path][name], err_msg=f'{group} {path} {name}'
                )


def test_running_statistics_go_on_where_the_release_stopped(imported):
    _, tree, folder, _, _ = imported
    stats = checkpoint.read_model(checkpoint.find(folder / 'run'))['batch_stats']['head'][
        'va_to_vat_norm'
    ]
    at = f'{R}/~_get_pair_embedding_heads/vis_embd/{BN}/~'
    np.testing.assert_array_equal(stats['mean'], tree['state'][f'{at}/mean_ema']['average'][0])
    np.testing.assert_array_equal(stats['var'], tree['state'][f'{at}/var_ema']['average'][0])
    assert stats['count'] == 7


def spoilt(tree, change):
    tree = {g: {k: dict(v) for k, v in m.items()} for g, m in tree.items()}
    change(tree)
    return tree


S3D = f'{R}/visual_module/~/S3D'


@pytest.mark.parametrize(
    'arg, change, config, words',
    [
        (
            's3d_fac_vat',
            None,
            {'towers.video.multiplier': 0.25},
            r'projection_inner/w has shape \[128, 16\], this config wants \[256, 16\] .*video_va_hidden/kernel.; set config.model.towers.video.multiplier',
        ),
        (
            'tsm50_fac_vat',
            None,
            {},
            r'lacks \d+ of the \d+ variables this config wants: .*TSMResNetV2',
        ),
        (
            's3d_disjoint_vat',
            None,
            {},
            r"config.model.head.name='mmv_disjoint': MMV checkpoints were released with the graph mmv_fac_relu",
        ),
        (
            's3d_fac_vat',
            lambda t: t['params'].pop(f'{S3D}/Mixed_4d/Branch_0_Conv2d_0a_1x1/self_gating'),
            {},
            r'lacks 2 of .*Mixed_4d/Branch_0_Conv2d_0a_1x1/self_gating/b',
        ),
        (
            's3d_fac_vat',
            lambda t: t['params'].update({f'{S3D}/a': {'w': 'text'}}),
            {},
            r'S3D/a w: expected an array, got a str',
        ),
        (
            's3d_fac_vat',
            lambda t: t.update(params={'net/linear': {'w': np.ones(2)}}),
            {},
            r'no MMV checkpoint: no module path starts with text_audio',
        ),
        (
            's3d_fac_vat',
            lambda t: t.pop('state'),
            {},
            r"holds a dict of 'params'; an MMV checkpoint is a dict with params and state",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, monkeypatch, arg, change, config, words):
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 1, 1, 1), *resnet_v2.DEPTHS[50][1:]))
    monkeypatch.setitem(BLOCKS, 's3d', (1, 1, 1, 1))
    tree = spoilt(filled(official('s3d')), change or (lambda t: None))
    (tmp_path / 'f').write_bytes(pickle.dumps(tree))
    c = narrow(mmv.get_config(arg)) if arg != 's3d_disjoint_vat' else mmv.get_config(arg)
    for name, value in config.items():
        *parents, last = name.split('.')
        node = c.model
        for p in parents:
            node = node[p]
        node[last] = value
    with pytest.raises(ConfigError, match=words):
        importer.import_checkpoint(tmp_path / 'f', tmp_path / 'run', c)
    assert not (tmp_path / 'run').exists()


def test_command_line_and_other_spellings(tmp_path, monkeypatch, capsys):
    """Plain batch norms and other places of `~`; sizes told by the file, onto the default config; and the way back."""
    from vatt_jax.importers.__main__ import main

    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 1, 1, 1), *resnet_v2.DEPTHS[50][1:]))
    monkeypatch.setitem(BLOCKS, 'tsm_resnet', (1, 1, 1, 1))
    other = lambda path: path.replace(BN, '__batch_norm').replace(
        'TSMResNetV2/tsm', 'TSMResNetV2/~/tsm'
    )
    tree = {
        g: {other(k): v for k, v in m.items()} for g, m in filled(official('tsm_resnet')).items()
    }
    (tmp_path / 'f').write_bytes(pickle.dumps(tree, 2))
    main(['--format=mmv', f'--checkpoint={tmp_path / "f"}', f'--out={tmp_path / "run"}'])
    told = capsys.readouterr().out
    assert 'audio2txt_embd/final_projection/w' in told and 'missing: none' in told
    main(['--format=mmv', f'--export={tmp_path / "run"}', f'--out={tmp_path / "back"}'])
    assert f'→ {tmp_path / "back"}\n' in capsys.readouterr().out
    back = pickle.loads((tmp_path / 'back').read_bytes())['params'][
        f'{R}/visual_module/~/TSMResNetV2/tsm_resnet_unit_2/block_0/conv_1'
    ]['w']
    np.testing.assert_array_equal(
        back,
        tree['params'][f'{R}/visual_module/~/TSMResNetV2/~/tsm_resnet_unit_2/block_0/conv_1']['w'],
    )
    with pytest.raises(ConfigError, match='--classes'):
        main(
            [
                '--format=mmv',
                f'--checkpoint={tmp_path / "f"}',
                f'--out={tmp_path / "x"}',
                f'--classes={tmp_path / "f"}',
            ]
        )


def test_a_config_may_want_less(tmp_path, monkeypatch):
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 1, 1, 1), *resnet_v2.DEPTHS[50][1:]))
    monkeypatch.setitem(BLOCKS, 'tsm_resnet', (1, 1, 1, 1))
    (tmp_path / 'f').write_bytes(pickle.dumps(filled(official('tsm_resnet'))))
    c, report = importer.import_checkpoint(
        tmp_path / 'f', tmp_path / 'run', narrow(mmv.get_config('tsm50_fac_va'))
    )
    assert f'params/{R}/text_module/embed/embeddings' in report.unused and any(
        'vis_embd' in k for k in report.unused
    )
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['model']['head'] == {
        'name': 'mmv_fac_relu',
        'va': VA,
    }


def test_sizes_told_by_the_file(imported):
    backbone, _, _, _, config = imported
    t = config.model.towers
    assert (t.video.name, t.video.multiplier, t.audio.multiplier) == (backbone, M, M)
    assert (t.text.vocab, t.text.word_width, t.text.width) == (VOCAB, EMBED, TEXT)
    assert config.model.head.to_dict() == {
        'name': presets.MMV_GRAPHS['fac'][0],
        'va': VA,
        'vat': VAT,
    }
    assert tuple(config.model.inputs.video.range) == (0.0, 1.0)


def test_each_dimension_has_its_field(imported):
    backbone, _, folder, _, _ = imported
    fields = {
        '/'.join(e.ours[1:]): [f.removeprefix('model.') for f in e.fields]
        for e in importer.layout(parameter_map.read_run(folder / 'run')[2])
    }
    assert fields['head/text_vat/kernel'] == ['towers.text.width', 'head.vat'] and fields[
        'head/va_to_vat_norm/scale'
    ] == ['', 'head.vat']
    assert fields['nets_text/word_table'] == ['towers.text.vocab', 'towers.text.word_width']
    assert fields['nets_text/projection/kernel'] == [
        '',
        'towers.text.word_width',
        'towers.text.width',
    ]
    assert fields['nets_audio/resnet/stem/kernel'][-1] == 'towers.audio.multiplier'
    if backbone == 's3d':
        assert fields['nets_video/conv_1a/conv_0/conv/kernel'] == [
            'towers.video.space_to_depth'
        ] * 4 + ['towers.video.multiplier']
