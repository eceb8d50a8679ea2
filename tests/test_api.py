"""`fit/api`: training and refits of the encoder, their gradients, convergence, and resuming."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same_bits, num_programs, random_params

import gapjax
from gapjax import Convergence, checkpoints, parallel
from gapjax.fit.objectives import SeveralSamples
from gapjax.fit.step import TrainState, init_state

FAST = gapjax.adam(5e-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderedSource:
    """The least that training asks of a source: the images in the order given."""

    images: jax.Array

    @property
    def num_examples(self):
        return len(self.images)

    def begin_epoch(self, rng_key):
        return None

    def draw(self, plan, rng_key, position):
        return self.images[jnp.minimum(position, self.num_examples - 1)]


def _noiseless(vae, params, rng_key, x):
    """An objective without noise: log p(x, z) at the mean of q, and its entropy."""
    q = vae.encode(params.encoder, x)
    log_joint = vae.decode(params.decoder, q.mean).log_prob(x) + vae.prior.log_prob(q.mean)
    return log_joint + 0.1 * jnp.log(q.base_dist.scale).sum()


def _kl_to_the_posterior(linear, params):
    """KL(q || exact posterior), mean over the images, nats: log p(x) - ELBO in closed form."""
    of = lambda p: jax.vmap(lambda x: linear.vae.encode(p.encoder, x).base_dist)(linear.images)
    ours, exact = of(params), of(linear.exact)
    ratio = (ours.scale / exact.scale) ** 2
    shift = ((ours.loc - exact.loc) / exact.scale) ** 2
    return float(0.5 * (ratio + shift - 1 - jnp.log(ratio)).sum(-1).mean())


class Script:
    """A monitor that reads its values from a list and keeps what it was shown."""

    def __init__(self, values):
        self.values, self.seen = list(values), []

    def __call__(self, params):
        self.seen.append(jax.tree.map(np.array, params))
        return self.values[len(self.seen) - 1]


def _linear_refit(linear, num_epochs, *, images=None, rng_key=None, **options):
    """All of these are one compiled program."""
    source = gapjax.data_source(linear.images if images is None else images)
    return gapjax.refit_encoder(
        linear.vae, linear.wrong, source, jax.random.key(0) if rng_key is None else rng_key,
        num_epochs=num_epochs, batch_size=20, optimizer=FAST, **options,
    )  # fmt: skip


def _small_train(small, num_epochs, **options):
    """The program that trained the shared model."""
    return gapjax.train(
        small.vae, gapjax.data_source(small.train_images),
        num_epochs=num_epochs, batch_size=small.batch_size, optimizer=gapjax.adam(5e-3), **options,
    )  # fmt: skip


def _small_refit(small, params=None, train_images=None, alpha=0.5, **options):
    return gapjax.self_consistent(
        small.vae, small.params if params is None else params,
        small.train_images if train_images is None else train_images,
        jax.random.key(1), alpha=alpha, num_epochs=5, batch_size=small.batch_size, **options,
    )  # fmt: skip


# --- the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, sizes", [(8, [8, 8, 4]), (20, [20])])
def test_an_epoch_is_sgd_by_hand_on_unpadded_batches(linear, batch_size, sizes):
    images, learning_rate, num_epochs = jnp.asarray(linear.images), 0.02, 2
    assert sum(sizes) == len(images)
    start = linear.wrong
    loss = lambda params, x: (
        -jax.vmap(lambda one: _noiseless(linear.vae, params, None, one))(x).mean()
    )
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    params, losses = start, []
    for _ in range(num_epochs):
        total, first = 0.0, 0
        for size in sizes:
            value, gradient = value_and_grad(params, images[first : first + size])
            params = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)
            total, first = total + size * float(value), first + size
        losses.append(total / len(images) / (6 * math.log(2)))

    optimizer = optax.sgd(learning_rate)
    opt_state = optimizer.init(start)
    state = TrainState(start, opt_state, jnp.zeros((), jnp.int32), jax.random.key(0))
    before = num_programs()
    ours, curve = gapjax.train(
        linear.vae, OrderedSource(images), state=state, num_epochs=num_epochs,
        batch_size=batch_size, optimizer=optimizer, objective=_noiseless,
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(curve.loss_bpd, losses, rtol=1e-4)
    assert curve.epoch == (1, 2)
    assert int(ours.step) == num_epochs * len(sizes)

    # One program in all: neither the second epoch nor going on from the state is a new one.
    assert num_programs() == before + 1
    gapjax.train(
        linear.vae, OrderedSource(images + 1), state=ours, num_epochs=num_epochs + 1,
        batch_size=batch_size, optimizer=optimizer, objective=_noiseless,
    )  # fmt: skip
    assert num_programs() == before + 1


def test_training_improves_the_model_and_says_so(small):
    assert small.curve.epoch == tuple(range(1, small.num_epochs + 1))
    assert int(small.state.step) == 5 * small.num_epochs  # 90 images in batches of 20
    losses = np.array(small.curve.loss_bpd)
    assert losses[-5:].mean() < losses[:2].mean() - 0.1
    train, test = (
        gapjax.evaluate(small.vae, small.params, jax.random.key(0), images, num_samples=8)
        for images in (small.train_images[:40], small.test_images)
    )
    assert train.bpd == pytest.approx(losses[-5:].mean(), abs=0.08)
    assert test.bpd > train.bpd + 0.02


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(small, tmp_path):
    """With a pass through a checkpoint, and evaluations that a straight run does not make."""
    rng_key = jax.random.key(3)
    straight, curve = _small_train(small, 4, rng_key=rng_key)
    gapjax.evaluate(small.vae, straight.params, rng_key, small.test_images, num_samples=8)
    before = num_programs()
    first, early = _small_train(small, 2, rng_key=rng_key)
    checkpoints.save(tmp_path, 2, first, {"epoch": 2})
    gapjax.evaluate(small.vae, first.params, first.rng_key, small.test_images, num_samples=8)
    restored, _ = checkpoints.restore(tmp_path, 2, first)
    epochs = []
    resumed, late = _small_train(
        small, 4, state=restored, on_epoch=lambda epoch, bpd: epochs.append((epoch, bpd))
    )
    assert_same_bits(resumed, straight)
    assert early.epoch + late.epoch == curve.epoch == (1, 2, 3, 4)
    assert early.loss_bpd + late.loss_bpd == curve.loss_bpd
    assert epochs == list(zip(late.epoch, late.loss_bpd, strict=True))
    assert num_programs() == before
    # A run that is done already does nothing.
    again, nothing = _small_train(small, 4, state=resumed)
    assert_same_bits(again, straight)
    assert nothing.epoch == ()


def test_noise_differs_from_epoch_to_epoch_and_from_key_to_key(small):
    _, first = _small_train(small, 3, rng_key=jax.random.key(4))
    _, same = _small_train(small, 3, rng_key=jax.random.key(4))
    _, other = _small_train(small, 3, rng_key=jax.random.key(5))
    assert first.loss_bpd == same.loss_bpd != other.loss_bpd
    # With the parameters held still only the noise and the order are left to differ.
    frozen = gapjax.adam(0.0)
    state = TrainState(
        small.params, frozen.init(small.params), jnp.zeros((), jnp.int32), jax.random.key(0)
    )
    held, curve = gapjax.train(
        small.vae, gapjax.data_source(small.train_images), state=state, num_epochs=3,
        batch_size=small.batch_size, optimizer=frozen,
    )  # fmt: skip
    assert_same_bits(held.params, small.params)
    assert len(set(curve.loss_bpd)) == 3


def test_what_is_given_is_still_there_afterwards(small, linear):
    """The loop donates its state; none of the caller's arrays may be among it."""
    state = jax.tree.map(jnp.copy, small.state)
    _small_train(small, small.num_epochs + 1, state=state)
    assert_same_bits(state, small.state)
    rng_key = jax.random.key(6)
    params = jax.tree.map(jnp.copy, linear.wrong)
    source = gapjax.data_source(linear.images)
    refit = gapjax.refit_encoder(
        linear.vae, params, source, rng_key, num_epochs=1, batch_size=20, optimizer=FAST
    )
    assert_same_bits((params, source.images), (linear.wrong, jnp.asarray(linear.images)))
    assert np.isfinite(refit.curve.loss_bpd[0])
    assert_same_bits(rng_key, jax.random.key(6))


# --- refits -----------------------------------------------------------------------------------


def test_refit_drives_the_encoder_to_the_exact_posterior(linear):
    """Then the ELBO is log p(x), and the decoder is the one given."""
    assert _kl_to_the_posterior(linear, linear.wrong) > 0.5
    monitor = lambda params: (
        gapjax.evaluate(linear.vae, params, jax.random.key(1), linear.images, num_samples=64).bpd
    )
    refit = _linear_refit(
        linear, 1500, monitor=monitor, monitor_every=50, until=Convergence(tolerance=1e-4)
    )
    assert refit.converged
    assert _kl_to_the_posterior(linear, refit.params) < 0.02
    evaluation = gapjax.evaluate(
        linear.monte_carlo_vae, refit.params, jax.random.key(2), linear.images, num_samples=64
    )
    log_p = linear.log_prob(linear.images).mean()
    assert -evaluation.bpd * 6 * math.log(2) == pytest.approx(log_p, abs=0.03)
    assert_same_bits(refit.params.decoder, linear.wrong.decoder)


def test_an_optimizer_whose_state_holds_an_array_twice_will_do(linear):
    refit = gapjax.refit_encoder(
        linear.vae, linear.wrong, gapjax.data_source(linear.images), jax.random.key(0),
        num_epochs=8, batch_size=20, optimizer=optax.lbfgs(0.1, linesearch=None),
        objective=_noiseless,
    )  # fmt: skip
    assert refit.curve.loss_bpd[-1] < refit.curve.loss_bpd[0] - 0.05
    assert_same_bits(refit.params.decoder, linear.wrong.decoder)


def test_samples_of_the_model_are_enough_to_find_the_posterior(linear):
    """With alpha = 1 the images are not looked at: they could be anything."""
    refit = gapjax.self_consistent(
        linear.vae, linear.wrong, np.full((20, 6), np.nan, np.float32), jax.random.key(0),
        alpha=1, num_epochs=600, batch_size=20, optimizer=gapjax.adam(1e-2),
    )  # fmt: skip
    assert _kl_to_the_posterior(linear, refit.params) < 0.05
    assert refit.num_steps == 600


def _with_negative_zeros(params):
    return params._replace(decoder=jax.tree.map(lambda p: p.at[..., 0].set(-0.0), params.decoder))


def test_self_consistent_training_leaves_the_decoder_bit_for_bit(small):
    params = _with_negative_zeros(small.params)
    refit = _small_refit(small, params)
    assert_same_bits(refit.params.decoder, params.decoder)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), refit.params.encoder, params.encoder)
    assert all(jax.tree.leaves(moved))
    assert (refit.num_steps, refit.converged, refit.last_improvement) == (25, None, None)
    assert refit.curve.epoch == (1, 2, 3, 4, 5) and refit.curve.monitor_bpd == ()


def test_optimal_inference_improves_the_test_set_and_leaves_the_decoder(small):
    params = _with_negative_zeros(small.params)
    refit = gapjax.optimal_inference(
        small.vae, params, small.test_images, jax.random.key(0),
        num_epochs=100, monitor_every=25, batch_size=small.batch_size, num_samples=8,
    )  # fmt: skip
    assert_same_bits(refit.params.decoder, params.decoder)
    before, after = (
        gapjax.evaluate(small.vae, p, jax.random.key(5), small.test_images, num_samples=8)
        for p in (params, refit.params)
    )
    gain = gapjax.paired_difference(before, after)
    assert gain.bpd > 3 * gain.stderr > 0
    assert refit.curve.monitor_epoch[:2] == (0, 25)
    assert min(refit.curve.monitor_bpd) < refit.curve.monitor_bpd[0] - 0.01
    assert refit.curve.monitor_bpd[0] == pytest.approx(before.bpd, abs=0.05)
    assert isinstance(refit.converged, bool)
    assert refit.num_steps == 2 * refit.curve.epoch[-1]


def test_a_restored_refit_is_evaluated_to_the_same_bits(small, tmp_path):
    """By a program that has the model's functions and what is on the disk, no more."""
    refit = _small_refit(small)
    record = {"num_steps": refit.num_steps, **refit.curve._asdict()}
    checkpoints.save(tmp_path / "refits", 60, refit.params, record)
    state = init_state(small.params, jax.random.key(3), gapjax.encoder_only(gapjax.adam(1e-3)))
    checkpoints.save(tmp_path / "states", 60, state, {})

    key = jax.random.key(3)
    like = jax.eval_shape(lambda: init_state(small.vae.init(key), key))
    params, record = checkpoints.restore(tmp_path / "refits", 60, like.params)
    first, second = (
        gapjax.evaluate(small.vae, p, jax.random.key(5), small.test_images, num_samples=8)
        for p in (refit.params, params)
    )
    assert first.per_image.tobytes() == second.per_image.tobytes()
    assert tuple(record["loss_bpd"]) == refit.curve.loss_bpd and record["num_steps"] == 25
    with pytest.raises(checkpoints.CheckpointError, match="does not fit"):
        checkpoints.restore(tmp_path / "states", 60, like)  # of another optimizer


def test_the_test_set_does_not_reach_self_consistent_training(small):
    """It lies behind the training set in one array, is poisoned, refitted on and monitored."""
    everything = np.concatenate([small.train_images, small.test_images])
    num_train = len(small.train_images)
    clean = _small_refit(small, train_images=everything[:num_train])
    everything[num_train:] = 1
    watched = []

    def monitor(params):
        test_images = everything[num_train:]
        watched.append(
            gapjax.evaluate(small.vae, params, jax.random.key(9), test_images, num_samples=8).bpd
        )
        return watched[-1]

    poisoned = _small_refit(
        small, train_images=everything[:num_train], monitor=monitor, monitor_every=2
    )
    assert_same_bits(poisoned.params, clean.params)
    assert poisoned.curve.loss_bpd == clean.curve.loss_bpd
    # Without `until` a monitor measures and changes nothing.
    assert poisoned.curve.monitor_epoch == (0, 2, 4, 5)
    assert poisoned.curve.monitor_bpd == tuple(watched)
    assert (poisoned.converged, poisoned.num_steps) == (None, clean.num_steps)


def test_a_second_refit_with_equal_arguments_does_not_recompile(small):
    first = _small_refit(small)
    before = num_programs()
    second = _small_refit(small)
    assert_same_bits(first.params, second.params)
    _small_refit(small, params=random_params(small.vae), train_images=1 - small.train_images)
    assert num_programs() == before


def test_what_is_made_alike_shares_programs(small):
    """Another model, optimizer and objective of the same sizes: none is compiled anew."""

    def use():
        vae = gapjax.mlp_vae((5, 5), latent_dim=3, hidden_sizes=(32,))
        source = gapjax.data_source(small.train_images)
        options = dict(num_epochs=1, batch_size=30, optimizer=gapjax.adam(3e-3))
        state, _ = gapjax.train(vae, source, jax.random.key(0), **options)
        options["objective"] = gapjax.objectives.WithSleep(0.5, SeveralSamples(2))
        gapjax.refit_encoder(vae, state.params, source, jax.random.key(1), **options)
        kernel = gapjax.kernel(vae, source, gapjax.adam(3e-3), batch_size=30)
        kernel.step(kernel.init(state.params, jax.random.key(2)))
        return gapjax.evaluate(vae, state.params, jax.random.key(3), small.test_images)

    first = use()
    before, kept = num_programs(), parallel._compiled.cache_info().misses
    again = use()
    assert (num_programs(), parallel._compiled.cache_info().misses) == (before, kept)
    np.testing.assert_array_equal(first.per_image, again.per_image)
    assert gapjax.mlp_vae((5, 5)) == gapjax.mlp_vae((5, 5)) != gapjax.mlp_vae((5, 5), latent_dim=3)


def test_the_control_is_a_refit_on_the_data(linear):
    """On whole batches without noise the order does not matter, so the two are one."""
    options = dict(num_epochs=20, batch_size=20, optimizer=FAST, objective=_noiseless)
    control = gapjax.self_consistent(
        linear.vae, linear.wrong, linear.images, jax.random.key(0), alpha=0, **options
    )
    plain = gapjax.refit_encoder(
        linear.vae, linear.wrong, gapjax.data_source(linear.images), jax.random.key(1), **options
    )
    for a, b in zip(jax.tree.leaves(control.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(control.curve.loss_bpd, plain.curve.loss_bpd, rtol=1e-5)
    assert control.curve.loss_bpd[-1] < control.curve.loss_bpd[0] - 0.05


# --- convergence ------------------------------------------------------------------------------


def test_convergence_follows_its_rule_and_keeps_the_best(linear):
    #        start  better  plateau but best  worse: the end
    monitor = Script([1.0, 0.8, 0.795, 0.85, None])
    refit = _linear_refit(
        linear, 100, monitor=monitor, monitor_every=3,
        until=Convergence(tolerance=0.01, decay=0.0, num_decays=1),
    )  # fmt: skip
    assert refit.converged is True
    assert refit.curve.monitor_epoch == (0, 3, 6, 9)
    assert refit.curve.monitor_bpd == (1.0, 0.8, 0.795, 0.85)
    assert refit.curve.epoch == tuple(range(1, 10)) and refit.num_steps == 9
    assert refit.last_improvement == pytest.approx(0.795 - 0.85)
    assert_same_bits(jax.tree.map(np.asarray, refit.params.encoder), monitor.seen[2].encoder)
    # The learning rate was lowered at the plateau, here to nothing, and not before.
    assert_same_bits(monitor.seen[3].encoder, monitor.seen[2].encoder)
    assert np.any(monitor.seen[2].encoder["weight"] != monitor.seen[1].encoder["weight"])


@pytest.mark.parametrize("num_decays", [0, 2])
def test_convergence_is_never_worse_than_its_start(linear, num_decays):
    monitor = Script([1.0, 2.0, 3.0, 4.0, 5.0])
    refit = _linear_refit(
        linear, 100, monitor=monitor, monitor_every=2, until=Convergence(num_decays=num_decays)
    )
    assert refit.converged is True
    assert len(monitor.seen) == num_decays + 2  # the start, and a plateau for each
    assert_same_bits(refit.params, linear.wrong)


def test_a_measurement_that_is_no_number_is_no_best(linear):
    """Also the first: those after it are judged by the best of the others."""
    values = [math.nan, 1.0, 0.8, math.nan, 0.795, 0.85, None]
    monitor = Script(values)
    until = Convergence(tolerance=0.01, decay=0.5, num_decays=2)
    refit = _linear_refit(linear, 100, monitor=monitor, monitor_every=1, until=until)
    assert refit.converged is True and len(monitor.seen) == 6
    assert_same_bits(jax.tree.map(np.asarray, refit.params.encoder), monitor.seen[4].encoder)
    assert refit.last_improvement == pytest.approx(0.795 - 0.85)
    never = _linear_refit(linear, 100, monitor=Script([math.nan] * 9), monitor_every=1, until=until)
    assert never.converged is False


def test_optimal_inference_is_judged_by_what_it_maximizes(linear):
    """Or by what is given; by default that is the ELBO."""
    iwae = gapjax.objectives.Iwae(5)
    bpd = lambda objective, **options: gapjax.optimal_inference(
        linear.vae, linear.wrong, linear.images, jax.random.key(0), num_epochs=1, batch_size=20,
        optimizer=FAST, objective=objective, num_samples=200, **options,
    ).curve.monitor_bpd[0]  # fmt: skip
    evaluate = lambda **options: gapjax.evaluate(
        linear.vae, linear.wrong, jax.random.key(1), linear.images, **options
    )
    elbo = evaluate(num_samples=200)
    several = lambda *arguments: jax.vmap(lambda key: iwae(*arguments[:2], key, arguments[3]))(
        jax.random.split(arguments[2], 200)
    ).mean()
    bound = evaluate(bound=several)
    assert bound.bpd < elbo.bpd - 0.05
    assert bpd(iwae) == pytest.approx(bound.bpd, abs=0.04)
    assert bpd(iwae, bound=gapjax.elbo) == bpd(gapjax.elbo) == pytest.approx(elbo.bpd, abs=0.04)


def test_convergence_says_when_it_was_not_reached(linear):
    monitor = Script([1.0, 0.9, 0.8, 0.7])
    before = num_programs()
    refit = _linear_refit(linear, 7, monitor=monitor, monitor_every=3, until=Convergence())
    assert refit.converged is False
    assert refit.curve.monitor_epoch == (0, 3, 6, 7)
    assert refit.num_steps == 7
    assert refit.last_improvement == pytest.approx(0.1)
    assert_same_bits(jax.tree.map(np.asarray, refit.params.encoder), monitor.seen[3].encoder)
    # And what is done between two measurements is what is done without any.
    plain = _linear_refit(linear, 7)
    assert_same_bits(refit.params, plain.params)
    assert refit.curve.loss_bpd == plain.curve.loss_bpd
    # A lower learning rate is not another program.
    _linear_refit(linear, 6, monitor=Script([1.0] * 4), monitor_every=2, until=Convergence())
    assert num_programs() <= before + 1


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 21}, "batch_size is 21.* 20 examples"),
        ({"batch_size": 0}, "batch_size is 0; it must be positive"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 5.0}, "batch_size is 5.0; it must be an integer"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"num_epochs": -2}, "num_epochs is -2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(linear, options, words):
    source = gapjax.data_source(linear.images)
    options = {"num_epochs": 1, "batch_size": 10, **options}
    with pytest.raises(ValueError, match=words):
        gapjax.train(linear.vae, source, jax.random.key(0), **options)
    with pytest.raises(ValueError, match=words):
        gapjax.refit_encoder(linear.vae, linear.wrong, source, jax.random.key(0), **options)


@pytest.mark.parametrize("monitor_every", [0, -5])
def test_a_monitor_needs_a_positive_interval(linear, monitor_every):
    with pytest.raises(ValueError, match="monitor_every"):
        _linear_refit(linear, 3, monitor=Script([1.0] * 9), monitor_every=monitor_every)


def test_missing_arguments_are_named(linear):
    with pytest.raises(ValueError, match="rng_key, or a state"):
        gapjax.train(linear.vae, gapjax.data_source(linear.images), num_epochs=1, batch_size=5)
    with pytest.raises(ValueError, match="until is given without monitor"):
        _linear_refit(linear, 1, until=Convergence())


def test_an_optimizer_whose_learning_rate_is_hidden_is_refused_before_any_step(linear):
    before, monitor = num_programs(), Script([1.0])
    refit = lambda optimizer, **options: gapjax.optimal_inference(
        linear.vae, linear.wrong, linear.images, jax.random.key(0), num_epochs=1, batch_size=20,
        optimizer=optimizer, **options,
    )  # fmt: skip
    for optimizer in (optax.adam(1e-3), optax.chain(gapjax.adam(1e-3), gapjax.adam(1e-3))):
        with pytest.raises(ValueError, match=r"gapjax\.adam.*optax\.inject_hyperparams"):
            refit(optimizer)
    assert num_programs() == before and monitor.seen == []
    assert refit(optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)).converged is False
    assert refit(optax.sgd(1e-3), until=None).num_steps == 1


def test_members_that_cannot_be_refitted_together_are_named(linear):
    refit = lambda members, **options: gapjax.refit_members(
        linear.vae, members, num_epochs=1, batch_size=20, **options
    )
    with pytest.raises(ValueError, match="members is empty"):
        refit([])
    source = gapjax.data_source(linear.images)
    member = gapjax.Member(linear.wrong, source, jax.random.key(0))
    with pytest.raises(ValueError, match="until is given without monitor"):
        refit([member._replace(monitor=lambda params: 1.0), member], until=Convergence())
    with pytest.raises(ValueError, match="sweep is 'both'; it must be one of auto, vmap, map"):
        refit([member, member], sweep="both")


def test_a_loss_that_is_not_a_number_ends_the_run(linear):
    decoder = {**linear.wrong.decoder, "bias": linear.wrong.decoder["bias"].at[2].set(jnp.nan)}
    epochs = []
    words = (
        "the loss is nan in epoch 1, step 1; with the parameters that the run started from, the "
        "objective of example 0 of the epoch is not finite: params.decoder has a NaN"
    )
    with pytest.raises(FloatingPointError, match=words):
        gapjax.refit_encoder(
            linear.vae, linear.wrong._replace(decoder=decoder), gapjax.data_source(linear.images),
            jax.random.key(0), num_epochs=5, batch_size=20, optimizer=FAST,
            on_epoch=lambda *epoch: epochs.append(epoch),
        )  # fmt: skip
    assert epochs == []
