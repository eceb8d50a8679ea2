"""Objectives beside the ELBO, against the closed forms of a linear Gaussian model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_bits

import gapjax
from gapjax import objectives
from gapjax.model.bounds import divergence, log_joint
from gapjax.optimizers import cosine_adam

SIGMA = 0.5
N = 40_000


@functools.partial(jax.jit, static_argnames=("objective", "vae"))
def _gradients(objective, vae, params, rng_key, x):
    """Values [N] over fresh noise, and the gradient of their mean with its standard error."""
    keys = jax.random.split(rng_key, N)
    both = jax.value_and_grad(lambda params, key: objective(vae, params, key, x))
    values, gradients = jax.vmap(both, in_axes=(None, 0))(params, keys)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), gradients)
    return values, mean, jax.tree.map(lambda leaf: leaf.std(0) / np.sqrt(N), gradients)


def _float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _expected_log_posterior(encoder, weight, bias, mean, covariance):
    """E log q(z given x') and its gradient, for z ~ N(mean, covariance) and x' ~ p(x given z)."""
    scale = np.log1p(np.exp(encoder["raw_scale"]))
    x_mean = weight @ mean + bias
    x_second = weight @ covariance @ weight.T + SIGMA**2 * np.eye(len(bias))
    x_second += np.outer(x_mean, x_mean)
    zx = covariance @ weight.T + np.outer(mean, x_mean)
    matrix, offset = encoder["weight"], encoder["bias"]
    second = covariance + np.outer(mean, mean)  # of z
    square = (
        np.diag(second - 2 * zx @ matrix.T + matrix @ x_second @ matrix.T)
        - 2 * offset * (mean - matrix @ x_mean) + offset**2
    )  # fmt: skip
    value = (-square / (2 * scale**2) - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum()
    gradient = {
        "weight": (zx - matrix @ x_second - np.outer(offset, x_mean)) / scale[:, None] ** 2,
        "bias": (mean - matrix @ x_mean - offset) / scale**2,
        "raw_scale": (square / scale**3 - 1 / scale) / (1 + np.exp(-encoder["raw_scale"])),
    }
    return value, gradient


def _assert_near(found, expected, error):
    for ours, theirs, stderr in zip(*map(jax.tree.leaves, (found, expected, error)), strict=True):
        np.testing.assert_array_less(abs(np.asarray(ours) - theirs), 5 * stderr + 1e-4)


@pytest.mark.parametrize("which", ["exact", "wrong"])
def test_the_sleep_phase_has_the_gradient_of_the_forward_kl(linear, which):
    params = getattr(linear, which)
    decoder, encoder = _float64(params.decoder), _float64(params.encoder)
    value, gradient = _expected_log_posterior(
        encoder, decoder["weight"], decoder["bias"], np.zeros(2), np.eye(2)
    )
    x = jnp.zeros(6)
    values, found, error = _gradients(
        objectives.sleep_phase, linear.vae, params, jax.random.key(0), x
    )  # fmt: skip
    assert abs(values.mean() - value) < 5 * values.std() / np.sqrt(N)
    _assert_near(found.encoder, gradient, error.encoder)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found.decoder))
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert (largest < 1e-6) == (which == "exact")  # the posterior itself is the optimum


def test_the_sleep_phase_does_not_see_x(linear):
    key = jax.random.key(1)
    images = (jnp.zeros(6), jnp.full(6, jnp.nan))
    values = [objectives.sleep_phase(linear.vae, linear.wrong, key, x) for x in images]
    assert np.isfinite(values[0])
    assert_same_bits(*values)


def test_wake_sleep_trains_each_network_by_its_phase(linear):
    key, x = jax.random.key(2), jnp.asarray(linear.images[0])
    wake_key, sleep_key = jax.random.split(key)
    found = jax.grad(lambda params: objectives.wake_sleep(linear.vae, params, key, x))(linear.wrong)
    asleep = jax.grad(lambda params: objectives.sleep_phase(linear.vae, params, sleep_key, x))
    assert_same_bits(found.encoder, asleep(linear.wrong).encoder)
    z = linear.vae.encode(linear.wrong.encoder, x).sample(wake_key)
    awake = jax.grad(lambda decoder: log_joint(linear.vae, decoder, x, z))(linear.wrong.decoder)
    assert_same_bits(found.decoder, awake)


def test_with_sleep_is_the_sum(linear):
    key, x = jax.random.key(3), jnp.asarray(linear.images[0])
    elbo_key, sleep_key = jax.random.split(key)
    both = objectives.WithSleep(0.25)(linear.vae, linear.wrong, key, x)
    parts = [
        objective(linear.vae, linear.wrong, part_key, x)
        for objective, part_key in ((gapjax.elbo, elbo_key), (objectives.sleep_phase, sleep_key))
    ]
    np.testing.assert_allclose(both, parts[0] + 0.25 * parts[1], rtol=1e-6)


def test_denoising_loses_what_the_noise_moves_the_mean_by(linear):
    """The ELBO is quadratic in q's mean, which noise e moves by A e."""
    x, scale = jnp.asarray(linear.images[0]), 0.7
    exact = objectives.DenoisingElbo(0.0)(linear.vae, linear.wrong, jax.random.key(4), x)
    elbo_key = jax.random.split(jax.random.key(4))[1]
    np.testing.assert_allclose(exact, gapjax.elbo(linear.vae, linear.wrong, elbo_key, x), rtol=1e-6)
    noisy, *_ = _gradients(
        objectives.DenoisingElbo(scale), linear.vae, linear.wrong, jax.random.key(5), x
    )
    clean, *_ = _gradients(gapjax.elbo, linear.vae, linear.wrong, jax.random.key(6), x)
    decoder, encoder = _float64(linear.wrong.decoder), _float64(linear.wrong.encoder)
    curvature = decoder["weight"].T @ decoder["weight"] / SIGMA**2 + np.eye(2)
    lost = 0.5 * scale**2 * np.trace(encoder["weight"].T @ curvature @ encoder["weight"])
    error = np.hypot(noisy.std(), clean.std()) / np.sqrt(N)
    assert lost > 20 * error
    assert abs(clean.mean() - noisy.mean() - lost) < 5 * error


def test_consistent_codes_add_the_log_posterior_of_a_reconstruction(linear):
    x, weight = jnp.asarray(linear.images[0]), 0.5
    decoder, encoder = _float64(linear.wrong.decoder), _float64(linear.wrong.encoder)
    mean = encoder["weight"] @ linear.images[0] + encoder["bias"]
    variance = np.log1p(np.exp(encoder["raw_scale"])) ** 2
    value, gradient = _expected_log_posterior(
        encoder, decoder["weight"], decoder["bias"], mean, np.diag(variance)
    )
    both, found, error = _gradients(
        objectives.ConsistentCodes(weight), linear.vae, linear.wrong, jax.random.key(7), x
    )
    bound, plain, plain_error = _gradients(
        gapjax.elbo, linear.vae, linear.wrong, jax.random.key(8), x
    )
    stderr = np.hypot(both.std(), bound.std()) / np.sqrt(N)
    assert abs(both.mean() - bound.mean() - weight * value) < 5 * stderr
    added = jax.tree.map(lambda a, b: (a - b) / weight, found, plain)
    errors = jax.tree.map(lambda a, b: jnp.hypot(a, b) / weight, error, plain_error)
    _assert_near(added.encoder, gradient, errors.encoder)
    _assert_near(added.decoder, jax.tree.map(jnp.zeros_like, added.decoder), errors.decoder)


def test_several_samples_are_those_of_the_elbo(linear):
    key, x = jax.random.key(9), jnp.asarray(linear.images[0])
    assert_same_bits(
        objectives.SeveralSamples(4)(linear.vae, linear.wrong, key, x),
        gapjax.elbo(linear.vae, linear.wrong, key, x, num_samples=4),
    )


def test_the_importance_weighted_bound_is_an_objective(linear):
    """With the exact posterior all weights are p(x); of one sample the mean is the ELBO."""
    key, x = jax.random.key(9), jnp.asarray(linear.images[0])
    exact = objectives.Iwae(3)(linear.vae, linear.exact, key, x)
    assert exact == pytest.approx(linear.log_prob(linear.images[:1])[0], rel=1e-5)
    one, *_ = _gradients(objectives.Iwae(1), linear.vae, linear.wrong, key, x)
    elbo, *_ = _gradients(gapjax.elbo, linear.vae, linear.wrong, key, x)
    assert abs(one.mean() - elbo.mean()) < 5 * np.hypot(one.std(), elbo.std()) / np.sqrt(N)


def _kl_by_latent(linear):
    """Of the wrong q of the first image to the prior [Z]."""
    q = linear.vae.encode(linear.wrong.encoder, jnp.asarray(linear.images[0])).base_dist
    m, s = np.asarray(q.loc, np.float64), np.asarray(q.scale, np.float64)
    return -np.log(s) + (s**2 + m**2 - 1) / 2


def test_beta_weighs_the_kl_and_the_first_nats_of_a_latent_are_free(linear):
    key, x, kl = jax.random.key(9), jnp.asarray(linear.images[0]), _kl_by_latent(linear)
    value = lambda objective: float(objective(linear.vae, linear.wrong, key, x))
    elbo = value(gapjax.elbo)
    assert value(objectives.BetaElbo(1.0)) == pytest.approx(elbo, rel=1e-6)
    assert value(objectives.BetaElbo(4.0)) == pytest.approx(elbo - 3 * kl.sum(), rel=1e-5)
    assert value(objectives.FreeBits(0.0)) == pytest.approx(elbo, rel=1e-6)
    assert kl.min() < 0.9 * kl.max()
    for nats in (kl.mean(), 2 * kl.max()):
        expected = elbo + kl.sum() - np.maximum(nats, kl).sum()
        assert value(objectives.FreeBits(nats)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="Normal and PlainNormal have no KL in closed form"):
        objectives.FreeBits(0.5)(linear.monte_carlo_vae, linear.wrong, key, x)


def test_a_kl_that_is_estimated_can_be_weighed_too(linear):
    key, x = jax.random.key(9), jnp.asarray(linear.images[0])
    arguments = linear.monte_carlo_vae, linear.wrong, key, x
    none, once, twice = (float(objectives.BetaElbo(beta)(*arguments)) for beta in (0.0, 1.0, 2.0))
    assert none - once == pytest.approx(once - twice, rel=1e-4)
    assert once == pytest.approx(float(gapjax.elbo(*arguments)), rel=1e-6)


@pytest.mark.parametrize("make", [objectives.SeveralSamples, objectives.Iwae])
def test_no_samples_make_no_objective(linear, make):
    with pytest.raises(ValueError, match="num_samples is 0; it must be positive"):
        make(0)(linear.vae, linear.wrong, jax.random.key(0), jnp.zeros(6))


def test_an_objective_that_holds_another_takes_gradients_as_that_does(linear):
    asked = objectives.needs_rsample
    wake_sleep = functools.partial(objectives.wake_sleep)
    assert not asked(objectives.WithSleep(1.0, wake_sleep)) and not asked(wake_sleep)
    assert asked(objectives.WithSleep(1.0)) and asked(functools.partial(gapjax.elbo))
    of = lambda forward: objectives.EnsembleDistillation(
        linear.vae, [linear.exact.encoder], forward
    )
    for make in (lambda forward: objectives.Distillation(forward=forward), of):
        assert (asked(make(True)), asked(make(False))) == (False, True)


@pytest.mark.parametrize("make", [objectives.ConsistentCodes, objectives.WithSleep])
def test_a_sample_of_the_model_is_encoded_as_it_is(linear, make):
    """Images that are levels do not make levels of the samples of a model of reals."""
    key, levels = jax.random.key(10), np.round(linear.images[0]).astype(np.int8)
    values = [make(0.5)(linear.vae, linear.wrong, key, jnp.asarray(levels, t)) for t in
              (jnp.int8, jnp.float32)]  # fmt: skip
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        objectives.Iwae,
        objectives.BetaElbo,
        objectives.FreeBits,
        objectives.SeveralSamples,
        objectives.WithSleep,
        objectives.DenoisingElbo,
        objectives.ConsistentCodes,
        lambda number: objectives.Distillation(gapjax.Refiner(num_steps=number)),
    ],
    ids=[
        "iwae",
        "beta",
        "free_bits",
        "several_samples",
        "with_sleep",
        "denoising",
        "consistent_codes",
        "distillation",
    ],
)
def test_objectives_made_alike_are_equal(make):
    assert make(2) == make(2) and hash(make(2)) == hash(make(2))
    assert make(2) != make(3)


def _kl(first, second):
    """KL of two diagonal Gaussians (loc, scale), summed over the latent."""
    (m, s), (n, t) = first, second
    return (np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum()


@pytest.mark.parametrize("forward", [True, False])
def test_distillation_is_the_kl_to_the_exact_posterior(linear, forward):
    """One Newton step finds it; there the value and the gradient of the encoder are zero."""
    objective = objectives.Distillation(forward=forward)
    x, key = jnp.asarray(linear.images[0]), jax.random.key(10)
    both = jax.jit(jax.value_and_grad(lambda params: objective(linear.vae, params, key, x)))
    pair = []
    for params in (linear.exact, linear.wrong):
        q = linear.vae.encode(params.encoder, x).base_dist
        pair.append((np.asarray(q.loc, np.float64), np.asarray(q.scale, np.float64)))
    value, gradient = both(linear.wrong)
    np.testing.assert_allclose(-value, _kl(*(pair if forward else pair[::-1])), rtol=1e-4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.decoder))
    value, gradient = both(linear.exact)
    assert abs(value) < 1e-5
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 5e-3


def test_distillation_refits_the_encoder_to_the_exact_posterior(linear):
    """On model samples, by the one refit; the trained decoder is not changed."""
    source = gapjax.model_source(linear.vae, linear.wrong.decoder, 100)
    refit = gapjax.refit_encoder(
        linear.vae, linear.wrong, source, jax.random.key(11), num_epochs=60, batch_size=20,
        optimizer=cosine_adam(0.05, 300), objective=objectives.Distillation(),
    )  # fmt: skip
    for ours, exact in zip(
        *map(jax.tree.leaves, (refit.params.encoder, linear.exact.encoder)), strict=True
    ):
        np.testing.assert_allclose(ours, exact, atol=2e-3)
    assert_same_bits(refit.params.decoder, linear.wrong.decoder)


def test_a_divergence_without_a_closed_form_is_estimated(linear):
    """NumPyro has none to the prior of this model."""
    posterior = linear.vae.encode(linear.wrong.encoder, jnp.asarray(linear.images[0]))
    keys = jax.random.split(jax.random.key(12), N)
    one = lambda key: divergence(posterior, linear.monte_carlo_vae.prior, key)
    found, closed = jax.vmap(one)(keys), divergence(posterior, linear.vae.prior, keys[0])
    assert abs(found.mean() - closed) < 5 * found.std() / np.sqrt(N)
    assert 0 < found.std() / np.sqrt(N) < 0.02 * closed


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(ValueError, match="num_judged=0"):
        objectives.Distillation(gapjax.Refiner(num_judged=0))


@pytest.mark.parametrize("forward", [True, False])
def test_distillation_of_an_ensemble_has_its_optimum_where_several_encoders_meet(linear, forward):
    """Two teachers of the same scale: between their means, and with the moments of both forward."""
    exact, apart = linear.exact.encoder, jnp.array([0.3, -0.4])
    teachers = [exact, {**exact, "bias": exact["bias"] + apart}]
    objective = objectives.EnsembleDistillation(linear.vae, teachers, forward=forward)
    x, key = jnp.asarray(linear.images[0]), jax.random.key(12)

    @jax.jit
    def both(encoder):
        params = linear.exact._replace(encoder=encoder)
        return jax.value_and_grad(lambda params: objective(linear.vae, params, key, x))(params)

    def moments(encoder):
        q = linear.vae.encode(encoder, x).base_dist
        return np.asarray(q.loc, np.float64), np.asarray(q.scale, np.float64)

    wrong = linear.wrong.encoder
    pairs = [(moments(teacher), moments(wrong)) for teacher in teachers]
    expected = -np.mean([_kl(*(pair if forward else pair[::-1])) for pair in pairs])
    value, gradient = both(wrong)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient.encoder)) > 0.1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.decoder))
    variance = jax.nn.softplus(exact["raw_scale"]) ** 2 + forward * (apart / 2) ** 2
    middle = {
        "weight": exact["weight"],
        "bias": exact["bias"] + apart / 2,
        "raw_scale": jnp.log(jnp.expm1(jnp.sqrt(variance))),
    }
    _, gradient = both(middle)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient.encoder)) < 1e-3


def test_distillation_of_an_ensemble_needs_an_encoder(linear):
    with pytest.raises(ValueError, match="at least one encoder"):
        objectives.EnsembleDistillation(linear.vae, [])
