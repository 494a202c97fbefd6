"""Weights of CLIP and SigLIP: files in each layout of the releases, in and out again."""

import json
import math
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.linen import meta
from flax.traverse_util import flatten_dict

from configs import default
from tests import tiny_clip
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.importers import clip, clip_layouts, parameter_map, pickles
from vatt_jax.importers.__main__ import main
from vatt_jax.inputs import tokenizer
from vatt_jax.rng import Rng

# Heads have the released width of 64.
SIZE = {'layers': 2, 'width': 64, 'mlp': 24, 'heads': 1, 'head_width': 64}
KINDS = {
    'openai': 'clip',
    'openai_resnet': 'resnet',
    'hf_clip': 'clip',
    'hf_siglip': 'siglip',
    'big_vision': 'siglip',
}


def tiny_model(kind):
    """`config.model` of a model whose sizes can be read off its weights."""
    m = tiny_clip.model(kind)
    m.towers.text.update(SIZE)
    if kind != 'resnet':
        m.towers.video.update(SIZE)
    if kind == 'siglip':
        m.head.vt = 64
    return m


def expected_shapes(layout):
    """{name: shape} of a file in a layout."""
    m = tiny_model(KINDS[layout])
    model = models.build(m, 'float32')
    batch = tiny_clip.batch(m, 2)
    rng = Rng.create(0, 0, jnp.arange(2))
    variables = dict(
        meta.unbox(
            jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False, rng=rng))
        )
    )
    learnt = {'log_scale': jax.ShapeDtypeStruct((1,), jnp.float32)}
    if KINDS[layout] == 'siglip':
        learnt['bias'] = learnt['log_scale']
    variables['objective'] = learnt
    entries = clip_layouts.layout(layout, flatten_dict(variables), clip.sizes_of(m))
    return {entry.theirs: entry.shape for entry in entries}


@pytest.fixture(scope='module')
def weights():
    """weights(layout) -> random {name: float32 array} as the release names them."""

    def make(layout):
        noise = np.random.default_rng(0)
        arrays = {}
        for name, shape in expected_shapes(layout).items():
            # float16 holds these exactly.
            arrays[name] = noise.normal(size=shape).astype(np.float16).astype(np.float32)
        return arrays

    return make


# ---- files as PyTorch writes them
def text(value):
    return pickle.BINUNICODE + struct.pack('<I', len(value)) + value.encode()


def number(value):
    return pickle.BININT + struct.pack('<i', value)


def torchscript_tensor(array, storages):
    """A call of _rebuild_tensor_v2 on a storage of half floats on a GPU."""
    key = str(len(storages))
    storages[key] = array.astype('<f2').tobytes()
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    return b''.join(
        [
            b'ctorch._utils\n_rebuild_tensor_v2\n((',
            text('storage') + b'ctorch\nHalfStorage\n' + text(key) + text('cuda:0'),
            number(array.size) + b'tQ' + number(0),
            b'(' + b''.join(map(number, array.shape)) + b't',
            b'(' + b''.join(map(number, strides)) + b't',
            pickle.NEWFALSE + b'ccollections\nOrderedDict\n)RtR',
        ]
    )


def torchscript_module(tree, storages, kind='Multimodal'):
    """An instance of a class of the archive, its attributes set by BUILD."""
    items = [text('training') + pickle.NEWFALSE, text('_is_full_backward_hook') + pickle.NONE]
    for name, value in tree.items():
        if isinstance(value, dict):
            items.append(text(name) + torchscript_module(value, storages, f'M_{name}'))
        else:
            items.append(text(name) + torchscript_tensor(value, storages))
    created = f'c__torch__.multimodal.model.___torch_mangle_9\n{kind}\n)'.encode()
    return created + pickle.NEWOBJ + b'}(' + b''.join(items) + b'ub'


def write_torchscript(path, arrays):
    """What torch.jit.save makes of a model: modules within modules, and their code."""
    tree = {}
    for name, array in arrays.items():
        *modules, leaf = name.split('.')
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = array
    storages = {}
    root = b'\x80\x02' + torchscript_module(tree, storages) + b'.'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('ViT/version', '2\n')
        archive.writestr('ViT/code/__torch__/multimodal/model.py', 'raise SystemExit\n')
        archive.writestr('ViT/data.pkl', root)
        archive.writestr('ViT/constants.pkl', b'\x80\x02).')
        for key, content in storages.items():
            archive.writestr(f'ViT/data/{key}', content)


def imported(path, out, name, **options):
    """(config, report, {our path: array}) of an import without a config."""
    base = default.get_config()
    config, report = clip.FORMATS[name].import_checkpoint(path, out, None, base, **options)
    return config, report, parameter_map.read_run(out)[2]


# ---- tests
def test_openais_archive_is_read_without_its_code(tmp_path, weights):
    arrays = weights('openai')
    # The released archives hold these as well.
    extra = {'input_resolution': np.float32(16).reshape(()), 'unknown.weight': np.ones((2, 2))}
    write_torchscript(tmp_path / 'ViT.pt', {**arrays, **extra})
    config, report, ours = imported(tmp_path / 'ViT.pt', tmp_path / 'run', 'openai_clip')
    assert report.unused == ['unknown.weight']
    assert report.bookkeeping == 1
    tower = config.model.towers.video
    assert (tower.layers, tower.width, tower.patch, tower.positions) == (2, 64, 8, (2, 2))
    assert (tower.activation, config.model.inputs.video.size) == ('quick_gelu', 16)
    # By hand, without the table: one fused projection, one convolution, the temperature.
    fused = arrays['visual.transformer.resblocks.1.attn.in_proj_weight']
    layers = ('params', 'encoders_video', 'layers')
    np.testing.assert_array_equal(ours[(*layers, 'key', 'kernel')][1, :, 0], fused[64:128].T)
    patch = ours[('params', 'fronts_video', 'patch', 'kernel')].reshape(8, 8, 3, 64)
    kernel = arrays['visual.conv1.weight']
    np.testing.assert_array_equal(patch, kernel.transpose(2, 3, 1, 0))
    assert ours[('objective', 'log_scale')] == arrays['logit_scale']


@pytest.mark.parametrize(
    'name, layout, suffix',
    [
        ('openai_clip', 'openai', '.pt'),
        ('openai_clip', 'openai_resnet', '.pt'),
        ('hf_clip', 'hf_clip', '.safetensors'),
        ('hf_clip', 'hf_siglip', '.safetensors'),
        ('big_vision', 'big_vision', '.npz'),
    ],
)
def test_the_way_back_is_exact(tmp_path, weights, name, layout, suffix):
    arrays = weights(layout)
    path, back = tmp_path / f'model{suffix}', tmp_path / f'back{suffix}'
    if suffix == '.npz':
        np.savez(path, **arrays)
    elif suffix == '.safetensors':
        safetensors.numpy.save_file(arrays, path)
    else:
        write_torchscript(path, arrays)
    config, report, _ = imported(path, tmp_path / 'run', name)
    assert not report.unused
    assert config.model.towers.text.vocab == tiny_clip.VOCAB
    clip.FORMATS[name].export_checkpoint(tmp_path / 'run', back)
    found = clip.read_arrays(back, 'back')
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
        assert found[key].dtype == np.float32


def test_the_written_state_dict_is_one_of_pytorch(tmp_path):
    arrays = {'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.float32([[7]])}
    arrays['scalar'] = np.array(2.5, np.float32)
    clip.torch_writer.write(tmp_path / 'state.pt', arrays)
    with zipfile.ZipFile(tmp_path / 'state.pt') as archive:
        content = archive.read('archive/data.pkl')
        np.testing.assert_array_equal(
            np.frombuffer(archive.read('archive/data/0'), '<f4'), range(6)
        )
    names = [argument for opcode, argument, _ in pickle_operations(content) if opcode == 'GLOBAL']
    assert set(names) == {
        'collections OrderedDict',
        'torch FloatStorage',
        'torch._utils _rebuild_tensor_v2',
    }
    for name, array in pickles.read(tmp_path / 'state.pt').items():
        np.testing.assert_array_equal(array, arrays[name])


def pickle_operations(content):
    import pickletools

    return [
        (opcode.name, argument, place) for opcode, argument, place in pickletools.genops(content)
    ]


def test_hugging_faces_names_are_those_of_openais_model():
    """Shapes by name, the projections cut into queries, keys and values by hand."""
    renamed = {
        'visual.class_embedding': 'vision_model.embeddings.class_embedding',
        'visual.conv1.weight': 'vision_model.embeddings.patch_embedding.weight',
        'visual.positional_embedding': 'vision_model.embeddings.position_embedding.weight',
        'visual.proj': 'visual_projection.weight',
        'text_projection': 'text_projection.weight',
        'token_embedding.weight': 'text_model.embeddings.token_embedding.weight',
        'positional_embedding': 'text_model.embeddings.position_embedding.weight',
    }
    pieces = {
        'visual.ln_pre': 'vision_model.pre_layrnorm',
        'visual.ln_post': 'vision_model.post_layernorm',
        'visual.transformer.resblocks': 'vision_model.encoder.layers',
        'transformer.resblocks': 'text_model.encoder.layers',
        'ln_final': 'text_model.final_layer_norm',
        'ln_1': 'layer_norm1',
        'ln_2': 'layer_norm2',
        'mlp.c_fc': 'mlp.fc1',
        'mlp.c_proj': 'mlp.fc2',
        'attn.out_proj': 'self_attn.out_proj',
    }
    expected = {}
    for name, shape in expected_shapes('openai').items():
        new = renamed.get(name, name)
        if new == name:
            for old, replacement in pieces.items():
                new = new.replace(old, replacement)
        if name in ('visual.proj', 'text_projection'):
            shape = shape[::-1]
        if 'attn.in_proj' not in name:
            expected[new] = shape
            continue
        for part in 'qkv':
            cut = new.replace('attn.in_proj_', f'self_attn.{part}_proj.')
            expected[cut] = (shape[0] // 3, *shape[1:])
    assert expected_shapes('hf_clip') == expected


def test_scanned_layers_and_bfloat16_of_big_vision(tmp_path, weights):
    arrays = weights('big_vision')
    stacked = {'opt/0/count': np.zeros(())}
    for name, array in arrays.items():
        if 'encoderblock_0' in name:
            other = arrays[name.replace('encoderblock_0', 'encoderblock_1')]
            both = np.stack([array, other]).astype(ml_dtypes.bfloat16)
            stacked[name.replace('encoderblock_0', 'encoderblock')] = both
        elif 'encoderblock_1' not in name:
            stacked[name] = array
    np.savez(tmp_path / 'siglip.npz', **stacked)
    found = clip.read_arrays(tmp_path / 'siglip.npz', 'siglip')
    assert found.pop('opt/0/count') == 0
    assert found.keys() == arrays.keys()
    name = 'params/img/Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel'
    np.testing.assert_array_equal(found[name], arrays[name].astype(ml_dtypes.bfloat16))


def test_the_command_takes_a_folder_and_a_tokenizer(tmp_path, weights, capsys):
    trained = tokenizer.train('clip', ['a dog and a cat'] * 9, 520)
    (tmp_path / 'tokenizer.json').write_text(trained.to_spec()['model'])
    arrays = weights('hf_clip')
    table = 'text_model.embeddings.token_embedding.weight'
    arrays[table] = np.zeros((trained.size, 64), np.float32)
    folder = tmp_path / 'model'
    folder.mkdir()
    safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps({'vision_config': {'hidden_act': 'gelu'}}))
    run = tmp_path / 'run'
    vocabulary = f'--vocabulary={tmp_path / "tokenizer.json"}'
    main(['--format=hf_clip', f'--checkpoint={folder}', vocabulary, f'--out={run}'])
    assert 'not used: none' in capsys.readouterr().out
    config, info, _ = parameter_map.read_run(run)
    assert info['tokenizer'] == trained.to_spec()
    assert config.model.towers.text.activation == 'gelu'


def test_what_does_not_fit_is_named(tmp_path, weights):
    arrays = weights('hf_siglip')
    safetensors.numpy.save_file(arrays, tmp_path / 'model.safetensors')
    with pytest.raises(ConfigError, match='expected weights of openai_clip, with one of visual'):
        imported(tmp_path / 'model.safetensors', tmp_path / 'run', 'openai_clip')
    del arrays['vision_model.head.layernorm.bias']
    arrays['logit_bias'] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(arrays, tmp_path / 'model.safetensors')
    with pytest.raises(ConfigError) as error:
        imported(tmp_path / 'model.safetensors', tmp_path / 'run', 'hf_clip')
    assert 'vision_model.head.layernorm.bias' in str(error.value)
    assert 'logit_bias has shape [3], this config expects [1]' in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_an_instance_of_another_class_is_refused(tmp_path):
    content = b'\x80\x02cos\nsystem\n)\x81}b.'
    for name in (content, content.replace(b'cos\nsystem', b'ccollections\nOrderedDict')):
        with zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as archive:
            archive.writestr('archive/data.pkl', name)
        with pytest.raises(pickles.Refused):
            pickles.read(tmp_path / 'bad.pt')
