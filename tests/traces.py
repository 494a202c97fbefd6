"""How often the programs of a training are traced."""

import chex

from vatt_jax.training import build, loop, train_step


def limit_step_to_one(monkeypatch, config, data):
    """All trainings of a test share one step, which fails when it is traced a second time.

    A second trace is a second compilation, of minutes with a large model.

    Args:
        monkeypatch: pytest's, which restores `loop.build`.
        config: of all the trainings.
        data: the data object of that config.
    """
    make = train_step.make

    def make_limited(*args):
        return chex.assert_max_traces(make(*args), n=1)

    chex.clear_trace_counter()
    with monkeypatch.context() as patch:
        patch.setattr(train_step, 'make', make_limited)
        # Not `loop.build`: the suite's conftest may have one that is traced already.
        built = build.build(config, data)

    def build_once(config, data):
        loop.resolve(config, data)
        return built

    monkeypatch.setattr(loop, 'build', build_once)
