"""What users may write themselves: sources, posterior families, and priors that have no hash."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_bits, num_programs, random_params

import gapjax
from gapjax.fit.sources import draw_examples
from gapjax.model.free import from_free, to_free
from gapjax.vae import local_inference

# --- sources ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyImages:
    """A user's source: the images of a cyclic order, each with fresh noise."""

    images: jax.Array
    scale: jax.Array

    @property
    def num_examples(self):
        return len(self.images)

    def begin_epoch(self, rng_key):
        return jax.random.randint(rng_key, (), 0, self.num_examples)

    def draw(self, plan, rng_key, position):
        x = self.images[(plan + position) % self.num_examples]
        return x + self.scale * jax.random.normal(rng_key, x.shape)


def _sources(linear):
    data = gapjax.data_source(linear.images)
    model = gapjax.model_source(linear.vae, linear.exact.decoder, len(linear.images))
    mixture = functools.partial(gapjax.mixture_source, model)
    return {
        "data": data,
        "model": model,
        "mixture": mixture(data, 0.5),
        "stratified": mixture(data, 0.5, stratified=True),
        "user": NoisyImages(data.images, jnp.float32(0.1)),
        "mixture_of_user": mixture(NoisyImages(data.images, jnp.float32(0.1)), 0.5),
    }


@jax.jit
def _epoch(source, rng_key):
    """The examples of an epoch, by `draw_examples` and one by one; and the plan."""
    plan_key, draw_key = jax.random.split(rng_key)
    plan = source.begin_epoch(plan_key)
    positions = jnp.arange(source.num_examples)
    keys = jax.random.split(draw_key, source.num_examples)
    one_by_one = jax.vmap(functools.partial(source.draw, plan))(keys, positions)
    return draw_examples(source, plan, keys, positions), one_by_one


SOURCES = ["data", "model", "mixture", "stratified", "user", "mixture_of_user"]


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_the_protocol(linear, name):
    source = _sources(linear)[name]
    leaves, treedef = jax.tree.flatten(source)
    assert leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert treedef == jax.tree.structure(jax.tree.unflatten(treedef, leaves))
    hash(treedef)
    assert isinstance(source.num_examples, int) and source.num_examples == 20

    together, one_by_one = _epoch(source, jax.random.key(0))
    assert together.shape == (20, 6) and together.dtype == jnp.float32
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-6)
    again, _ = _epoch(source, jax.random.key(0))
    other, _ = _epoch(source, jax.random.key(1))
    np.testing.assert_array_equal(together, again)
    assert np.any(np.asarray(together) != np.asarray(other))


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_can_be_trained_on(linear, name):
    source, optimizer = _sources(linear)[name], gapjax.adam(1e-3)
    init, step = gapjax.kernel(linear.vae, source, optimizer, batch_size=8)
    state = jax.eval_shape(init, linear.wrong, jax.random.key(0))
    after, info = jax.eval_shape(step, state)  # traced; nothing is compiled
    assert after == state
    assert (info.objective.shape, info.objective.dtype) == ((), jnp.float32)


# --- posteriors -------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Laplace:
    """A user's posterior: a pytree of arrays with the two methods that are needed."""

    loc: jax.Array
    log_scale: jax.Array

    def sample(self, rng_key):
        return self.loc + jnp.exp(self.log_scale) * jax.random.laplace(rng_key, self.loc.shape)

    def log_prob(self, z):
        distance = jnp.abs(z - self.loc) / jnp.exp(self.log_scale)
        return (-distance - self.log_scale - jnp.log(2.0)).sum(-1)


def _family(name):
    if name != "user":
        return gapjax.mlp_vae((3, 3), latent_dim=2, hidden_sizes=(8,), posterior=name)
    vae = gapjax.mlp_vae((3, 3), latent_dim=2, hidden_sizes=(8,))

    def encode(encoder, x):
        q = vae.encode(encoder, x).base_dist
        return Laplace(q.loc, jnp.log(q.scale))

    return vae._replace(encode=encode)


@pytest.mark.parametrize("name", ["diagonal", "full_covariance", "flow", "user"])
def test_every_posterior_family_keeps_the_protocol(name):
    vae = _family(name)
    params, x = random_params(vae), jnp.ones((3, 3), jnp.uint8)

    @jax.jit
    def everything(params, rng_key):
        q = vae.encode(params.encoder, x)
        free = to_free(q)
        z = q.sample(rng_key)

        def bound(free):
            own = gapjax.VAEParams(from_free(q, free), params.decoder)
            return gapjax.elbo(local_inference(vae), own, rng_key, x)

        value, gradient = jax.value_and_grad(bound)(free)
        by_encoder = gapjax.elbo(vae, params, rng_key, x)
        return z, q.log_prob(z), from_free(q, free).log_prob(z), value, by_encoder, gradient

    z, log_q, log_q_again, value, by_encoder, gradient = everything(params, jax.random.key(0))
    assert z.shape == (2,) and log_q.shape == ()
    np.testing.assert_allclose(log_q_again, log_q, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, by_encoder, rtol=1e-4, atol=1e-4)
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in gradient)


# --- models without a hash --------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayPrior:
    """A user's prior, which holds arrays: it has no hash, and `==` has no truth value."""

    loc: jax.Array
    scale: jax.Array

    def sample(self, rng_key):
        return self.loc + self.scale * jax.random.normal(rng_key, self.loc.shape)

    def log_prob(self, z):
        standard = (z - self.loc) / self.scale
        return (-0.5 * standard**2 - jnp.log(self.scale) - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def test_a_prior_that_holds_arrays_works_everywhere(linear):
    """And a second call finds the compiled programs of the first."""
    vae = linear.vae._replace(prior=ArrayPrior(jnp.zeros(2), jnp.ones(2)))
    with pytest.raises(TypeError, match="unhashable"):
        hash(vae)
    images, rng_key = linear.images[:8], jax.random.key(0)
    options = {"num_epochs": 1, "batch_size": 8}
    state, curve = gapjax.train(vae, gapjax.data_source(images), rng_key, **options)
    before = num_programs()
    same = linear.vae._replace(prior=ArrayPrior(jnp.zeros(2), jnp.ones(2)))
    again, _ = gapjax.train(same, gapjax.data_source(images), rng_key, **options)
    assert_same_bits(again, state)
    assert num_programs() == before
    for model in (same, vae):
        refit = gapjax.self_consistent(model, state.params, images, rng_key, **options)
    assert np.isfinite(curve.loss_bpd[0]) and np.isfinite(refit.curve.loss_bpd[0])
    assert num_programs() == before + 1
    # The same prior by the closed form: only the estimate of the KL differs.
    ours, theirs = (
        gapjax.evaluate(model, linear.exact, rng_key, images, num_samples=4)
        for model in (vae, linear.monte_carlo_vae)
    )
    np.testing.assert_allclose(ours.per_image, theirs.per_image, rtol=1e-4)
    account = gapjax.ledger(
        vae, linear.exact, rng_key, images, images, num_samples=2, num_images=None,
        search=gapjax.PosteriorSearch(1, num_heldout=2, steps_per_round=1, max_rounds=1),
        method="importance", num_importance_samples=4,
    )  # fmt: skip
    assert np.isfinite(account.test.log_prob.nats) and np.isfinite(account.test.optimal.nats)
