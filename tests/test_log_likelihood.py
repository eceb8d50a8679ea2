"""log p(x) of a set: `measure/log_likelihood`, `measure/annealing` and `measure/importance`.

It is unbiased where theory says so, bounded from both sides, and computed in bounded memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import gapjax
from gapjax.measure.annealing import Annealing
from gapjax.measure.bounds import encoder_gradient_norms, posterior_bounds
from gapjax.measure.log_likelihood import _log_likelihoods, log_likelihood, sandwich
from gapjax.results.measurements import measure

_SHORT = Annealing(num_temperatures=6, num_chains=2, num_leapfrog=3)
_REPEATS = 40


def _many(linear):
    """Every image many times, each time with noise of its own, and its exact log p(x)."""
    images = np.repeat(linear.images, _REPEATS, axis=0)
    return images, linear.log_prob(images)


def _is_one(values):
    """The mean of these independent positive numbers is 1 within 4 standard errors."""
    values = np.asarray(values, np.float64)
    stderr = values.std(ddof=1) / np.sqrt(len(values))
    assert stderr < 0.1  # else it says nothing
    return abs(values.mean() - 1) < 4 * stderr


def test_at_the_exact_posterior_every_sample_weighs_p(linear):
    """No noise, so the sum over ragged chunks must be exact, and all samples count."""
    result = log_likelihood(
        linear.monte_carlo_vae, linear.exact, jax.random.key(0), linear.images,
        num_samples=50, chunk_size=16, batch_size=7,
    )  # fmt: skip
    np.testing.assert_allclose(result.log_prob, linear.log_prob(linear.images), atol=3e-4)
    np.testing.assert_allclose(result.ess, 50, rtol=1e-3)
    assert np.isnan(result.acceptance).all()


@pytest.fixture(scope="module")
def weighted(linear):
    images, _ = _many(linear)
    return log_likelihood(
        linear.vae, linear.wrong, jax.random.key(1), images, num_samples=8, batch_size=800
    )


def test_importance_weights_are_unbiased(linear, weighted):
    _, exact = _many(linear)
    assert _is_one(np.exp(weighted.log_prob - exact))
    assert (weighted.log_prob - exact).mean() < 0


def test_neither_chunks_nor_batches_change_the_bound(linear, weighted):
    images, _ = _many(linear)
    other = log_likelihood(
        linear.vae, linear.wrong, jax.random.key(1), images,
        num_samples=8, chunk_size=3, batch_size=300,
    )  # fmt: skip
    np.testing.assert_allclose(other.log_prob, weighted.log_prob, atol=1e-4)
    np.testing.assert_allclose(other.ess, weighted.ess, rtol=1e-3)


def test_a_posterior_for_each_image_takes_the_encoders_place(linear, weighted):
    images, _ = _many(linear)
    own = jax.vmap(lambda x: linear.vae.encode(linear.wrong.encoder, x))(images)
    other = log_likelihood(
        linear.vae, linear.exact, jax.random.key(1), images,
        posteriors=own, num_samples=8, batch_size=800,
    )  # fmt: skip
    np.testing.assert_allclose(other.log_prob, weighted.log_prob, atol=1e-4)


@pytest.mark.parametrize("scale", ["full", "broadcast"])
def test_posteriors_made_by_hand_with_an_axis_of_images_are_those_of_vmap(linear, scale):
    loc, key = np.full((len(linear.images), 2), 0.2, np.float32), jax.random.key(2)
    spread = jnp.full(2, 0.5)
    by_vmap = jax.vmap(lambda m: dist.Normal(m, spread).to_event(1))(loc)
    by_hand = dist.Normal(loc, jnp.full_like(loc, 0.5) if scale == "full" else 0.5).to_event(1)
    measures = (
        lambda q: (
            log_likelihood(
                linear.vae, linear.exact, key, linear.images, posteriors=q, num_samples=4
            ).log_prob
        ),
        lambda q: posterior_bounds(linear.vae, linear.exact, key, linear.images, q, num_samples=2),
    )
    for nats in measures:
        np.testing.assert_array_equal(nats(by_hand), nats(by_vmap))


def _not_finite(linear):
    """A model whose q is NaN, and every measurement of images with it."""
    q = lambda loc: dist.Normal(loc * jnp.nan, 1.0).to_event(1)
    vae = linear.vae._replace(encode=lambda encoder, x: q(encoder["weight"] @ x))
    arguments = vae, linear.exact, jax.random.key(0), linear.images[:3]
    search = gapjax.PosteriorSearch(1, num_heldout=2, steps_per_round=1, max_rounds=1)
    own = dist.Normal(jnp.full((3, 2), jnp.nan), 1.0, validate_args=False).to_event(1)
    return {
        "evaluate": lambda: gapjax.evaluate(*arguments),
        "log_likelihood": lambda: log_likelihood(*arguments, num_samples=2),
        "annealing": lambda: log_likelihood(*arguments, method=Annealing(2, 2, 1)),
        "log_likelihood of q": lambda: log_likelihood(*arguments, posteriors=own, num_samples=2),
        "posterior_bounds": lambda: posterior_bounds(*arguments, own),
        "encoder_gradient_norms": lambda: encoder_gradient_norms(*arguments),
        "newton": lambda: gapjax.refine(*arguments, gapjax.Refiner(num_steps=1)),
        "adam": lambda: gapjax.refine(*arguments, gapjax.Refiner("adam", 1)),
        "no steps": lambda: gapjax.refine(*arguments, gapjax.Refiner(num_steps=0)),
        "best_posteriors": lambda: gapjax.best_posteriors(*arguments, search=search),
        "ledger": lambda: measure(
            *arguments, {"own": linear.wrong.encoder}, search=None, method="importance"
        ),
    }


@pytest.mark.parametrize("name", [
    "evaluate", "log_likelihood", "annealing", "log_likelihood of q", "posterior_bounds",
    "encoder_gradient_norms", "newton", "adam", "no steps", "best_posteriors", "ledger",
])  # fmt: skip
def test_no_measurement_is_silent_about_what_is_not_finite(linear, name):
    whose = "that posterior has a NaN|encode raises: Normal distribution got invalid loc"
    with pytest.raises(FloatingPointError, match=f"image 0 .* 3 of 3 images .*: ({whose})"):
        _not_finite(linear)[name]()


def test_no_program_writes_a_nan_on_purpose(linear):
    """Under jax_debug_nans every result of a program is looked at."""
    search = gapjax.PosteriorSearch(1, num_heldout=2, steps_per_round=1, max_rounds=1)
    arguments = linear.vae, linear.wrong, jax.random.key(0), linear.images[:2]
    with jax.debug_nans(True):
        found = log_likelihood(*arguments, num_samples=3, chunk_size=2)
        assert np.isfinite(found.log_prob).all() and np.isnan(found.acceptance).all()
        log_likelihood(*arguments, method=Annealing(2, 2, 1))
        gapjax.refine(*arguments, gapjax.Refiner(num_steps=1))
        gapjax.best_posteriors(*arguments, search=search)


def test_memory_is_that_of_a_chunk(linear):
    def temporary_bytes(num_samples):
        program = _log_likelihoods.on(
            jax.devices()[:1], vae=linear.vae, annealing=None, local=False, num_samples=num_samples,
            chunk_size=100,
        )  # fmt: skip
        compiled = program.lower(
            linear.wrong.encoder, linear.wrong.decoder, jax.random.key(0), linear.images,
            np.arange(10),
        ).compile()  # fmt: skip
        return compiled.memory_analysis().temp_size_in_bytes

    # 5,000 keys more for each of 10 images, but neither z nor what the decoder makes of it.
    assert temporary_bytes(5000) < temporary_bytes(100) + 10 * 5000 * 20


@pytest.fixture(scope="module")
def between(linear):
    return sandwich(
        linear.vae, linear.wrong, jax.random.key(3), 800, annealing=_SHORT, batch_size=800
    )


def test_both_sides_of_the_sandwich_are_unbiased(linear, between):
    exact = linear.log_prob(between.images)
    assert _is_one(np.exp(between.lower - exact))
    assert _is_one(np.exp(exact - between.upper))


def test_the_truth_lies_between_the_two_sides(linear, between):
    exact = linear.log_prob(between.images)
    assert between.lower.mean() < exact.mean() < between.upper.mean()
    gaps = between.upper - between.lower
    assert between.gap == pytest.approx(gaps.mean(), abs=1e-5)
    assert between.gap_stderr == pytest.approx(gaps.std(ddof=1) / np.sqrt(800), rel=1e-4)


def test_chains_move_and_say_how_well(between):
    assert 0.6 < between.acceptance.mean() < 0.95
    assert np.all((between.ess > 0.999) & (between.ess < 2.001)) and between.ess.std() > 0.1


def test_annealing_serves_a_whole_set_with_a_posterior_for_each_image(linear):
    """From the exact posterior there is nothing to bridge: every weight is p(x)."""
    own = jax.vmap(lambda x: linear.vae.encode(linear.exact.encoder, x))(linear.images)
    result = log_likelihood(
        linear.vae, linear.wrong, jax.random.key(4), linear.images, posteriors=own, method=_SHORT
    )
    np.testing.assert_allclose(result.log_prob, linear.log_prob(linear.images), atol=1e-3)
    np.testing.assert_allclose(result.ess, _SHORT.num_chains, rtol=1e-3)


def test_bad_arguments_are_named(linear):
    arguments = linear.vae, linear.exact, jax.random.key(0)
    with pytest.raises(ValueError, match="'ais'"):
        log_likelihood(*arguments, linear.images, method="ais")
    with pytest.raises(ValueError, match="empty"):
        log_likelihood(*arguments, linear.images[:0])
    with pytest.raises(ValueError, match="num_samples is 0"):
        log_likelihood(*arguments, linear.images, num_samples=0)
    with pytest.raises(ValueError, match="num_chains is 0"):
        sandwich(*arguments, 3, annealing=Annealing(num_chains=0))
    with pytest.raises(ValueError, match=r"num_chains is 2\.0; it must be an integer"):
        sandwich(*arguments, 3, annealing=Annealing(num_chains=2.0))
    with pytest.raises(ValueError, match=r"num_leapfrog is 1\.5; it must be an integer"):
        log_likelihood(*arguments, linear.images, method=Annealing(num_leapfrog=1.5))
