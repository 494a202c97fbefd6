"""Memory tables, draws of negatives and records that agree, against NumPy in float64."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.config import ConfigError
from vatt_jax.objectives.memory import agreement, negatives, table
from vatt_jax.parallel import sharding
from vatt_jax.performance import hlo
from vatt_jax.rng import Rng

MESHES = [{'replica': 8}, {'fsdp': 8}, {'replica': 4, 'fsdp': 2}, {'replica': 2, 'model': 4}]
RECORDS, WIDTH, CLIPS, ROWS = 5000, 8, 16, 40


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_table(num_records=RECORDS, width=WIDTH, seed=1):
    return nn.unbox(table.init(jax.random.key(seed), num_records, width))


@pytest.fixture(scope='module')
def queries_and_rows():
    """(memory [rows E], queries [B E], rows [B K])."""
    random = np.random.default_rng(0)
    queries = random.normal(size=(CLIPS, WIDTH)).astype(np.float32)
    rows = random.integers(0, RECORDS, (CLIPS, ROWS)).astype(np.int32)
    # The first and the last record, and one row twice.
    rows[0, :4] = 0, RECORDS - 1, 7, 7
    return make_table(), jnp.asarray(queries), jnp.asarray(rows)


# ---- Tables.


def test_rows_of_records_depend_on_the_key_and_their_number_alone():
    small, large = make_table(RECORDS), make_table(3 * RECORDS)
    assert len(small) == 6144
    assert len(large) == 15360
    np.testing.assert_array_equal(small[:RECORDS], large[:RECORDS])
    np.testing.assert_allclose(jnp.linalg.norm(large[: 3 * RECORDS], axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(small[RECORDS:], 0)
    # Of independent directions: means of so many coordinates are within 5 deviations of 0.
    deviation = (RECORDS * WIDTH) ** -0.5
    assert abs(float(small[:RECORDS].mean())) < 5 * deviation
    cosines = np.float64(small[: RECORDS - 1] * small[1:RECORDS]).sum(-1)
    assert abs(cosines.mean()) < 5 * deviation
    # As many rows of padding on every mesh, which all of these divide.
    for devices in (1, 2, 6, 8, 24, 64, 1024, 3072):
        assert table.num_rows(RECORDS) % devices == 0


def test_initial_table_is_equal_on_every_mesh():
    expected = make_table()
    for axes in MESHES:
        mesh = sharding.make_mesh(axes)
        boxed = jax.eval_shape(lambda: table.init(jax.random.key(1), RECORDS, WIDTH))
        layout = sharding.tree_shardings(boxed, mesh)
        assert layout.num_devices == 8
        made = jax.jit(make_table, out_shardings=layout)()
        # The same draws; their lengths may be summed in another order.
        np.testing.assert_allclose(made, expected, atol=2e-7)


def reference_scores(memory, queries, rows):
    """float64 [B K]."""
    return np.einsum('bke,be->bk', np.float64(memory)[rows], np.float64(queries))


def sum_of_sines(scores):
    """A loss whose derivative differs from score to score."""
    return jnp.sum(jnp.sin(3 * scores))


def reference_gradient(memory, queries, rows):
    """float64 [B E] of `sum_of_sines`."""
    slopes = 3 * np.cos(3 * reference_scores(memory, queries, rows))
    return np.einsum('bk,bke->be', slopes, np.float64(memory)[rows])


@pytest.mark.parametrize(
    'axes, block',
    # Blocks of one query; of three, which do not divide the 16; of all.
    [({'replica': 1}, 1), ({'replica': 1}, 1000), *((axes, 1000) for axes in MESHES)],
    ids=str,
)
def test_scores_and_their_gradients(queries_and_rows, axes, block, monkeypatch):
    monkeypatch.setattr(table, 'BLOCK', block)
    memory, queries, rows = queries_and_rows
    with jax.set_mesh(sharding.make_mesh(axes)):
        scores = jax.jit(lambda *inputs: table.scores(*inputs))(memory, queries, rows)
        gradient = jax.jit(
            jax.grad(lambda queries, *rest: sum_of_sines(table.scores(rest[0], queries, rest[1])))
        )(queries, memory, rows)
    np.testing.assert_allclose(scores, reference_scores(memory, queries, rows), atol=2e-6)
    expected = reference_gradient(memory, queries, rows)
    np.testing.assert_allclose(gradient, expected, atol=3e-5)


def test_dense_scores_are_the_definition(queries_and_rows):
    memory, queries, rows = queries_and_rows
    scores = table.dense_scores(memory, queries, rows)
    np.testing.assert_allclose(scores, reference_scores(memory, queries, rows), atol=2e-6)
    gradient = jax.grad(lambda q: sum_of_sines(table.dense_scores(memory, q, rows)))(queries)
    expected = reference_gradient(memory, queries, rows)
    np.testing.assert_allclose(gradient, expected, atol=3e-5)


def test_the_memory_carries_no_gradient(queries_and_rows):
    memory, queries, rows = queries_and_rows
    gradient = jax.grad(lambda m: sum_of_sines(table.scores(m, queries, rows)))(memory)
    np.testing.assert_array_equal(gradient, 0)


def test_rows_outside_of_the_table_score_0(queries_and_rows):
    memory, queries, rows = queries_and_rows
    rows = rows.at[:, 0].set(-1).at[:, 1].set(len(memory))
    for axes in ({'replica': 1}, {'replica': 8}):
        with jax.set_mesh(sharding.make_mesh(axes)):
            scores = jax.jit(table.scores)(memory, queries, rows)
        np.testing.assert_array_equal(scores[:, :2], 0)
        assert np.all(np.asarray(scores[:, 2:]) != 0)


def test_no_vectors_of_rows_cross_the_network(queries_and_rows):
    """Forwards and backwards, nothing larger moves than queries, row numbers and scores."""
    memory, queries, rows = queries_and_rows
    mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2})
    batch = sharding.batch_sharding(mesh)

    def loss(queries, memory, rows):
        return sum_of_sines(table.scores(memory, queries, rows))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss), in_shardings=batch)
        compiled = program.lower(queries, memory, rows).compile()
    sizes = [collective.bytes for collective in hlo.read(compiled.as_text()).collectives]
    assert sizes
    assert max(sizes) <= 4 * CLIPS * max(ROWS, WIDTH)


def test_a_mesh_that_does_not_divide_the_rows_is_refused():
    with jax.set_mesh(sharding.make_mesh({'replica': 7})):
        with pytest.raises(ConfigError, match='divide the 6144 rows of a memory, got 7'):
            jax.eval_shape(table.scores, make_table(), jnp.ones((7, WIDTH)), jnp.ones((7, 1), int))


def reference_write(memory, records, vectors, valid, momentum):
    """float64, record by record."""
    memory = np.float64(memory)
    written = memory.copy()
    for record in set(records[valid].tolist()):
        new = np.float64(vectors)[valid & (records == record)].mean(0)
        mixed = momentum * memory[record] + (1 - momentum) * new
        written[record] = mixed / np.linalg.norm(mixed)
    return written


def writes():
    """(records [B], unit vectors [B E], valid [B]): some twice and thrice, some not valid."""
    random = np.random.default_rng(1)
    records = np.array([0, 1, 7, 7, 7, RECORDS - 1, 3000, 768, 767, 768, 5, 6, 6, 9, 9, 4999])
    vectors = random.normal(size=(CLIPS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    valid = np.ones(CLIPS, bool)
    # 7: two of three count; 9: one of two; 5: none.
    valid[[3, 10, 14]] = False
    vectors[10] = np.nan
    return jnp.asarray(records), jnp.asarray(vectors), jnp.asarray(valid)


@pytest.mark.parametrize('axes', [{'replica': 1}, *MESHES], ids=str)
def test_write(axes):
    memory = make_table()
    inputs = writes()
    with jax.set_mesh(sharding.make_mesh(axes)):
        written = jax.jit(lambda *inputs: table.write(*inputs, 0.3))(memory, *inputs)
    records, vectors, valid = (np.asarray(x) for x in inputs)
    expected = reference_write(memory, records, vectors, valid, 0.3)
    np.testing.assert_allclose(written, expected, atol=2e-7)
    untouched = np.setdiff1d(np.arange(len(memory)), records[valid])
    np.testing.assert_array_equal(np.asarray(written)[untouched], np.asarray(memory)[untouched])


def test_the_order_of_clips_of_one_record_is_irrelevant():
    memory = make_table()
    records, vectors, valid = writes()
    write = jax.jit(table.write, static_argnums=4)
    written = write(memory, records, vectors, valid, 0.5)
    for order in (np.arange(CLIPS)[::-1], np.random.default_rng(2).permutation(CLIPS)):
        again = write(memory, records[order], vectors[order], valid[order], 0.5)
        np.testing.assert_allclose(again, written, atol=2e-7)


def test_scoring_and_writing_copy_no_table():
    """Beside the table, which is donated, there is memory for the batch alone."""
    records, vectors, valid = writes()
    rows = jnp.zeros((CLIPS, ROWS), jnp.int32)
    memory = make_table(100_000)

    def step(memory, vectors):
        scores = table.scores(memory, vectors, rows)
        is_written = valid & jnp.isfinite(scores.sum())
        return table.write(memory, records, vectors, is_written, 0.5), scores

    compiled = jax.jit(step, donate_argnums=0).lower(memory, vectors).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < memory.nbytes / 4


# ---- Negatives.


def test_scale_is_the_product_of_64_bits():
    """Integers of any size in Python: random ones, of which many carry, and the extremes."""
    random = np.random.default_rng(0)
    numbers = [int(x) for x in random.integers(0, 2**64, 2000, np.uint64)]
    bounds = [int(x) for x in random.integers(1, 2**31, 2000)]
    edges = list(itertools.product((0, 1, 2**32 - 1, 2**32, 2**64 - 1), (1, 3, 2**31 - 1, 2**31)))
    numbers += [x for x, _ in edges]
    bounds += [bound for _, bound in edges]
    high = jnp.asarray([x >> 32 for x in numbers], jnp.uint32)
    low = jnp.asarray([x & 0xFFFFFFFF for x in numbers], jnp.uint32)
    found = negatives.scale(high, low, jnp.asarray(bounds, jnp.uint32))
    assert found.tolist() == [x * bound >> 64 for x, bound in zip(numbers, bounds, strict=True)]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_ranks_are_the_records_that_are_not_excluded(data):
    """Each rank is another allowed record, all of them: uniform ranks are uniform records."""
    size = data.draw(st.integers(6, 40))
    excluded = data.draw(st.lists(st.integers(-2, size + 1), min_size=5, max_size=5))
    ordered, num_excluded = negatives._distinct(jnp.asarray([excluded]), jnp.uint32(size))
    allowed = [record for record in range(size) if record not in excluded]
    assert int(num_excluded[0]) == size - len(allowed)
    ranks = jnp.arange(40, dtype=jnp.uint32)[None]
    records = negatives.record_of_rank(ranks, ordered)
    assert records[0, : len(allowed)].tolist() == allowed


def draw_for(examples, num_records, count, excluded, step=0):
    rng = Rng.create(3, step, np.asarray(examples)).at('negatives')
    draw = jax.jit(negatives.draw, static_argnums=2)
    return np.asarray(draw(rng, num_records, count, jnp.asarray(excluded)))


def test_draws_are_uniform_over_what_is_not_excluded():
    excluded = np.array([[2, 5, 5, -1]] * 50)
    drawn = draw_for(np.arange(50), 9, 400, excluded)
    counts = np.bincount(drawn.ravel(), minlength=9)
    assert counts[[2, 5]].tolist() == [0, 0]
    expected = drawn.size / 7
    statistic = ((np.delete(counts, [2, 5]) - expected) ** 2 / expected).sum()
    assert statistic < 22.5  # exceeded with probability 0.001 (χ² of 6 degrees)
    # With replacement: 400 draws of 7 records.
    assert len(set(drawn[0].tolist())) == 7


def test_pairs_of_draws_are_uniform_too():
    drawn = draw_for(np.arange(2000), 4, 2, np.full((2000, 1), 3))
    counts = [np.sum((drawn == pair).all(1)) for pair in itertools.product(range(3), repeat=2)]
    expected = 2000 / 9
    assert ((np.array(counts) - expected) ** 2 / expected).sum() < 26.1  # χ² of 8 degrees, 0.001


def test_large_training_sets_are_drawn_to_the_end():
    largest = 2**31 - 1
    drawn = draw_for(np.arange(64), largest, 1024, np.full((64, 1), largest - 1))
    assert drawn.min() >= 0
    assert drawn.max() < largest - 1
    assert abs(drawn.mean() / largest - 0.5) < 0.01
    assert drawn.max() > 0.999 * largest
    # The lower bits as well.
    assert abs((drawn % 2).mean() - 0.5) < 0.02


def test_draws_belong_to_the_example_and_the_step():
    examples = np.arange(16)
    excluded = np.arange(16)[:, None]
    drawn = draw_for(examples, 1000, 20, excluded)
    for part in (slice(0, None, 4), slice(8, 12)):
        alone = draw_for(examples[part], 1000, 20, excluded[part])
        np.testing.assert_array_equal(alone, drawn[part])
    assert (draw_for(examples, 1000, 20, excluded, step=1) != drawn).mean() > 0.9
    assert (drawn[0] != drawn[1]).mean() > 0.9


# ---- Records that agree.


def reference_neighbours(tables, count):
    """(agreement, records), each [M count], from all pairs in float64."""
    cosines = [np.float64(rows) @ np.float64(rows).T for rows in tables]
    least = np.minimum.reduce(cosines)
    np.fill_diagonal(least, -np.inf)
    # Stable: of equal ones the lower number comes first.
    records = np.argsort(-least, axis=1, kind='stable')[:, :count]
    return np.take_along_axis(least, records, 1), records


@pytest.mark.parametrize('axes', [{'replica': 1}, MESHES[0], MESHES[2]], ids=str)
def test_neighbours_are_those_of_all_pairs(axes, monkeypatch):
    num_records, count = 700, 5
    monkeypatch.setattr(agreement, 'QUERIES', 100)
    monkeypatch.setattr(agreement, 'KEYS', 200)
    tables = [make_table(num_records, WIDTH, i) for i in range(2)]
    # Three records that are one and the same: they agree fully, the lower numbers first.
    for same in (300, 699):
        tables = [rows.at[same].set(rows[10]) for rows in tables]
    with jax.set_mesh(sharding.make_mesh(axes)):
        search = jax.jit(agreement.find_neighbours, static_argnums=(1, 2))
        found = jax.tree.map(np.asarray, search(tables, num_records, count))
    cosines, records = reference_neighbours([rows[:num_records] for rows in tables], count)
    np.testing.assert_allclose(found.agreement[:num_records], cosines, atol=1e-6)
    # float32 may exchange neighbours that are equally near.
    is_same = found.records[:num_records] == records
    assert is_same.mean() > 0.999
    assert found.records[10, :2].tolist() == [300, 699]
    assert found.records[699, :2].tolist() == [10, 300]
    assert (found.records[:num_records] != np.arange(num_records)[:, None]).all()
    assert found.records[:num_records].max() < num_records


def test_neighbours_must_agree_in_every_memory():
    """One that is the nearest by far in one memory alone is none; padding never is."""
    tables = [make_table(50, 32, i) for i in range(2)]
    tables[0] = tables[0].at[1].set(tables[0][0])
    # All others are asked for: those of negative agreement come before no padding, which is 0.
    found = jax.jit(agreement.find_neighbours, static_argnums=(1, 2))(tables, 50, 49)
    chex.assert_shape(found.records, (len(tables[0]), 49))
    cosines, records = reference_neighbours([rows[:50] for rows in tables], 49)
    np.testing.assert_allclose(found.agreement[:50], cosines, atol=1e-6)
    np.testing.assert_array_equal(found.records[:50], records)
    assert records[0, 0] != 1
