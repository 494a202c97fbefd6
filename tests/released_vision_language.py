"""The released ViLBERT and UNITER in NumPy, float64, by the names of their state dicts.

One pair at a time, without padding: words and regions that are masked are cut out before.
"""

import math

import numpy as np

EPS = 1e-12


def erf(x):
    return np.vectorize(math.erf)(x)


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


class State:
    """A state dict, some of whose modules are functions here."""

    def __init__(self, arrays, prefix=''):
        self.arrays = arrays
        self.prefix = prefix

    def at(self, name):
        return State(self.arrays, f'{self.prefix}{name}.')

    def __getitem__(self, name):
        return np.asarray(self.arrays[self.prefix + name], np.float64)

    def linear(self, name, x):
        return x @ self[f'{name}.weight'].T + self[f'{name}.bias']

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
        return x * self[f'{name}.weight'] + self[f'{name}.bias']


def attend(query, key, value, heads):
    """Dot-product attention of [N D] with [M D], head by head."""
    width = query.shape[1] // heads
    contexts = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[:, part] @ key[:, part].T / math.sqrt(width)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        contexts.append(weights @ value[:, part])
    return np.concatenate(contexts, 1)


def feed_forward(state, x, intermediate, output):
    hidden = gelu(state.linear(f'{intermediate}.dense', x))
    return state.norm(f'{output}.LayerNorm', x + state.linear(f'{output}.dense', hidden))


def layer(state, x, heads):
    own = state.at('attention.self')
    query, key, value = (own.linear(name, x) for name in ('query', 'key', 'value'))
    out = state.at('attention.output')
    x = out.norm('LayerNorm', x + out.linear('dense', attend(query, key, value, heads)))
    return feed_forward(state, x, 'intermediate', 'output')


def co_layer(state, regions, words, heads):
    both = state.at('biattention')
    query1, key1, value1 = (both.linear(f'{name}1', regions) for name in ('query', 'key', 'value'))
    query2, key2, value2 = (both.linear(f'{name}2', words) for name in ('query', 'key', 'value'))
    out = state.at('biOutput')
    for_words = out.linear('dense2', attend(query2, key1, value1, heads))
    for_regions = out.linear('dense1', attend(query1, key2, value2, heads))
    words = out.norm('LayerNorm2', words + for_words)
    regions = out.norm('LayerNorm1', regions + for_regions)
    return (
        feed_forward(state, regions, 'v_intermediate', 'v_output'),
        feed_forward(state, words, 't_intermediate', 't_output'),
    )


def text_embeddings(state, ids, types):
    x = state['word_embeddings.weight'][ids]
    x = x + state['position_embeddings.weight'][: len(ids)]
    return state.norm('LayerNorm', x + state['token_type_embeddings.weight'][types])


def transform(state, x):
    return state.norm('LayerNorm', gelu(state.linear('dense', x)))


def vilbert(arrays, sizes, ids, types, features, boxes):
    """All outputs of one pair, by the names of ours."""
    state = State(arrays)
    bert = state.at('bert')
    words = text_embeddings(bert.at('embeddings'), ids, types)
    images = bert.at('v_embeddings')
    regions = images.linear('image_embeddings', features)
    regions = images.norm('LayerNorm', regions + images.linear('image_location_embeddings', boxes))

    def text_layer(number, x):
        return layer(bert.at(f'encoder.layer.{number}'), x, sizes.text.heads)

    def image_layer(number, x):
        return layer(bert.at(f'encoder.v_layer.{number}'), x, sizes.image.heads)

    # tiny: text layers 0 1, co 0, text 2 and image 0, co 1, text 3 and image 1.
    words = text_layer(1, text_layer(0, words))
    regions, words = co_layer(bert.at('encoder.c_layer.0'), regions, words, sizes.co_heads)
    words, regions = text_layer(2, words), image_layer(0, regions)
    regions, words = co_layer(bert.at('encoder.c_layer.1'), regions, words, sizes.co_heads)
    words, regions = text_layer(3, words), image_layer(1, regions)

    pooled_words = np.maximum(bert.linear('t_pooler.dense', words[0]), 0)
    pooled_regions = np.maximum(bert.linear('v_pooler.dense', regions[0]), 0)
    joined = pooled_words * pooled_regions
    told = transform(state.at('cls.predictions.transform'), words)
    word_logits = told @ bert['embeddings.word_embeddings.weight'].T
    told = transform(state.at('cls.imagePredictions.transform'), regions)
    return {
        'words': words,
        'regions': regions,
        'pooled_words': pooled_words,
        'pooled_regions': pooled_regions,
        'joined': joined,
        'word_logits': word_logits + state['cls.predictions.bias'],
        'region_logits': state.linear('cls.imagePredictions.decoder', told),
        'match_logits': state.linear('cls.bi_seq_relationship', joined),
    }


def uniter(arrays, sizes, ids, types, features, boxes, is_hidden):
    """The same of UNITER."""
    state = State(arrays)
    model = state.at('uniter')
    words = text_embeddings(model.at('embeddings'), ids, types)
    images = model.at('img_embeddings')
    features = features + is_hidden[:, None] * images['mask_embedding.weight'][1]
    regions = images.norm('img_layer_norm', images.linear('img_linear', features))
    regions = regions + images.norm('pos_layer_norm', images.linear('pos_linear', boxes))
    regions = regions + model['embeddings.token_type_embeddings.weight'][1]
    x = np.concatenate([words, images.norm('LayerNorm', regions)])
    for number in range(sizes.layers.count):
        x = layer(model.at(f'encoder.layer.{number}'), x, sizes.layers.heads)
    words, regions = x[: len(ids)], x[len(ids) :]
    pooled = np.tanh(model.linear('pooler.dense', x[0]))

    told = transform(state.at('cls.predictions.transform'), words)
    word_logits = told @ model['embeddings.word_embeddings.weight'].T
    regress = state.at('feat_regress')
    told = regress.norm('net.2', gelu(regress.linear('net.0', regions)))
    region_features = told @ images['img_linear.weight'] + regress['bias']
    classes = state.at('region_classifier')
    told = classes.norm('net.2', gelu(classes.linear('net.0', regions)))
    return {
        'words': words,
        'regions': regions,
        'pooled': pooled,
        'word_logits': word_logits + state['cls.predictions.bias'],
        'region_features': region_features,
        'region_logits': classes.linear('net.3', told),
        'match_logits': state.linear('itm_output', pooled),
    }


# ---- state dicts


def _linear(name, inputs, outputs):
    return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}


def _norm(name, width):
    return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _text(prefix, sizes, width):
    return {
        f'{prefix}.embeddings.word_embeddings.weight': (sizes.vocabulary, width),
        f'{prefix}.embeddings.position_embeddings.weight': (sizes.positions, width),
        f'{prefix}.embeddings.token_type_embeddings.weight': (sizes.types, width),
        **_norm(f'{prefix}.embeddings.LayerNorm', width),
    }


def _word_head(sizes, width):
    return {
        'cls.predictions.bias': (sizes.vocabulary,),
        **_linear('cls.predictions.transform.dense', width, width),
        **_norm('cls.predictions.transform.LayerNorm', width),
        'cls.predictions.decoder.weight': (sizes.vocabulary, width),
    }


def _layer(name, width, mlp):
    shapes = {}
    for part in ('self.query', 'self.key', 'self.value', 'output.dense'):
        shapes |= _linear(f'{name}.attention.{part}', width, width)
    return {
        **shapes,
        **_norm(f'{name}.attention.output.LayerNorm', width),
        **_linear(f'{name}.intermediate.dense', width, mlp),
        **_linear(f'{name}.output.dense', mlp, width),
        **_norm(f'{name}.output.LayerNorm', width),
    }


def _co_layer(name, sizes):
    shapes = {}
    for number, letter, layers in ((1, 'v', sizes.image), (2, 't', sizes.text)):
        for part in ('query', 'key', 'value'):
            shapes |= _linear(f'{name}.biattention.{part}{number}', layers.width, sizes.co_width)
        for part in ('dense', 'q_dense'):
            shapes |= _linear(f'{name}.biOutput.{part}{number}', sizes.co_width, layers.width)
        shapes |= _norm(f'{name}.biOutput.LayerNorm{number}', layers.width)
        shapes |= _linear(f'{name}.{letter}_intermediate.dense', layers.width, layers.mlp)
        shapes |= _linear(f'{name}.{letter}_output.dense', layers.mlp, layers.width)
        shapes |= _norm(f'{name}.{letter}_output.LayerNorm', layers.width)
    return shapes


def vilbert_shapes(sizes):
    text, image = sizes.text, sizes.image
    shapes = _text('bert', sizes, text.width)
    shapes |= _linear('bert.v_embeddings.image_embeddings', sizes.feature_width, image.width)
    shapes |= _linear('bert.v_embeddings.image_location_embeddings', 5, image.width)
    shapes |= _norm('bert.v_embeddings.LayerNorm', image.width)
    for number in range(text.count):
        shapes |= _layer(f'bert.encoder.layer.{number}', text.width, text.mlp)
    for number in range(image.count):
        shapes |= _layer(f'bert.encoder.v_layer.{number}', image.width, image.mlp)
    for number in range(len(sizes.text_stops)):
        shapes |= _co_layer(f'bert.encoder.c_layer.{number}', sizes)
    shapes |= _linear('bert.t_pooler.dense', text.width, sizes.co_width)
    shapes |= _linear('bert.v_pooler.dense', image.width, sizes.co_width)
    shapes |= _word_head(sizes, text.width)
    shapes |= _linear('cls.bi_seq_relationship', sizes.co_width, 2)
    shapes |= _linear('cls.imagePredictions.transform.dense', image.width, image.width)
    shapes |= _norm('cls.imagePredictions.transform.LayerNorm', image.width)
    return shapes | _linear('cls.imagePredictions.decoder', image.width, sizes.targets)


def uniter_shapes(sizes):
    width = sizes.layers.width
    shapes = _text('uniter', sizes, width)
    images = 'uniter.img_embeddings'
    shapes[f'{images}.mask_embedding.weight'] = (2, sizes.feature_width)
    shapes |= _linear(f'{images}.img_linear', sizes.feature_width, width)
    shapes |= _linear(f'{images}.pos_linear', 7, width)
    for norm in ('img_layer_norm', 'pos_layer_norm', 'LayerNorm'):
        shapes |= _norm(f'{images}.{norm}', width)
    for number in range(sizes.layers.count):
        shapes |= _layer(f'uniter.encoder.layer.{number}', width, sizes.layers.mlp)
    shapes |= _linear('uniter.pooler.dense', width, width)
    shapes |= _word_head(sizes, width)
    shapes |= _linear('feat_regress.net.0', width, width)
    shapes |= _norm('feat_regress.net.2', width)
    shapes['feat_regress.weight'] = (width, sizes.feature_width)
    shapes['feat_regress.bias'] = (sizes.feature_width,)
    shapes |= _linear('region_classifier.net.0', width, width)
    shapes |= _norm('region_classifier.net.2', width)
    shapes |= _linear('region_classifier.net.3', width, sizes.classes)
    return shapes | _linear('itm_output', width, 2)


def bert_shapes(sizes, layers):
    """Hugging Face's BertForPreTraining."""
    shapes = _text('bert', sizes, layers.width)
    for number in range(layers.count):
        shapes |= _layer(f'bert.encoder.layer.{number}', layers.width, layers.mlp)
    shapes |= _linear('bert.pooler.dense', layers.width, layers.width)
    shapes |= _linear('cls.seq_relationship', layers.width, 2)
    return shapes | _word_head(sizes, layers.width)


TIED = {
    'cls.predictions.decoder.weight': '{}.embeddings.word_embeddings.weight',
    'feat_regress.weight': 'uniter.img_embeddings.img_linear.weight',
}


def draw(shapes, seed=0):
    """Noise of these shapes; norms around 1, tied variables equal, masking row 0 zero."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        value = 0.3 * rng.normal(size=shape)
        if name.endswith('.weight') and len(shape) == 1:
            value += 1
        arrays[name] = value.astype(np.float32)
    prefix = 'uniter' if 'itm_output.weight' in shapes else 'bert'
    for second, first in TIED.items():
        if second in arrays:
            arrays[second] = arrays[first.format(prefix)]
    if prefix == 'uniter':
        arrays['uniter.img_embeddings.mask_embedding.weight'][0] = 0
    return arrays
