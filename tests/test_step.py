"""`fit/step`, `fit/loop`: a loop that a user drives, and that of `train`."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same_bits

import gapjax
from gapjax import parallel
from gapjax.fit import loop
from gapjax.fit.step import init_state, run_steps

FAST = gapjax.adam(5e-2)


def _executor(linear):
    return loop.Executor(
        [gapjax.data_source(linear.images)],
        vae=linear.vae, optimizer=FAST, batch_size=20, objective=gapjax.elbo,
    )  # fmt: skip


def _start(linear):
    state = init_state(linear.wrong, jax.random.key(0), FAST)
    return loop.Progress(state, None, loop.Curve(), 0.0, 0)


def test_a_loop_of_ones_own_computes_what_train_computes(linear):
    """20 examples in batches of 8, so the last of three steps has 4."""
    source = gapjax.data_source(linear.images)
    kernel = gapjax.kernel(linear.vae, source, FAST, batch_size=8)
    state, infos = kernel.init(linear.wrong, jax.random.key(0)), []
    for _ in range(6):
        state, info = kernel.step(state)
        infos.append(jax.device_get(info))
    assert [int(info.num_examples) for info in infos] == [8, 8, 4] * 2
    assert all(info.is_finite for info in infos)
    assert_same_bits(kernel.init(linear.wrong, jax.random.key(0)), _start(linear).state)

    trained, curve = gapjax.train(
        linear.vae, source, state=_start(linear).state, num_epochs=2, batch_size=8, optimizer=FAST
    )
    assert int(state.step) == int(trained.step) == 6
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(trained.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    nats = np.reshape([info.objective for info in infos], (2, 3)).sum(1) / 20
    np.testing.assert_allclose(gapjax.bits_per_dim(nats, (6,)), curve.loss_bpd, rtol=1e-5)


def test_a_step_is_pure_and_can_be_scanned(linear):
    source = gapjax.data_source(linear.images)
    init, step = gapjax.kernel(linear.vae, source, FAST, batch_size=20)
    state = init(linear.wrong, jax.random.key(0))
    first, _ = step(state)
    again, _ = step(state)
    assert_same_bits(first, again)
    scanned, infos = jax.lax.scan(lambda carry, _: step(carry), state, length=2)
    assert infos.objective.shape == (2,)
    for ours, theirs in zip(
        jax.tree.leaves(scanned.params), jax.tree.leaves(step(first)[0].params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_from_the_midst_of_an_epoch_is_that_of_the_examples_since(linear):
    """20 examples in steps of 8, 8 and 4, of which `train` is given the state after the first."""
    source = gapjax.data_source(linear.images)
    init, step = gapjax.kernel(linear.vae, source, FAST, batch_size=8)
    state, infos = init(linear.wrong, jax.random.key(0)), []
    for _ in range(6):
        state, info = step(state)
        infos.append(float(info.objective))
        if len(infos) == 1:
            first = jax.tree.map(jnp.copy, state)
    options = {"num_epochs": 2, "batch_size": 8, "optimizer": FAST}
    kept = []
    _, curve = gapjax.train(linear.vae, source, state=first, on_chunk=kept.append, **options)
    bpd = lambda nats, number: gapjax.bits_per_dim(nats / number, (6,))
    expected = [bpd(sum(infos[1:3]), 12), bpd(sum(infos[3:]), 20)]
    np.testing.assert_allclose(curve.loss_bpd, expected, rtol=1e-5)
    assert [progress.skipped for progress in kept] == [0, 0]
    # A `Progress` knows what came before, so that its mean is over the whole epoch.
    progress = loop.Progress(first, None, loop.Curve(), infos[0], 0)
    _, curve = gapjax.train(linear.vae, source, resume=progress, **options)
    np.testing.assert_allclose(curve.loss_bpd[0], bpd(sum(infos[:3]), 20), rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StrictSource:
    """A source that knows its positions, and no others; keys make it blind, too."""

    images: jax.Array
    num_examples = property(lambda self: len(self.images))

    def begin_epoch(self, rng_key):
        return rng_key

    def draw(self, plan, rng_key, position):
        return jnp.where(position < self.num_examples, self.images[position], jnp.nan)


@pytest.mark.parametrize("count", [1, 3])
def test_padding_is_an_example_of_the_epoch(linear, count):
    """20 examples in steps of 8, 8 and 4 on devices that do not divide 8."""
    devices = jax.devices()[:count]
    options = {"num_epochs": 1, "batch_size": 8, "optimizer": FAST, "devices": devices}
    start = lambda: init_state(linear.wrong, jax.random.key(0), FAST)
    state, curve = gapjax.train(
        linear.vae, StrictSource(jnp.asarray(linear.images)), state=start(), **options
    )
    assert int(state.step) == 3 and np.isfinite(curve.loss_bpd[0])


def test_a_kernel_checks_its_batch_size(linear):
    with pytest.raises(ValueError, match=r"batch_size is 21.* 20 examples"):
        gapjax.kernel(linear.vae, gapjax.data_source(linear.images), FAST, batch_size=21)


def test_the_loop_computes_nothing_ahead(linear):
    """Whoever looks at it between two calls finds the state after the first."""
    executor, calls, steps, epochs = _executor(linear), [], [], []
    run = executor.run
    executor.run = lambda *args: calls.append(args[2]) or run(*args)

    def on_chunk(members):
        steps.append((len(calls), int(members[0].state.step)))
        assert epochs[-1] == (len(steps), members[0].curve.loss_bpd[-1])

    on_epoch = lambda *epoch: epochs.append(epoch)
    (progress,) = loop.run_members(
        executor, [lambda: _start(linear)], 3, loop.Measuring([None]), on_epoch, on_chunk
    )
    assert calls == [1, 1, 1] and steps == [(1, 1), (2, 2), (3, 3)]
    assert progress.curve.loss_bpd == tuple(bpd for _, bpd in epochs)
    assert int(progress.state.step) == 3


@pytest.mark.parametrize("num_members", [1, 2])
def test_progress_that_was_kept_does_not_change(linear, num_members):
    """But for the arrays of its state, which the next call uses up."""
    kept, copies = [], []

    def on_chunk(members):
        kept.append([each._replace(state=None) for each in members])
        copies.append(jax.tree.map(lambda leaf: np.array(leaf), kept[-1]))

    source = gapjax.data_source(linear.images)
    members = [
        gapjax.Member(linear.wrong, source, jax.random.key(number), lambda params: 1.0)
        for number in range(num_members)
    ]
    refits = gapjax.refit_members(
        linear.vae, members, num_epochs=3, batch_size=20, optimizer=FAST, monitor_every=1,
        until=gapjax.Convergence(num_decays=9), on_chunk=on_chunk,
    )  # fmt: skip
    assert len(kept) == 3
    for now, then in zip(kept, copies, strict=True):
        assert_same_bits(jax.tree.map(lambda leaf: np.array(leaf), now), then)
    assert [each[0].curve.epoch for each in kept] == [(1,), (1, 2), (1, 2, 3)]
    assert [each[0].plateaus for each in kept] == [1, 2, 3]
    assert kept[-1][0].curve == refits[0].curve


def test_a_resumed_run_leaves_what_it_was_given(linear):
    """Also a curve of lists, as JSON gives it back."""
    given = _start(linear)._replace(curve=loop.Curve([1], [2.0], [], []))
    start = given._replace(state=given.state._replace(step=jnp.int32(1)))
    _, curve = gapjax.train(
        linear.vae, gapjax.data_source(linear.images), resume=start, num_epochs=2, batch_size=20,
        optimizer=FAST,
    )  # fmt: skip
    assert curve.epoch == (1, 2) and curve.loss_bpd[0] == 2.0
    assert given.curve == ([1], [2.0], [], [])


def test_optimizers_of_finished_refits_are_freed(linear):
    """Programs are kept for a bounded number of them; making one compiles nothing."""
    alive = []
    for _ in range(2 * parallel._MAX_PROGRAMS):
        inner = optax.sgd(1e-3)
        alive.append(weakref.ref(inner.update))
        optimizer = gapjax.encoder_only(inner)
        run_steps.on(
            vae=linear.vae, optimizer=optimizer, batch_size=20, objective=gapjax.elbo, num_steps=1
        )
    del inner, optimizer
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= parallel._MAX_PROGRAMS
    assert alive[-1]() is not None
