"""Steps from the encoder's posterior: exact where they can be, never worse; Fisher information."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import gapjax
from gapjax import Refiner, refine
from gapjax.infer import newton
from gapjax.measure.bounds import posterior_bounds
from gapjax.model.bounds import bound_at
from gapjax.model.distributions import DiscretizedLogistic

_ONE = Refiner(num_steps=1)


def _key(seed=0):
    return jax.random.key(seed)


def test_one_newton_step_gives_the_exact_posterior_of_a_linear_gaussian_model(linear):
    refined = refine(linear.vae, linear.wrong, _key(), linear.images, _ONE)
    exact = jax.vmap(lambda x: linear.vae.encode(linear.exact.encoder, x))(linear.images)
    for ours, theirs in zip(
        jax.tree.leaves(refined.posteriors), jax.tree.leaves(exact), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    error = refined.bound - linear.log_prob(linear.images)  # of 12 samples of log p(x given z)
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5


def test_with_a_correlated_posterior_it_gives_the_best_diagonal_one(linear):
    """Its mean is exact, and its precision is the diagonal of the exact precision."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 2)).astype(np.float32)
    decoder = {"weight": jnp.asarray(weight), "bias": linear.exact.decoder["bias"]}
    params = gapjax.VAEParams(linear.wrong.encoder, decoder)
    q = refine(linear.vae, params, _key(), linear.images, _ONE).posteriors.base_dist
    precision = np.eye(2) + weight.T @ weight / 0.5**2
    residual = (linear.images - np.asarray(decoder["bias"])) @ weight / 0.5**2
    np.testing.assert_allclose(q.loc, np.linalg.solve(precision, residual.T).T, atol=1e-3)
    scale = np.broadcast_to(np.diag(precision) ** -0.5, q.scale.shape)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-3)


def _fresh(small, posteriors):
    return posterior_bounds(
        small.vae, small.params, _key(9), small.test_images, posteriors, num_samples=400
    )


def _grey():
    """An untrained decoder of three grey levels more than a cell table, and random images."""
    vae = gapjax.mlp_vae(
        (3, 4), "discretized_logistic", latent_dim=2, hidden_sizes=(16,), levels=20
    )
    images = np.random.default_rng(0).integers(0, 20, (9, 3, 4)).astype(np.uint8)
    return vae, vae.init(_key()), images


@pytest.mark.parametrize("method", ["newton", "adam"])
def test_it_closes_a_part_of_the_gap_of_an_over_fitted_encoder(small, method):
    steps = {"newton": Refiner(num_steps=2), "adam": Refiner("adam", 20, 8, 50, 0.05)}[method]
    start = jax.vmap(lambda x: small.vae.encode(small.params.encoder, x))(small.test_images)
    refined = refine(small.vae, small.params, _key(), small.test_images, steps)
    gain = _fresh(small, refined.posteriors) - _fresh(small, start)
    assert gain.mean() > 0.1
    assert gain.min() > -0.2
    np.testing.assert_allclose((refined.bound - refined.start).mean(), gain.mean(), rtol=0.3)


@pytest.mark.parametrize("of", ["binary", "grey"])
def test_no_newton_step_is_worse_at_the_points_that_judge(small, of):
    vae, params, images = _grey()
    if of == "binary":
        vae, params, images = small.vae, small.params, small.test_images

    def judged(index, x, q):
        points = newton._points(jax.random.fold_in(_key(), index), vae.prior.event_shape[0], 6)
        latents = jax.vmap(lambda u: q.base_dist.loc + q.base_dist.scale * u)(points)
        return bound_at(vae, params.decoder, x, q, latents)

    judged = jax.jit(jax.vmap(judged))
    bounds = [
        judged(
            jnp.arange(len(images)), images,
            refine(vae, params, _key(), images, Refiner(num_steps=k)).posteriors,
        )
        for k in (0, 1, 3)
    ]  # fmt: skip
    steps = np.diff(bounds, axis=0)
    assert steps.min() >= -1e-4 and steps.mean(1).min() > 0


@pytest.mark.parametrize(
    "refiner", [_ONE, Refiner("adam", 10, learning_rate=0.1)], ids=["newton", "adam"]
)
def test_what_is_said_to_be_won_is_won_on_fresh_noise_too(small, refiner):
    """The images' noise is their own, so that the error over images covers the spread over keys."""
    start = _fresh(small, refine(
        small.vae, small.params, _key(), small.test_images, Refiner(num_steps=0)
    ).posteriors)  # fmt: skip
    claimed, fresh = [], []
    for seed in range(12):
        refined = refine(small.vae, small.params, _key(seed), small.test_images, refiner)
        claimed.append(refined.bound - refined.start)
        fresh.append(_fresh(small, refined.posteriors) - start)
    claimed, fresh = np.array(claimed), np.array(fresh)
    excess = (claimed - fresh).mean(1)  # by key
    assert abs(excess.mean()) < 4 * excess.std(ddof=1) / len(excess) ** 0.5
    assert abs(excess.mean()) < 0.05
    stderr = claimed.std(1, ddof=1).mean() / claimed.shape[1] ** 0.5
    assert claimed.mean(1).std(ddof=1) < 2 * stderr
    assert fresh.std(0).mean() > 1e-3  # of an image over keys


def test_images_have_noise_of_their_own(small):
    same = np.stack([small.test_images[0]] * 8)
    for refiner in (_ONE, Refiner("adam", 2)):
        refined = refine(small.vae, small.params, _key(), same, refiner)
        assert np.ptp(refined.start) > 0.01
        assert np.ptp(refined.posteriors.base_dist.loc, axis=0).min() > 1e-4


def test_adam_keeps_the_start_of_an_image_that_it_makes_worse(small):
    refiner = Refiner("adam", 3, learning_rate=20.0)
    refined = refine(small.vae, small.params, _key(), small.test_images, refiner)
    encode = jax.vmap(lambda x: small.vae.encode(small.params.encoder, x))
    start = encode(small.test_images)
    np.testing.assert_array_equal(refined.bound, refined.start)
    for ours, theirs in zip(*map(jax.tree.leaves, (refined.posteriors, start)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("name", ["broadcast", "expanded", "bfloat16"])
@pytest.mark.parametrize("method", ["newton", "adam"])
def test_one_posterior_in_several_spellings_is_refined_to_one(linear, name, method):
    refiner = Refiner(method, 1, learning_rate=0.1)
    spell = {
        "broadcast": lambda m: dist.Normal(m, 0.5).to_event(1),
        "expanded": lambda m: dist.Normal(m, 0.5).expand([2]).to_event(1),
        "bfloat16": lambda m: dist.Normal(m, jnp.full(2, 0.5, jnp.bfloat16)).to_event(1),
    }[name]
    found = [
        refine(
            linear.vae._replace(encode=lambda encoder, x, q=q: q(encoder["weight"] @ x)),
            linear.exact, _key(), linear.images, refiner,
        )
        for q in (lambda m: dist.Normal(m, jnp.full(2, 0.5)).to_event(1), spell)
    ]  # fmt: skip
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.dtype == theirs.dtype


def test_the_information_of_an_expanded_likelihood_counts_every_pixel():
    written = newton.information(dist.Bernoulli(logits=jnp.full((2, 3), 0.4)).to_event(2))
    expanded = newton.information(dist.Bernoulli(logits=0.4).expand([2, 3]).to_event(2))
    for ours, theirs in zip(expanded, written, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_step_that_overshoots_is_shortened_or_refused():
    """log p(x given z) that falls off a cliff where a full step leads to: q stays where it is."""

    def decode(decoder, z):
        wall = jnp.where(jnp.abs(z) > 0.5, 1e6, 0.0)
        return dist.Normal(10 * z - wall * z, 0.1).to_event(1)

    encode = lambda encoder, x: dist.Normal(jnp.zeros(1), jnp.full(1, 0.05)).to_event(1)
    prior = dist.Normal(jnp.zeros(1), jnp.ones(1)).to_event(1)
    vae = gapjax.VAE(lambda key: gapjax.VAEParams(None, None), encode, decode, prior)
    images = np.array([[30.0], [1.0], [8.0]], np.float32)
    refined = refine(vae, gapjax.VAEParams({}, {}), _key(), images, _ONE)
    loc = np.asarray(refined.posteriors.base_dist.loc)[:, 0]
    assert loc[0] == 0.0 and refined.bound[0] == refined.start[0]
    np.testing.assert_allclose(loc[1], 0.1, rtol=0.01)
    assert 0.1 < loc[2] < 0.5 and refined.bound[2] > refined.start[2]


def test_an_image_is_refined_by_itself(small):
    refiner = Refiner(num_steps=2)
    whole = refine(small.vae, small.params, _key(), small.test_images, refiner)
    again = refine(small.vae, small.params, _key(), small.test_images, refiner)
    part = refine(small.vae, small.params, _key(), small.test_images[:5], refiner, batch_size=2)
    for first, second, third in zip(*map(jax.tree.leaves, (whole, again, part)), strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first[:5], third, rtol=1e-3, atol=1e-3)


def test_no_steps_leave_the_encoders_posterior(small):
    refined = refine(
        small.vae, small.params, _key(), small.test_images, Refiner(num_steps=0), batch_size=40
    )
    encode = jax.jit(jax.vmap(lambda x: small.vae.encode(small.params.encoder, x)))
    np.testing.assert_allclose(
        refined.posteriors.base_dist.loc, encode(small.test_images).base_dist.loc, rtol=1e-5
    )
    np.testing.assert_array_equal(refined.bound, refined.start)


def test_what_cannot_be_refined_is_refused_by_name(linear):
    exponential = lambda decoder, z: dist.Exponential(jnp.exp(z)).to_event(1)
    images = linear.images[:2]
    encode = lambda encoder, x: dist.Normal(x, 1.0).to_event(1)
    decoding = linear.vae._replace(encode=encode, decode=exponential)
    with pytest.raises(TypeError, match="information of Exponential"):
        refine(decoding, linear.exact, _key(), 1 + np.abs(np.round(images[:, :2])))
    with pytest.raises(TypeError, match="the prior is PlainNormal"):
        refine(linear.monte_carlo_vae, linear.exact, _key(), linear.images)
    with pytest.raises(ValueError, match="images is empty"):
        refine(linear.vae, linear.exact, _key(), images[:0])
    with pytest.raises(ValueError, match="'sgd'; it must be one of newton, adam"):
        refine(linear.vae, linear.exact, _key(), images, Refiner("sgd"))
    with pytest.raises(ValueError, match="num_judged=0"):
        refine(linear.vae, linear.exact, _key(), images, Refiner(num_judged=0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        refine(linear.vae, linear.exact, _key(), images, batch_size=0)


def test_adam_takes_posteriors_and_likelihoods_that_newton_does_not(linear):
    refined = refine(
        linear.monte_carlo_vae,
        linear.wrong,
        _key(),
        linear.images,
        Refiner("adam", 40, 4, 50, 0.05),
    )
    assert (refined.bound - refined.start).mean() > 0.3


@pytest.mark.parametrize("levels, least", [(11, 1.0), (256, 0.85)])
def test_the_information_is_the_variance_of_the_score(levels, least):
    """Summed over all levels in float64; that of the cells is no more, and not much less."""
    loc = np.array([-0.3, 0.0, 0.1, 0.52, 0.999, 1.2], np.float32)[:, None]
    scale = np.array([0.0009, 0.004, 0.03, 0.4], np.float32)
    make = lambda *given: DiscretizedLogistic(*given, levels, uniform_weight=256e-7)
    likelihood, bins = make(jnp.asarray(loc), jnp.asarray(scale)), levels - 1
    loc, scale = np.broadcast_arrays(np.float64(loc) * bins, np.float64(scale) * bins)
    every = jnp.broadcast_to(jnp.arange(levels)[:, None, None], (levels, *loc.shape))

    def log_prob(loc, scale):
        return jax.vmap(make(loc / bins, scale / bins).log_prob)(every)

    arguments = jnp.asarray(loc, jnp.float32), jnp.asarray(scale, jnp.float32)
    ones, zeros = jnp.ones(loc.shape), jnp.zeros(loc.shape)
    by_loc, by_scale = (
        np.asarray(jax.jit(lambda t: jax.jvp(log_prob, arguments, t)[1])(tangents), np.float64)
        for tangents in ((ones, zeros), (zeros, ones))
    )
    probs = np.exp(np.asarray(jax.jit(jax.vmap(likelihood.log_prob))(every), np.float64))
    found = np.asarray(jax.jit(newton.information)(likelihood).fisher)
    for (i, j), exact in {
        (0, 0): probs * by_loc**2, (1, 1): probs * by_scale**2, (0, 1): probs * by_loc * by_scale
    }.items():  # fmt: skip
        exact = exact.sum(0)
        np.testing.assert_array_equal(found[i, j], found[j, i])
        if i == j:
            tiny = 1e-5 * np.max(exact)
            assert np.all(found[i, j] <= exact * 1.001 + tiny)
            least_here = least if i == 0 else least - 0.3 * (levels > 12)
            assert np.all(found[i, j] >= exact * (least_here - 1e-3) - tiny)


@pytest.mark.parametrize("uniform_weight", [0.0, 256e-7])
def test_the_information_is_finite_where_a_decoder_is_certain(uniform_weight):
    likelihood = DiscretizedLogistic(
        jnp.array([-1e6, 0.0, 1.0, 1e6]), jnp.array([1e-9, 1e-6, 1e9, 1.0]),
        uniform_weight=uniform_weight,
    )  # fmt: skip
    assert np.isfinite(jax.jit(newton.information)(likelihood).fisher).all()


def test_the_information_of_a_bernoulli_and_of_a_normal():
    logits = jnp.array([-2.0, 0.0, 40.0])
    by_logits = newton.information(dist.Bernoulli(logits=logits).to_event(1))
    probs = np.asarray(jax.nn.sigmoid(logits))
    np.testing.assert_allclose(by_logits.fisher[0, 0], probs * (1 - probs), atol=1e-7)
    by_probs = newton.information(dist.Bernoulli(probs=jnp.asarray([0.5, 0.1])))
    np.testing.assert_allclose(by_probs.fisher[0, 0], [4.0, 1 / 0.09], rtol=1e-6)
    normal = newton.information(dist.Normal(jnp.zeros(2), jnp.array([0.5, 2.0])).to_event(1))
    np.testing.assert_allclose(normal.fisher[0, 0], [4.0, 0.25])
    np.testing.assert_allclose(normal.fisher[1, 1], [8.0, 0.5])
    np.testing.assert_allclose(normal.fisher[0, 1], 0.0)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda z: dist.Poisson(jnp.exp(z)).to_event(1),
        lambda z: dist.NegativeBinomial2(jnp.exp(z), jnp.array([1.5, 3.0, 0.7])).to_event(1),
        lambda z: dist.MultinomialLogits(z, 6),
    ],
)
def test_the_information_of_counts_is_the_covariance_of_the_slopes(likelihood):
    """Over all counts that are not vanishingly rare, of three features."""
    z = jnp.array([0.4, -0.2, 0.1])
    known = newton.information(likelihood(z))
    jacobian = jax.jacobian(lambda z: newton.information(likelihood(z)).parameters)(z)[0]
    found = jacobian.T @ jnp.diag(known.fisher[0, 0]) @ jacobian
    most = 7 if isinstance(likelihood(z), dist.MultinomialLogits) else 40
    counts = jnp.stack(jnp.meshgrid(*[jnp.arange(most)] * 3, indexing="ij"), -1).reshape(-1, 3)
    if most == 7:
        counts = counts[counts.sum(1) == 6]
    log_prob = lambda z, x: likelihood(z).log_prob(x)
    probs = np.exp(jax.vmap(log_prob, (None, 0))(z, counts))
    slopes = np.asarray(jax.vmap(jax.grad(log_prob), (None, 0))(z, counts))
    np.testing.assert_allclose(found, (probs[:, None] * slopes).T @ slopes, rtol=2e-3, atol=2e-4)


def test_other_families_are_refused_by_name():
    with pytest.raises(TypeError, match="Exponential"):
        newton.information(dist.Exponential(jnp.ones(3)).to_event(1))
    with pytest.raises(TypeError, match="the prior is MultivariateNormal with event shape"):
        newton.diagonal_normal(dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), "the prior")
    with pytest.raises(TypeError, match="the posterior is Normal with event shape"):
        newton.diagonal_normal(dist.Normal(0.0, 1.0), "the posterior")
