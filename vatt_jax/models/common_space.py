"""Common spaces: which modality projects into which space, through what.

A graph is a table, not code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import LARGEST_COUNT, ConfigError, choose
from vatt_jax.models.layers import BatchNorm, Dense

Step = tuple[str, ...]
Path = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """How the modalities reach their common spaces.

    A step is one of

        ('dense' | 'dense_bias', name, space or hidden layer whose width it has)
        ('bn', name)
        ('relu',)
        ('emit', space)   the value so far is the modality's embedding in that space
        ('pooled',)       begin anew at the tower's vector
        ('evaluation',)   what follows is left out in training

    Layers of equal names share their parameters.

    Attributes:
        paths: modality -> its steps in order, from the pooled vector of its tower.
        norm: of all batch norms, an entry of layers.NORMS.
        init: of all dense kernels, an entry of layers.INITS.
        hidden: names of widths that are of no space.
    """

    paths: Mapping[str, Path]
    norm: str = 'plain'
    init: str = 'glorot'
    hidden: tuple[str, ...] = ()

    def spaces(self) -> list[str]:
        """Names of the graph's spaces, each once, in the order of the paths."""
        names: list[str] = []
        for steps in self.paths.values():
            for step in steps:
                if step[0] == 'emit' and step[1] not in names:
                    names.append(step[1])
        return names


def mlp(name: str, space: str) -> Path:
    """MMV's head of video: two layers, batch norm after each, ReLU between."""
    return (
        # The norm behind cancels this bias; MMV's released parameters include it all the same.
        ('dense_bias', f'{name}_hidden', space),
        ('bn', f'{name}_hidden_norm'),
        ('relu',),
        ('dense', name, space),
        ('bn', f'{name}_norm'),
        ('emit', space),
    )


def linear(name: str, space: str) -> Path:
    """One dense layer into a space."""
    return (('dense_bias', name, space), ('emit', space))


def matrix(name: str, space: str) -> Path:
    """One matrix into a space."""
    return (('dense', name, space), ('emit', space))


def projection(modality: str, space: str, hidden_layers: int, norm: bool) -> Path:
    """A head of views of one modality: hidden layers of one width, and a last one without norm.

    Args:
        modality: whose embeddings are projected.
        space: that holds them.
        hidden_layers: their number.
        norm: whether each has a batch norm.
    """
    steps: list[Step] = []
    for number in range(hidden_layers):
        name = f'{modality}_hidden_{number}'
        steps.append(('dense_bias', name, 'hidden'))
        if norm:
            steps.append(('bn', f'{name}_norm'))
        steps.append(('relu',))
    return (*steps, *linear(f'{modality}_projection', space))


def projections(hidden_layers: int) -> Graph:
    """SimCLR's heads: a space for the views of each modality, which has its name."""
    paths = {}
    for modality in ('video', 'audio'):
        paths[modality] = projection(modality, modality, hidden_layers, norm=True)
    return Graph(paths, hidden=('hidden',))


def projections_of_each(
    modalities: tuple[str, ...], hidden_layers: int = 1, norm: bool = False
) -> Graph:
    """A head of each modality by itself, into one space. As they are: MoCo v2's and CoCLR's."""
    paths = {}
    for modality in modalities:
        paths[modality] = projection(modality, 'projection', hidden_layers, norm)
    return Graph(paths, hidden=('hidden',))


def perceptron(name: str, space: str) -> Path:
    """AVID's head: two hidden layers and a last one, ReLU between, no norms."""
    return (
        ('dense_bias', f'{name}_hidden_1', 'hidden'),
        ('relu',),
        ('dense_bias', f'{name}_hidden_2', 'hidden'),
        ('relu',),
        ('dense_bias', name, space),
        ('emit', space),
    )


def joint(modality: str) -> Path:
    """VATT's head of a modality where one space holds all of them."""
    return (
        ('relu',),
        ('dense', f'{modality}_joint', 'joint'),
        ('bn', f'{modality}_norm'),
        ('emit', 'joint'),
    )


def fine_and_coarse(between: Path) -> Graph:
    """MMV's FAC: one map from the fine space to the coarse one for video and audio.

    Its batch norm sees video alone in training, so the path of audio goes on in evaluation only.

    Args:
        between: steps between the fine space and that map.
    """
    coarse = (
        *between,
        ('dense_bias', 'va_to_vat', 'vat'),
        ('bn', 'va_to_vat_norm'),
        ('emit', 'vat'),
    )
    paths = {
        'video': (*mlp('video_va', 'va'), *coarse),
        # The same names as on video's path, so audio runs through the layers trained on video.
        'audio': (*linear('audio_va', 'va'), ('evaluation',), *coarse),
        'text': linear('text_vat', 'vat'),
    }
    return Graph(paths, norm='debiased', init='fan_in')


GRAPHS = {
    # VATT's fine and coarse: video-audio fine, video-text coarse on top of it (VATT's paper;
    # official `fac` head).
    'fac': Graph(
        {
            'video': (
                ('dense', 'video_hidden', 'va'),
                ('bn', 'video_va_pre_norm'),
                ('relu',),
                ('dense', 'video_va', 'va'),
                ('bn', 'video_va_norm'),
                ('emit', 'va'),
                ('relu',),
                ('dense', 'video_vat', 'vat'),
                ('bn', 'video_vat_norm'),
                ('emit', 'vat'),
            ),
            'audio': linear('audio_va', 'va'),
            'text': linear('text_vat', 'vat'),
        }
    ),
    # One space for all (official `joint` head).
    'joint': Graph(
        {
            'video': joint('video'),
            'flow': joint('flow'),
            'audio': joint('audio'),
            'text': joint('text'),
        }
    ),
    # MMV's (its paper). Shared: one space for all. Disjoint: a space for each pair, with
    # heads of its own.
    'mmv_shared': Graph(
        {
            'video': mlp('video_joint', 'joint'),
            'audio': linear('audio_joint', 'joint'),
            'text': linear('text_joint', 'joint'),
        },
        norm='debiased',
        init='fan_in',
    ),
    'mmv_disjoint': Graph(
        {
            'video': (*mlp('video_va', 'va'), ('pooled',), *mlp('video_vt', 'vt')),
            'audio': (*linear('audio_va', 'va'), ('pooled',), *linear('audio_at', 'at')),
            'text': (*linear('text_vt', 'vt'), ('pooled',), *linear('text_at', 'at')),
        },
        norm='debiased',
        init='fan_in',
    ),
    # Between the fine and the coarse space: nothing, ReLU (released), batch norm and ReLU.
    'mmv_fac': fine_and_coarse(()),
    'mmv_fac_relu': fine_and_coarse((('relu',),)),
    'mmv_fac_bnrelu': fine_and_coarse((('bn', 'va_norm'), ('relu',))),
    # Views of one modality. SimCLR: one hidden layer; CVRL's released code: three.
    'simclr': projections(hidden_layers=1),
    'cvrl': projections(hidden_layers=3),
    # A projection of each modality by itself (CoCLR).
    'projection': projections_of_each(('video', 'flow', 'audio', 'text')),
    # LeJEPA's projector.
    'lejepa': projections_of_each(('video', 'flow', 'audio'), hidden_layers=2, norm=True),
    # One linear layer from each of video and audio (AVTS: its networks end in one).
    'linear': Graph({'video': linear('video_va', 'va'), 'audio': linear('audio_va', 'va')}),
    # AVID's: one space, a head for each modality.
    'avid': Graph(
        {'video': perceptron('video_va', 'va'), 'audio': perceptron('audio_va', 'va')},
        init='torch',
        hidden=('hidden',),
    ),
    # CLIP's: one matrix from each of picture and sentence; of its ResNets the picture's, the last
    # of their attention pooling, has a bias. SigLIP's picture is in the space as it is pooled.
    # Sound comes to such a space later (configs/clip_video.py).
    'clip': Graph(
        {
            'video': matrix('video_vt', 'vt'),
            'text': matrix('text_vt', 'vt'),
            'audio': linear('audio_vt', 'vt'),
        },
        init='normal',
    ),
    'clip_resnet': Graph(
        {
            'video': linear('video_vt', 'vt'),
            'text': matrix('text_vt', 'vt'),
            'audio': linear('audio_vt', 'vt'),
        },
        init='normal',
    ),
    'siglip': Graph(
        {
            'video': (('emit', 'vt'),),
            'text': linear('text_vt', 'vt'),
            'audio': linear('audio_vt', 'vt'),
        },
        init='normal',
    ),
    # Encoders alone (fine-tuning).
    'none': Graph({}),
}


class CommonSpaces(nn.Module):
    """Projections of pooled vectors into common spaces.

    Attributes:
        config: {'name': entry of GRAPHS, <space>: width, …}. A space without a width is left out,
            with all that leads to it alone. Graphs with hidden layers have their widths too.
    """

    config: Mapping[str, Any]

    @nn.compact
    def __call__(
        self, pooled: Mapping[str, jax.Array], valid: Mapping[str, Any], train: bool
    ) -> dict[str, dict[str, jax.Array]]:
        """Project every stream along its modality's path.

        Streams of one modality share parameters and, in training, batch statistics of one pass over
        all of them.

        Args:
            pooled: {stream: [B D], for text [B K D]}.
            valid: {stream: bool [B]}, the rows that count in batch statistics.
            train: whether batch norms take statistics of the batch.

        Returns:
            {space: {stream: float32 [B E], for text [B K E]}}, un-normalised.
        """
        graph = GRAPHS[choose(self.config['name'], GRAPHS, 'config.model.head.name')]
        # Flax refuses a second submodule of one name within a call, hence the dict.
        layers: dict[str, Any] = {}  # layers of the same name are made once
        spaces: dict[str, dict[str, jax.Array]] = {}
        for modality, steps in paths(graph, self.config).items():
            streams = [name for name in pooled if name.split('.')[0] == modality]
            if not streams:
                continue
            # All views in one pass: one set of batch statistics, one update of the running ones.
            leading = [pooled[name].shape[:-1] for name in streams]  # (B,), or (B, K) for text
            row_valid = [_valid_rows(valid[name], shape) for name, shape in zip(streams, leading)]
            start = jnp.concatenate(
                [pooled[name].reshape(-1, pooled[name].shape[-1]) for name in streams]
            )  # [R D]
            # Padded sentences of a valid clip are among the rows that count.
            weight = jnp.concatenate(row_valid)  # [R]
            x = start  # [R D]
            for step in steps:
                kind = step[0]
                if kind in ('dense', 'dense_bias'):
                    _, name, space = step
                    if name not in layers:
                        # Heads compute in float32, Dense's default, whatever the towers' type.
                        layers[name] = Dense(
                            features=self.config[space],
                            # FSDP splits the input width alone: that of a space is never split.
                            axes=('hidden', None),
                            bias=kind == 'dense_bias',
                            init=graph.init,
                            name=name,
                        )
                    x = layers[name](x)
                elif kind == 'bn':
                    name = step[1]
                    if name not in layers:
                        layers[name] = BatchNorm(graph.norm, name=name)
                    x = layers[name](x, weight, train)  # [R E]
                elif kind == 'relu':
                    x = jax.nn.relu(x)
                elif kind == 'pooled':
                    x = start
                elif kind == 'emit':
                    # The path goes on from here: a coarser space is reached through this embedding.
                    members = spaces.setdefault(step[1], {})
                    members.update(_split_streams(x, streams, leading))
                elif train:  # 'evaluation': the rest of the path is left out
                    break
        return spaces


def _valid_rows(valid: Any, leading: tuple[int, ...]) -> jax.Array:
    """bool [B] -> bool [R]: what holds for a clip holds for each of its sentences."""
    expanded = valid.reshape(valid.shape + (1,) * (len(leading) - 1))  # [B] or [B 1]
    return jnp.broadcast_to(expanded, leading).reshape(-1)


def _split_streams(
    x: jax.Array, streams: list[str], leading: list[tuple[int, ...]]
) -> dict[str, jax.Array]:
    """Cut the rows [R E] of all streams into {stream: float32 [B E] or [B K E]}."""
    embeddings = {}
    begin = 0
    for name, shape in zip(streams, leading):
        end = begin + math.prod(shape)
        embeddings[name] = x[begin:end].reshape(*shape, -1).astype(jnp.float32)
        begin = end
    return embeddings


def paths(graph: Graph, config: Mapping[str, Any]) -> dict[str, list[Step]]:
    """The graph's paths without what leads to no space that has a width.

    Args:
        graph: the whole graph.
        config: `config.model.head`, see CommonSpaces.

    Returns:
        {modality: steps}.

    Raises:
        ConfigError: for fields other than spaces, for no space at all, and where a space is reached
            through one that has no width.
    """
    _check_widths(graph, config)
    pruned = {}
    for modality, steps in graph.paths.items():
        pruned[modality] = _prune(steps, config)
        for step in pruned[modality]:
            # A layer has the width of its space, which may be missing: vat lies behind va.
            if step[0].startswith('dense') and step[2] not in config:
                raise ConfigError(
                    f'config.model.head.{step[2]} is missing: {modality} reaches other spaces of '
                    f'{config["name"]!r} through that one'
                )
    return pruned


def _check_widths(graph: Graph, config: Mapping[str, Any]) -> None:
    """Check that the head's fields are widths of spaces of the graph."""
    known = graph.spaces()
    if not known:
        # Without spaces, widths left over from another graph mean nothing.
        return
    widths = [*known, *graph.hidden]
    for field, width in config.items():
        if field == 'name':
            continue
        if field not in widths or not isinstance(width, int) or not 1 <= width <= LARGEST_COUNT:
            raise ConfigError(
                f'config.model.head.{field}={width!r}: the graph {config["name"]!r} has the spaces '
                f'{", ".join(widths)}; give those that you need a positive width'
            )
    if not any(space in config for space in known):
        raise ConfigError(
            f'config.model.head has no width for any space of the graph {config["name"]!r}; '
            f'it has {", ".join(known)}'
        )


def _prune(steps: Path, config: Mapping[str, Any]) -> list[Step]:
    """The steps of a path up to the last space of each branch that has a width."""
    # Each branch starts at the tower's vector, so one can be cut without touching the others.
    branches: list[list[Step]] = [[]]
    for step in steps:
        if step[0] == 'pooled':
            branches.append([])
        branches[-1].append(step)

    remaining: list[Step] = []
    for branch in branches:
        # Steps behind the last embedding in use would be parameters that get no gradient.
        end = 0
        for i, step in enumerate(branch):
            if step[0] == 'emit' and step[1] in config:
                end = i + 1
        for step in branch[:end]:
            if step[0] != 'emit' or step[1] in config:
                remaining.append(step)
    return remaining
