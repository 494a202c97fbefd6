"""MMV's graphs against their definition, what each pair's loss may move, and the runs' configs."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax.linen import meta

import data_pipelines
import vatt_jax
from configs import default
from tests import tiny
from vatt_jax import config as configs
from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.models import layers, presets
from vatt_jax.models.common_space import GRAPHS, CommonSpaces
from vatt_jax.models.multimodal import NETS
from vatt_jax.models.towers import i3d, resnet_v2
from vatt_jax.objectives.contrastive import Contrastive
from vatt_jax.training import checkpoint, loop

B, K = 5, 3  # clips, and sentences of a clip
SHAPES = {'video': (B, 7), 'audio': (B, 6), 'text': (B, K, 4)}
VALID = {
    'video': np.array([1, 1, 0, 1, 1], bool),
    'audio': np.ones(B, bool),
    'text': np.ones(B, bool),
}


def pooled_features(*modalities):
    """Noise in place of the towers' outputs, of these modalities or all."""
    noise = np.random.default_rng(1)
    features = {}
    for modality, shape in SHAPES.items():
        features[modality] = noise.normal(size=shape).astype(np.float32)
    return {modality: features[modality] for modality in modalities or SHAPES}


def head_of(**config):
    """(module, variables without a 0 or 1 that would hide something)."""
    module, features = CommonSpaces(config), pooled_features()

    def init():
        return module.init(jax.random.key(0), features, VALID, False)

    noise = np.random.default_rng(0)

    def stir(value):
        is_vector_of_floats = value.dtype != jnp.int32 and value.ndim == 1
        if not is_vector_of_floats:
            return value
        return np.abs(value + 0.3 * noise.normal(size=value.shape).astype(np.float32))

    variables = meta.unbox(jax.jit(init)())
    return module, jax.tree.map(stir, dict(variables))


def f64(tree):
    """The tree with float64 NumPy leaves."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


class Reference:
    """The parts that heads are made of, in NumPy float64."""

    def __init__(self, variables):
        self.params = f64(variables['params'])
        self.stats = f64(variables['batch_stats'])

    def dense(self, name, x):
        """A matrix and, where there is one, a bias."""
        params = self.params[name]
        return x @ params['kernel'] + params.get('bias', 0)

    def norm(self, name, x):
        """Batch norm by the running statistics."""
        params, stats = self.params[name], self.stats[name]
        centred = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
        return centred * params['scale'] + params['bias']

    def mlp(self, name, x):
        """BN(W₂ ReLU(BN(W₁ x)))."""
        hidden = self.norm(f'{name}_hidden_norm', self.dense(f'{name}_hidden', x))
        return self.norm(f'{name}_norm', self.dense(name, np.maximum(hidden, 0)))

    def coarse(self, graph, fine):
        """From the fine space va to the coarse one, BN(W g(z)); g is what graphs differ in."""
        if graph == 'mmv_fac_relu':
            fine = np.maximum(fine, 0)
        if graph == 'mmv_fac_bnrelu':
            fine = np.maximum(self.norm('va_norm', fine), 0)
        return self.norm('va_to_vat_norm', self.dense('va_to_vat', fine))


def close(spaces, expected, rtol, atol):
    """Equal spaces, shapes and modalities included, in float32 as heads compute."""
    chex.assert_type(jax.tree.leaves(spaces), jnp.float32)
    chex.assert_trees_all_equal_shapes(spaces, expected)
    chex.assert_trees_all_close(f64(spaces), expected, rtol=rtol, atol=atol)


class GraphsTest(chex.TestCase):
    def spaces(self, module, variables):
        """What a head gives after training."""

        @self.variant
        def apply(variables, features):
            return module.apply(variables, features, VALID, False)

        return apply(variables, pooled_features())

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ('fac', 'mmv_fac'),
        ('fac_relu', 'mmv_fac_relu'),
        ('fac_bnrelu', 'mmv_fac_bnrelu'),
    )
    def test_fac_is_its_definition(self, graph):
        """z_va = MLP(video), W audio; z_vat = BN(W g(z_va)), W text."""
        module, variables = head_of(name=graph, va=5, vat=3)
        reference, x = Reference(variables), f64(pooled_features())
        video = reference.mlp('video_va', x['video'])
        audio = reference.dense('audio_va', x['audio'])
        expected = {
            'va': {'video': video, 'audio': audio},
            'vat': {
                'video': reference.coarse(graph, video),
                'audio': reference.coarse(graph, audio),
                'text': reference.dense('text_vat', x['text']),
            },
        }
        close(self.spaces(module, variables), expected, rtol=1e-3, atol=1e-4)

        has_bias = {}
        for name, params in reference.params.items():
            if 'kernel' in params:
                has_bias[name] = 'bias' in params
        assert has_bias == {
            'video_va_hidden': True,
            'video_va': False,
            'audio_va': True,
            'va_to_vat': True,
            'text_vat': True,
        }

    @chex.variants(with_jit=True, without_jit=True)
    def test_disjoint_spaces_are_their_definition(self):
        """z_video = MLP_space(video), a W_space for audio and text; nothing is shared."""
        module, variables = head_of(name='mmv_disjoint', va=5, vt=4, at=3)
        reference, x = Reference(variables), f64(pooled_features())
        expected = {
            'va': {
                'video': reference.mlp('video_va', x['video']),
                'audio': reference.dense('audio_va', x['audio']),
            },
            'vt': {
                'video': reference.mlp('video_vt', x['video']),
                'text': reference.dense('text_vt', x['text']),
            },
            'at': {
                'audio': reference.dense('audio_at', x['audio']),
                'text': reference.dense('text_at', x['text']),
            },
        }
        spaces = self.spaces(module, variables)
        chex.assert_trees_all_equal_shapes(spaces, expected)
        chex.assert_type(jax.tree.leaves(spaces), jnp.float32)
        for space, embeddings in spaces.items():
            for modality, got in embeddings.items():
                rtol, atol = (1e-3, 1e-4) if modality == 'video' else (1e-4, 1e-5)
                np.testing.assert_allclose(got, expected[space][modality], rtol=rtol, atol=atol)

    @chex.variants(with_jit=True, without_jit=True)
    def test_shared_has_one_head_for_each_modality(self):
        """One space: z_video = MLP(video), W for audio and text."""
        module, variables = head_of(name='mmv_shared', joint=5)
        reference, x = Reference(variables), f64(pooled_features())
        spaces = self.spaces(module, variables)
        chex.assert_trees_all_equal_structs(spaces, {'joint': dict.fromkeys(SHAPES, 0)})
        video = reference.mlp('video_joint', x['video'])
        close(spaces['joint']['video'], video, rtol=1e-3, atol=1e-4)
        for modality in ('audio', 'text'):
            linear = reference.dense(f'{modality}_joint', x[modality])
            close(spaces['joint'][modality], linear, rtol=1e-4, atol=1e-5)


def moved_by(module, variables, space, *modalities):
    """Names of the parameters that a loss on these modalities in a space moves in training."""

    def loss(params):
        out, _ = module.apply(
            {**variables, 'params': params},
            pooled_features(),
            VALID,
            True,
            mutable=['batch_stats'],
        )
        return sum(jnp.sum(jnp.sin(out[space][modality])) for modality in modalities)

    grads = jax.grad(loss)(variables['params'])
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, variables['params'])
    moved = set()
    for name, tree in grads.items():
        if any(np.abs(grad).max() > 1e-9 for grad in jax.tree.leaves(tree)):
            moved.add(name)
    return moved


def test_in_training_fac_takes_only_video_to_the_coarse_space():
    module, variables = head_of(name='mmv_fac_relu', va=5, vat=3)

    def train(features):
        return module.apply(variables, features, VALID, True, mutable=['batch_stats'])

    spaces, both = train(pooled_features())
    assert set(spaces['vat']) == {'video', 'text'}
    assert set(spaces['va']) == {'video', 'audio'}

    # the shared norm's statistics are those of valid video rows, whether there is sound or not
    _, without_sound = train(pooled_features('video'))
    chex.assert_trees_all_equal(both, without_sound)
    chex.assert_trees_all_equal_shapes_and_dtypes(both['batch_stats'], variables['batch_stats'])
    assert int(both['batch_stats']['va_to_vat_norm']['count']) == 1

    video = {'video_va_hidden', 'video_va_hidden_norm', 'video_va', 'video_va_norm'}
    coarse = {'va_to_vat', 'va_to_vat_norm'}
    assert moved_by(module, variables, 'va', 'video', 'audio') == video | {'audio_va'}
    assert moved_by(module, variables, 'vat', 'video', 'text') == video | coarse | {'text_vat'}


def test_disjoint_heads_share_nothing():
    module, variables = head_of(name='mmv_disjoint', va=5, vt=4, at=3)
    by_va = moved_by(module, variables, 'va', 'video', 'audio')
    by_vt = moved_by(module, variables, 'vt', 'video', 'text')
    by_at = moved_by(module, variables, 'at', 'audio', 'text')
    assert by_at == {'audio_at', 'text_at'}
    assert not by_va & by_vt
    assert all(name.startswith(('video_vt', 'text_vt')) for name in by_vt)


@pytest.mark.parametrize(
    'config, spaces, left_out',
    [
        (
            {'name': 'mmv_fac_relu', 'va': 5},
            {'va': {'video', 'audio'}},
            'va_to_vat',
        ),
        (
            {'name': 'mmv_disjoint', 'vt': 5},
            {'vt': {'video', 'text'}},
            'video_va',
        ),
        (
            {'name': 'mmv_disjoint', 'va': 5, 'vt': 5},
            {'va': {'video', 'audio'}, 'vt': {'video', 'text'}},
            'text_at',
        ),
        (
            {'name': 'fac', 'va': 5},
            {'va': {'video', 'audio'}},
            'video_vat',
        ),
    ],
)
def test_a_space_without_a_width_is_left_out(config, spaces, left_out):
    module, variables = head_of(**config)
    got = module.apply(variables, pooled_features(), VALID, False)
    assert {space: set(embeddings) for space, embeddings in got.items()} == spaces
    assert left_out not in variables['params']
    chex.assert_shape(jax.tree.leaves(got), (B, ..., 5))


@pytest.mark.parametrize(
    'config, message',
    [
        (
            {'name': 'mmv_fac_relu', 'va': 5, 'vta': 3},
            "config.model.head.vta=3: the graph 'mmv_fac_relu' has the spaces va, vat",
        ),
        (
            {'name': 'mmv_shared'},
            "no width for any space of the graph 'mmv_shared'; it has joint",
        ),
        (
            {'name': 'mmv_fac_relu', 'vat': 5},
            "config.model.head.va is missing: video reaches other spaces of 'mmv_fac_relu' "
            'through that one',
        ),
        (
            {'name': 'mmv'},
            "config.model.head.name='mmv': choose one of fac, joint, mmv_shared",
        ),
    ],
)
def test_mistakes_are_sentences(config, message):
    with pytest.raises(ConfigError) as error:
        CommonSpaces(config).init(jax.random.key(0), pooled_features(), VALID, False)
    assert message in str(error.value)


# ---- through the loop
def tiny_mmv(video, head, pairs, audio=None, text=False):
    """A config of two steps with these towers."""
    config = tiny.config(steps=2, optimizer__schedule__warmup=1, batch_size=8)
    config.model.inputs.video.range = (0.0, 1.0)
    config.model.towers = {'video': video}
    if audio:
        config.model.towers.audio = audio
        spectrogram = {'bins': 8, 'window': 64, 'hop': 32, 'low': 20.0, 'high': 900.0}
        config.model.inputs.audio.mel = {**presets.MMV_MEL, **spectrogram}
    if text:
        config.model.towers.text = {
            'name': 'linear',
            'vocab': 0,
            'word_width': 8,
            'width': 12,
            'init': 'fan_in',
        }
    config.model.head = head
    config.objective = {'name': 'contrastive', 'pairs': pairs}
    return config


CASES = {
    's3d': {
        'video': {'name': 's3d', 'multiplier': 0.05},
        'head': {'name': 'mmv_fac_relu', 'va': 8, 'vat': 4},
        'pairs': (('video', 'audio', 'va', 1.0), ('video', 'text', 'vat', 3.0)),
        'audio': {'name': 'resnet2d_v2', 'depth': 18, 'multiplier': 0.1},
        'text': True,
    },
    'tsm': {
        'video': {'name': 'tsm_resnet', 'depth': 18, 'multiplier': 0.1},
        'head': {'name': 'mmv_shared', 'joint': 8},
        'pairs': (('video', 'audio', 'joint', 1.0),),
        'audio': {'name': 'resnet9', 'multiplier': 0.1},
    },
    'r2plus1d': {
        'video': {'name': 'r2plus1d', 'multiplier': 0.1},
        'head': {'name': 'mmv_disjoint', 'vt': 8},
        'pairs': (('video', 'text', 'vt', 1.0),),
        'text': True,
    },
}


class WithoutWordsInOddRows:
    """Batches of another stream; words are missing in the odd rows."""

    def __init__(self, stream):
        self.stream = stream
        self.close = stream.close

    def __next__(self):
        batch = next(self.stream)
        if 'text' in batch:
            text = batch['text']
            has_words = np.arange(8) % 2 == 0
            batch['text'] = {
                **text,
                'valid': text['valid'] & has_words,
                'mask': text['mask'] & has_words[:, None],
                'data': text['data'] * has_words[:, None, None],
            }
        return batch


def last_logged(folder):
    """The last line of a run's metrics that has a loss."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in lines if 'loss' in line][-1]


@pytest.mark.parametrize(
    'case',
    [
        'tsm',
        pytest.param('s3d', marks=pytest.mark.slow),
        pytest.param('r2plus1d', marks=pytest.mark.slow),
    ],
)
def test_every_tower_trains(case, tmp_path, monkeypatch):
    """Two steps; words are missing in the odd rows.

    Everything that a pair reads moves, and the loss is the weighted mean of the pairs'. Fewer
    blocks than published: compiling is what takes the time.
    """
    monkeypatch.setattr(i3d, 'MIXED', {name: i3d.MIXED[name] for name in ('mixed_3b', 'mixed_4b')})
    monkeypatch.setitem(resnet_v2.DEPTHS, 18, ((1, 1), False, (64, 128)))
    config = tiny_mmv(**CASES[case])
    data = data_pipelines.open(config)
    batches = data.train

    def batches_with_gaps(*args, **options):
        return WithoutWordsInOddRows(batches(*args, **options))

    data.train = batches_with_gaps
    loop.train(config, data, tmp_path, quiet=True)

    line = last_logged(tmp_path)
    total, weights = 0.0, 0.0
    for first, second, _, weight in config.objective.pairs:
        total += weight * line[f'loss/{first}-{second}']
        weights += weight
    assert line['skipped'] == 0
    assert line['loss'] == pytest.approx(total / weights, rel=1e-4)

    initial = loop.build(config, data).init().params['model']
    trained = checkpoint.read_model(checkpoint.find(tmp_path))['params']
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, initial)
    chex.assert_tree_all_finite(trained)
    still = []
    for path, after, before in zip(
        jax.tree.leaves(optim.paths(trained)), jax.tree.leaves(trained), jax.tree.leaves(initial)
    ):
        if np.array_equal(after, before) and 'word_table' not in path:
            still.append(path)
    assert not still, still

    if case == 'tsm':
        clip, sound = np.zeros((4, 16, 16, 3), np.uint8), np.zeros(1024, np.int16)
        embedded = vatt_jax.load(tmp_path).embed(video=clip, audio=sound)
        assert len(embedded) == 2
        for embeddings in embedded.values():
            assert set(embeddings) == {'pooled', 'joint'}
            chex.assert_shape(embeddings['joint'], (8,))
            chex.assert_tree_all_finite(embeddings)


def test_a_pair_that_training_does_not_compute_is_a_sentence():
    module, variables = head_of(name='mmv_fac_relu', va=5, vat=3)

    class Model:
        """A model of a head alone."""

        @staticmethod
        def apply(*_, **options):
            return module.apply(variables, pooled_features(), VALID, True, mutable=['batch_stats'])

    message = (
        "no 'audio' in space 'vat' in training; "
        'it has video in va, audio in va, video in vat, text in vat'
    )
    objective = Contrastive({'pairs': (('audio', 'text', 'vat', 1.0),)})
    with pytest.raises(ConfigError, match=message):
        objective.compute_loss(Model, {}, {}, {}, {}, {}, None)


# ---- configs
def every_name():
    """Names of all runs: a backbone, a graph and the modalities."""
    names = []
    for backbone in ('demo', *presets.MMV_BACKBONES):
        for graph in presets.MMV_GRAPHS:
            for modalities in presets.MMV_SUBSETS:
                names.append(f'{backbone}_{graph}_{modalities}')
    return names


@pytest.mark.parametrize('option', ['', ',synthetic'])
def test_configs_pass_the_checks(option):
    for name in every_name():
        config = configs.load(f'configs/mmv.py:{name}{option}')
        configs.check_fields(config, default.get_config())
        optim.schedule(config.optimizer.schedule, config.steps)
        head = config.model.head
        assert set(head) - {'name'} <= set(GRAPHS[head.name].spaces())
        modalities = name.rsplit('_')[-1]
        for first, second, space, _ in config.objective.pairs:
            assert space in head
            assert {first, second} <= set(config.model.towers)
            assert modalities in ('vat', f'v{second[0]}')
        assert config.data.source == ('synthetic' if option else 'records')


def test_published_values():
    config = configs.load('configs/mmv.py:s3d_fac_vat')
    assert config.steps == 500_000
    assert config.batch_size == 4096
    assert config.optimizer.name == 'adam'
    assert config.optimizer.weight_decay == 0.0
    rate = optim.schedule(config.optimizer.schedule, config.steps)
    assert abs(rate(2_500) - 1e-3) < 1e-9
    assert abs(rate(5_000) - 2e-3) < 1e-9
    assert rate(500_000) < 1e-9
    assert config.model.head.to_dict() == {'name': 'mmv_fac_relu', 'va': 512, 'vat': 256}
    video = {'frames': 32, 'size': 200, 'fps': 10.0, 'range': (0.0, 1.0)}
    # Pictures as the decoder scales them, not normalised.
    video |= {'resize': 'linear', 'mean': (), 'deviation': ()}
    assert config.model.inputs.video.to_dict() == video
    shares = {name: source.share for name, source in config.data.train.items()}
    assert shares == {'howto100m': 0.5, 'audioset': 0.5}


def test_published_values_on_howto100m_alone():
    config = configs.load('configs/mmv.py:tsm50_fac_vat,howto100m')
    assert list(config.data.train) == ['howto100m']
    assert [weight for *_, weight in config.objective.pairs] == [1.0, 10.0]


@pytest.mark.parametrize(
    'backbone, grid',
    [
        ('s3d', (4, 4, 4)),
        ('s3d_pixels', (4, 4, 4)),
        ('tsm50', (8, 1, 1)),
        ('r2plus1d', (1, 2, 2)),
    ],
)
def test_a_demo_network_ends_on_several_cells(backbone, grid, monkeypatch):
    """With the four pools of the published S3D the map is one cell from mixed_5b on.

    So it is for eight frames of 32 pixels, and 600 steps taught it next to nothing.
    """
    for init in layers.INITS:  # cheaper to trace
        monkeypatch.setitem(layers.INITS, init, jax.nn.initializers.zeros)
    model = configs.load(f'configs/mmv.py:demo_fac_vat,{backbone}').model
    fields = model.towers.video.to_dict()
    _, net = NETS[fields.pop('name')]
    module = net(**fields)

    def init_with_output(x):
        return module.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False)

    video = model.inputs.video
    shape = (2, video.frames, video.size, video.size, 3)
    (pooled, last), _ = jax.eval_shape(init_with_output, jax.ShapeDtypeStruct(shape, jnp.float32))
    width = pooled.shape[-1]
    chex.assert_shape(pooled, (2, width))
    chex.assert_shape(last, (2, *grid, width))


@pytest.mark.parametrize(
    'name, message',
    [
        ('s3d_fuc_vat', "graph='fuc': choose one of fac"),
        ('s3d_fac_tv', "modalities='tv': choose one of va, vt, vat"),
        ('s3e_fac_vat', "backbone='s3e': choose one of demo, s3d"),
        ('s3d_fac_vat,tsm50', "option='tsm50'"),
    ],
)
def test_an_unknown_name_is_a_sentence(name, message):
    with pytest.raises(ConfigError) as error:
        configs.load(f'configs/mmv.py:{name}')
    assert message in str(error.value)
