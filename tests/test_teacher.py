"""The momentum copy of a model, or of a part of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_jax.objectives.memory import teacher as teachers


@pytest.fixture
def student():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        'nets_video': {'conv': {'kernel': draw(3, 4), 'bias': draw(4)}},
        'nets_audio': {'conv': {'kernel': draw(2, 4)}},
        'head': {'video': {'kernel': draw(4, 2)}},
    }


@pytest.mark.parametrize('momentum', [0.0, 0.9, 0.999])
def test_a_copy_follows_by_the_closed_form(student, momentum):
    """Of a student that stays at s: t_n = m^n t_0 + (1 - m^n) s."""
    start = jax.tree.map(lambda x: x + 1, student)
    followed = start
    for _ in range(20):
        followed = teachers.follow(followed, student, momentum)
    share = momentum**20
    expected = jax.tree.map(
        lambda t, s: share * np.float64(t) + (1 - share) * np.float64(s), start, student
    )
    chex.assert_trees_all_close(followed, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_that_equals_its_student_stays(student):
    """Bit by bit, for a momentum with which m x + (1 - m) x would round."""
    followed = teachers.follow(student, student, 0.999)
    chex.assert_trees_all_equal(followed, student)


def test_a_teacher_of_a_part_shares_the_rest(student):
    stats = {'nets_video': {'mean': jnp.zeros(4)}}
    teacher = teachers.create(student, stats, (r'^nets_video/', r'^head/video/'))
    assert set(teacher['params']) == {'nets_video', 'head'}
    moved = jax.tree.map(lambda x: 2 * x, student)
    params = teachers.follow(teacher['params'], moved, 0.75)
    variables = teachers.variables({**teacher, 'params': params}, moved)
    # 0.75 x + 0.25 · 2 x, and what there is no copy of.
    for name in ('nets_video', 'head'):
        expected = jax.tree.map(lambda x: 1.25 * x, student[name])
        chex.assert_trees_all_close(variables['params'][name], expected, rtol=1e-6)
    chex.assert_trees_all_equal(variables['params']['nets_audio'], moved['nets_audio'])
    chex.assert_trees_all_equal(variables['batch_stats'], stats)

    begun = teachers.begin(teacher, moved, {'nets_video': {'mean': jnp.ones(4)}})
    chex.assert_trees_all_equal_structs(begun, teacher)
    chex.assert_trees_all_equal(begun['params']['head'], moved['head'])
    assert begun['batch_stats']['nets_video']['mean'].all()


def test_heads_of_an_objective_follow_like_a_model():
    """`follow` takes any tree: the objective keeps a second copy, of its own parameters."""
    heads = {'model': {'w': jnp.ones(2)}, 'objective': {'w': jnp.zeros(2)}}
    target = {'model': {'w': jnp.zeros(2)}, 'objective': {'w': jnp.ones(2)}}
    followed = teachers.follow(heads, target, 0.5)
    np.testing.assert_allclose(followed['model']['w'], 0.5)
    np.testing.assert_allclose(followed['objective']['w'], 0.5)
