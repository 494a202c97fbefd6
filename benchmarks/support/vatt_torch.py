"""VATT's towers, heads and loss in PyTorch, for benchmarks/gpu_step.py.

The same transformers, DropToken, heads with batch norm and NCE as ours. As in ours, dropped tokens
are never projected and the last layer computes only what the aggregate token needs.
"""

from __future__ import annotations

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional as F

from vatt_jax.models.transformer import relative_buckets

EPS = 1e-6
TEMPERATURE = 0.07
WORD_WIDTH = 300
NUM_BUCKETS, MAX_DISTANCE = 32, 64
# Voxels of 4 frames of 16×16 pixels, and samples of sound, that make a token.
VOXEL_FRAMES, VOXEL_SIZE, SAMPLES = 4, 16, 128


def table(*shape: int) -> nn.Parameter:
    """An embedding table as VATT draws it."""
    return nn.Parameter(0.02 * torch.randn(*shape))


class Prepend(nn.Module):
    """Puts the aggregate token before all others."""

    def __init__(self, width: int):
        super().__init__()
        self.token = table(width)

    def forward(self, x):
        """x: [B N D]. Returns [B 1+N D]."""
        return torch.cat([self.token.expand(len(x), 1, -1), x], 1)


class Patches(nn.Module):
    """Tokens of a video or a waveform: projected patches with positions added."""

    def __init__(
        self, patch_size: int, grid: tuple[int, ...], width: int, shared: bool, rate: float
    ):
        super().__init__()
        self.rate = rate
        self.patch = nn.Linear(patch_size, width)
        # A shared encoder is preceded by one projection for each modality.
        self.projection = nn.Linear(width, width) if shared else None
        self.positions = nn.ParameterList(table(size, width) for size in grid)
        self.norm = nn.LayerNorm(width, EPS)
        self.aggregate = Prepend(width)

    def position_embeddings(self):
        """The sum of one embedding for each axis: [tokens, D]."""
        num_axes = len(self.positions)
        total = 0
        for axis, embeddings in enumerate(self.positions):
            shape = [1] * num_axes
            shape[axis] = -1
            total = total + embeddings.view(*shape, embeddings.shape[1])
        return total.reshape(-1, total.shape[-1])

    def forward(self, patches, kept):
        """patches: [B N patch_size]; kept: the tokens that DropToken leaves.

        Returns:
            [B 1+kept D], and None: no token is masked.
        """
        x = self.patch(patches[:, kept])
        if self.projection is not None:
            x = F.gelu(self.projection(x))
        positions = self.norm(self.position_embeddings())[kept]
        return self.aggregate(F.dropout(x + positions, self.rate)), None


class Words(nn.Module):
    """Tokens of sentences: frozen word embeddings, projected; positions only before a shared
    encoder, as T5 has relative ones."""

    def __init__(self, vocabulary: int, words: int, width: int, shared: bool, rate: float):
        super().__init__()
        self.shared, self.rate = shared, rate
        self.table = nn.Embedding(vocabulary, WORD_WIDTH)
        self.table.weight.requires_grad_(False)
        self.projection = nn.Linear(WORD_WIDTH, width, bias=shared)
        self.aggregate = Prepend(width if shared else WORD_WIDTH)
        self.positions = table(words, width) if shared else None
        self.norm = nn.LayerNorm(width, EPS) if shared else None

    def forward(self, ids):
        """ids: [B W]. Returns [B 1+W D] and which tokens are not padding."""
        mask = F.pad(ids != 0, (1, 0), value=True)
        x = self.table(ids)
        if self.shared:
            x = F.gelu(self.projection(x))
            x = F.dropout(x + self.norm(self.positions), self.rate)
            return self.aggregate(x), mask
        x = F.gelu(self.projection(self.aggregate(x)))
        return F.dropout(x, self.rate), mask


class Block(nn.Module):
    """A pre-norm transformer layer; with `t5`, RMS norms, no biases and logits that are not
    scaled."""

    def __init__(self, size: ConfigDict, t5: bool, rate: float):
        super().__init__()
        width, inner, bias = size.width, size.heads * size.get('head_width', 64), not t5
        self.rate = rate
        self.heads = size.heads
        self.scale = 1.0 if t5 else None
        self.attention_norm = norm_layer(width, t5)
        self.mlp_norm = nn.LayerNorm(width, EPS)
        self.query = nn.Linear(width, inner, bias)
        self.key_value = nn.Linear(width, 2 * inner, bias)
        self.out = nn.Linear(inner, width, bias)
        self.mlp_in = nn.Linear(width, size.mlp, bias)
        self.mlp_out = nn.Linear(size.mlp, width, bias)

    def forward(self, x, mask, last: bool):
        """x: [B N D]. Returns the same, or [B 1 D] from the last layer."""
        batch, tokens, _ = x.shape
        y = self.attention_norm(x)
        key_value = self.key_value(y).view(batch, tokens, 2, self.heads, -1)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        if last:
            x, y = x[:, :1], y[:, :1]
        query = self.query(y).view(batch, -1, self.heads, key.shape[-1]).transpose(1, 2)
        # A mask of floats is a bias on the logits, of all queries.
        if mask is not None and mask.dtype != torch.bool:
            mask = mask[:, :, : query.shape[2]].to(query.dtype)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scale
        )
        y = self.out(attended.transpose(1, 2).flatten(2))
        x = x + F.dropout(y, self.rate)
        hidden = F.dropout(F.gelu(self.mlp_in(self.mlp_norm(x))), self.rate)
        return x + F.dropout(self.mlp_out(hidden), self.rate)


class Encoder(nn.Module):
    """A stack of blocks and a norm; with `t5`, one table of relative biases for all layers."""

    def __init__(self, size: ConfigDict, rate: float, t5: bool = False, tokens: int = 0):
        super().__init__()
        self.rate = rate
        self.blocks = nn.ModuleList(Block(size, t5, rate) for _ in range(size.layers))
        self.norm = norm_layer(size.width, t5)
        self.bias, self.buckets = None, None
        if t5:
            self.bias = nn.Parameter(torch.zeros(NUM_BUCKETS, size.heads))
            buckets = relative_buckets(tokens, NUM_BUCKETS, MAX_DISTANCE)
            self.buckets = torch.from_numpy(buckets)

    def forward(self, x, mask):
        """x: [B N D]; mask: bool [B N] or None. Returns the aggregate token, [B D]."""
        if mask is not None:
            mask = mask[:, None, None]
        if self.bias is not None:
            bias = self.bias[self.buckets.to(x.device)].permute(2, 0, 1)[None]
            mask = bias + torch.where(mask, 0.0, -1e9)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, last=i == len(self.blocks) - 1)
        return F.dropout(self.norm(x), self.rate)[:, 0]


def norm_layer(width: int, t5: bool) -> nn.Module:
    """T5's root mean square norm, or a layer norm."""
    return nn.RMSNorm(width, EPS) if t5 else nn.LayerNorm(width, EPS)


class Model(nn.Module):
    """VATT: towers, FAC head and loss.

    Args:
        model: `config.model`, resolved, whose towers are transformers.
        rate: of every dropout; none on attention probabilities, as with the kernels.
    """

    def __init__(self, model: ConfigDict, rate: float):
        super().__init__()
        towers, shared = model.towers, model.shared
        video, audio, words = model.inputs.video, model.inputs.audio, model.inputs.text.words
        width = {}
        for modality, tower in towers.items():
            width[modality] = model.encoder.width if shared else tower.width

        side = video.size // VOXEL_SIZE
        self.grid = (video.frames // VOXEL_FRAMES, side, side)
        voxel = VOXEL_FRAMES * VOXEL_SIZE * VOXEL_SIZE * 3
        vocabulary = towers.text.get('vocab') or 1 << 16
        self.fronts = nn.ModuleDict(
            {
                'video': Patches(voxel, self.grid, width['video'], shared, rate),
                'audio': Patches(
                    SAMPLES, (audio.samples // SAMPLES,), width['audio'], shared, rate
                ),
                'text': Words(vocabulary, words, width['text'], shared, rate),
            }
        )

        shared_encoder = Encoder(model.encoder, rate) if shared else None
        self.encoders, self.posts = nn.ModuleDict(), nn.ModuleDict()
        out = {}
        for modality, tower in towers.items():
            if shared:
                self.encoders[modality] = shared_encoder
            else:
                self.encoders[modality] = Encoder(tower, rate, modality == 'text', words + 1)
            out[modality] = width[modality]
            if tower.get('post'):
                self.posts[modality] = nn.Linear(width[modality], tower.post)
                out[modality] = tower.post

        va, vat = model.head.va, model.head.vat
        self.video_va = nn.Sequential(
            nn.Linear(out['video'], va, bias=False),
            nn.BatchNorm1d(va),
            nn.ReLU(),
            nn.Linear(va, va, bias=False),
            nn.BatchNorm1d(va),
        )
        self.video_vat = nn.Sequential(
            nn.ReLU(), nn.Linear(va, vat, bias=False), nn.BatchNorm1d(vat)
        )
        self.audio_va = nn.Linear(out['audio'], va)
        self.text_vat = nn.Linear(out['text'], vat)

    def pooled(self, modality: str, *stream):
        """What a tower makes of its input, [B D]."""
        x = self.encoders[modality](*self.fronts[modality](*stream))
        return F.gelu(self.posts[modality](x)) if modality in self.posts else x

    def voxels(self, video):
        """[B T H W 3] -> [B tokens, voxel]."""
        batch, (t, h, w) = len(video), self.grid
        split = video.view(batch, t, VOXEL_FRAMES, h, VOXEL_SIZE, w, VOXEL_SIZE, 3)
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, t * h * w, -1)

    def forward(self, video, audio, text, kept):
        """The loss of a batch.

        Args:
            video: float [B T H W 3].
            audio: float [B S].
            text: int [B K W].
            kept: {modality: the tokens that DropToken leaves}.
        """
        batch = len(video)
        waves = audio.view(batch, -1, SAMPLES)
        video_va = self.video_va(self.pooled('video', self.voxels(video), kept['video']))
        audio_va = self.audio_va(self.pooled('audio', waves, kept['audio']))
        video_vat = self.video_vat(video_va)
        text_vat = self.text_vat(self.pooled('text', text.flatten(0, 1)))
        # Scores in float32, as in ours.
        with torch.autocast(video_va.device.type, enabled=False):
            candidates = text_vat.float().view(batch, -1, text_vat.shape[-1])
            video_audio = nce(video_va.float(), audio_va.float()[:, None])
            video_text = nce(video_vat.float(), candidates)
            return video_audio / 2 + video_text / 2


def nce(x, y):
    """MIL-NCE of x [B E] against its candidates y [B K E], both directions in one denominator."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    scores = torch.einsum('be,ake->bak', x, y) / TEMPERATURE
    positive = torch.diagonal(scores, dim1=0, dim2=1).T.logsumexp(-1)
    both_ways = torch.cat([scores.flatten(1), scores.transpose(0, 1).flatten(1)], 1)
    return (both_ways.logsumexp(-1) - positive).mean()


# ---- our parameters


class Loader:
    """Copies our parameters into a model's, and knows which are still to be set."""

    def __init__(self, model: Model):
        self.unset = {id(parameter) for parameter in model.parameters()}

    def put(self, parameter, value: np.ndarray) -> None:
        """Copies one array of the same shape."""
        shape = tuple(parameter.shape)
        if shape != value.shape:
            raise ValueError(f'expected a parameter of shape {shape}, got {value.shape}')
        with torch.no_grad():
            parameter.copy_(torch.tensor(value))
        self.unset.discard(id(parameter))

    def layer(self, module: nn.Module, params: dict) -> None:
        """Copies a matrix of any number of axes or a norm, with its bias."""
        if 'kernel' in params:
            matrix = params['kernel'].reshape(module.weight.shape[::-1])
            self.put(module.weight, matrix.T)
        else:
            self.put(module.weight, params['scale'])
        if 'bias' in params:
            self.put(module.bias, params['bias'].reshape(-1))

    def front(self, modality: str, front: nn.Module, params: dict) -> None:
        """Copies what makes tokens."""
        for name in ('patch', 'projection'):
            if name in params:
                self.layer(getattr(front, name), params[name])
        self.put(front.aggregate.token, params['agg'])
        if modality == 'text':
            self.put(front.table.weight, params['word_table'])
        if 'positions' not in params:
            return
        positions = params['positions']
        self.layer(front.norm, positions['norm'])
        values = []
        for axis in ('temporal', 'vertical', 'horizontal'):
            if f'{axis}_positions' in positions:
                values.append(positions[f'{axis}_positions'])
        tables = [front.positions] if modality == 'text' else front.positions
        for parameter, value in zip(tables, values, strict=True):
            self.put(parameter, value)

    def encoder(self, encoder: Encoder, params: dict) -> None:
        """Copies a stack of layers: ours has all layers in one array."""
        self.layer(encoder.norm, params['final_norm'])
        if 'relative_bias' in params:
            self.put(encoder.bias, params['relative_bias'])
        for i, block in enumerate(encoder.blocks):
            self.block(block, jax.tree.map(lambda x, i=i: x[i], params['layers']))

    def block(self, block: Block, params: dict) -> None:
        """Copies a layer: keys and values are one matrix there."""
        key, value = per_token(params['key']), per_token(params['value'])
        key_value = {}
        for name in key:
            key_value[name] = np.concatenate([key[name], value[name]], -1)
        self.layer(block.attention_norm, params['attention_norm'])
        self.layer(block.mlp_norm, params['mlp_norm'])
        self.layer(block.query, per_token(params['query']))
        self.layer(block.key_value, key_value)
        self.layer(block.out, params['out'])
        self.layer(block.mlp_in, params['mlp_in'])
        self.layer(block.mlp_out, params['mlp_out'])


def per_token(params: dict) -> dict:
    """A projection to heads as one to a vector: kernel [D, H·d], bias [H·d]."""
    flat = {'kernel': params['kernel'].reshape(len(params['kernel']), -1)}
    if 'bias' in params:
        flat['bias'] = params['bias'].reshape(-1)
    return flat


def load(model: Model, params: dict) -> None:
    """Sets all parameters of a model from ours.

    Raises:
        ValueError: a shape differs, or a parameter of the model was not set.
    """
    params = jax.tree.map(np.asarray, params)
    loader = Loader(model)
    for modality, front in model.fronts.items():
        loader.front(modality, front, params[f'fronts_{modality}'])
        encoder = params.get(f'encoders_{modality}') or params['shared_encoder']
        loader.encoder(model.encoders[modality], encoder)
        if modality in model.posts:
            loader.layer(model.posts[modality], params[f'posts_{modality}'])
    heads = {
        'video_hidden': model.video_va[0],
        'video_va_pre_norm': model.video_va[1],
        'video_va': model.video_va[3],
        'video_va_norm': model.video_va[4],
        'video_vat': model.video_vat[1],
        'video_vat_norm': model.video_vat[2],
        'audio_va': model.audio_va,
        'text_vat': model.text_vat,
    }
    for name, module in heads.items():
        loader.layer(module, params['head'][name])
    if loader.unset:
        raise ValueError(f'expected every parameter to be set, got {len(loader.unset)} left over')
