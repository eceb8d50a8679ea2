"""What `check_vae` sees of a model, and that it sees nothing wrong where nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from conftest import random_params

import gapjax
from gapjax.model.inspection import _disagree, _integral

RNG = np.random.default_rng(0)
IMAGES = (np.arange(24).reshape(6, 2, 2) % 3 == 0).astype(np.uint8)
VAE = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,))
PARAMS = random_params(VAE)


class Unnormalized:
    """A Gaussian whose log_prob forgets its constant."""

    def sample(self, rng_key):
        return jax.random.normal(rng_key, (2,))

    def log_prob(self, z):
        return -0.5 * (z**2).sum(-1)


def test_a_sound_model_is_described_and_has_no_problem():
    found = gapjax.check_vae(VAE, PARAMS, IMAGES)
    assert found.problems == ()
    lines = str(found).splitlines()
    assert lines[0] == "images: 6 of uint8 [2, 2], 0 to 1"
    assert lines[1].startswith("prior: Normal, fixed in training; samples are float32 [2], ")
    assert lines[2].startswith("posterior: Normal, reparameterized; samples are float32 [2], ")
    assert "BernoulliLogits, support " in lines[3] and "int32 [2, 2], 0 to 1" in lines[3]
    assert lines[4:] == ["no problem was seen"]


def test_all_that_is_wrong_is_told_at_once():
    """A q that rests on one example's batch mean, a prior left in the decoder, a wrong log_prob."""

    def encode(encoder, x):
        x = x.reshape(-1).astype(jnp.float32)[None]
        hidden = (x - x.mean(axis=0, keepdims=True))[0, :2] + encoder
        return dist.Normal(hidden, jnp.exp(encoder)).to_event(1)

    def decode(decoder, z):
        return dist.Normal(jnp.full((2, 2), decoder["loc"]) * z[0], 0.3).to_event(2)

    params = gapjax.VAEParams(jnp.zeros(2), {"loc": 1.0, "prior": jnp.zeros(2)})
    found = gapjax.check_vae(gapjax.VAE(None, encode, decode, Unnormalized()), params, IMAGES)
    for problem, words in zip(
        found.problems,
        (
            "neither encode nor decode uses params.decoder['prior']; what a prior has learned",
            "log_prob and samples of the prior do not agree",
            "q(z given x) is the same for 6 images",
            "uint8, the type of the images, cannot hold the model's samples, float32 [2, 2], ",
        ),
        strict=True,
    ):
        assert problem.startswith(words)
        assert f"PROBLEM: {problem}" in str(found).splitlines()


@pytest.mark.parametrize(
    "vae, params, images, words",
    [
        (VAE, PARAMS, 3 * IMAGES, "outside of the support"),
        (VAE, PARAMS, IMAGES[0, 0, 0], "scalar"),
        (VAE, PARAMS._replace(encoder=None), IMAGES, "encode fails"),
        (VAE._replace(prior=dist.Normal(jnp.zeros(2), 1.0)), PARAMS, IMAGES, "to_event"),
    ],
    ids=["support", "scalar", "params", "event"],
)  # fmt: skip
def test_what_an_entry_refuses_is_a_problem(vae, params, images, words):
    assert words in gapjax.check_vae(vae, params, images).problems[0]


CONTINUOUS = {
    "normal": scipy.stats.norm(2.0, 0.1),
    "gamma": scipy.stats.gamma(0.3),
    "beta": scipy.stats.beta(0.5, 3.0),
    "cauchy": scipy.stats.cauchy(),
}
INTEGER = {"poisson": scipy.stats.poisson(3.0), "rare": scipy.stats.bernoulli(1e-3)}


@pytest.mark.parametrize("name", [*CONTINUOUS, *INTEGER])
def test_the_integral_is_one_for_numbers_with_a_log_prob_each(name):
    of = CONTINUOUS.get(name) or INTEGER[name]
    values = of.rvs((2000, 3), random_state=RNG)
    log_probs = of.logpdf(values) if name in CONTINUOUS else of.logpmf(values)
    integral, error = _integral(values, log_probs)
    assert abs(integral - 1) < 5 * error + 1e-3 and error < 0.05
    assert not _disagree(integral, error) and _disagree(*_integral(values, log_probs + 0.7))


def test_the_integral_is_one_for_many_numbers_with_one_log_prob():
    matrix = RNG.normal(size=(20, 20))
    joint = scipy.stats.multivariate_normal(np.ones(20), matrix @ matrix.T)
    values = joint.rvs(2000, random_state=RNG)
    integral, error = _integral(values, joint.logpdf(values))
    assert abs(integral - 1) < 5 * error and error < 0.1
    for wrong in (joint.logpdf(values) / 20, joint.logpdf(2 * values)):
        assert _disagree(*_integral(values, wrong))
    one = RNG.normal(size=(2000, 1))
    assert not _disagree(*_integral(one, scipy.stats.norm.logpdf(one[:, 0])))
    simplex = scipy.stats.dirichlet(np.ones(4)).rvs(2000, random_state=RNG)
    assert not _disagree(*_integral(simplex, np.full(2000, np.log(6.0))))  # it has no volume


def test_what_is_not_finite_is_explained():
    nan = PARAMS._replace(encoder=jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS.encoder))
    (problem,) = gapjax.check_vae(VAE, nan, IMAGES).problems
    assert problem == "the ELBO of image 0 is not finite: params.encoder has a NaN"
