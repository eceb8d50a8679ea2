"""The best posterior of each image: it is found, never worse than its start, and by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapjax
from gapjax import PosteriorSearch, best_posteriors, optimizers, parallel
from gapjax.infer import search
from gapjax.measure.bounds import posterior_bounds
from gapjax.measure.log_likelihood import log_likelihood

_SEARCH = PosteriorSearch()
_WILD = PosteriorSearch(num_samples=1, learning_rate=3.0, steps_per_round=2, max_rounds=2)


def _missing(linear, posteriors):
    """KL(q || p(z given x)) of Gaussians q for every image, nats, in closed form."""
    x = linear.images[: len(posteriors.base_dist.loc)]
    exact = jax.vmap(lambda x: linear.vae.encode(linear.exact.encoder, x).base_dist)(x)
    q = posteriors.base_dist
    ratio, shift = (q.scale / exact.scale) ** 2, ((q.loc - exact.loc) / exact.scale) ** 2
    return 0.5 * np.asarray(ratio + shift - 1 - jnp.log(ratio)).sum(-1)


def _search(linear, **options):
    options = {"search": _SEARCH, "batch_size": 7, **options}
    return best_posteriors(linear.vae, linear.wrong, jax.random.key(0), linear.images, **options)


@pytest.fixture(scope="module")
def found(linear):
    done = []
    return _search(linear, on_progress=done.append), done


def test_it_finds_the_exact_posterior_where_the_family_has_it(linear, found):
    """The wrong encoder loses about a nat; what the search leaves is below its tolerance."""
    result, _ = found
    start = jax.vmap(lambda x: linear.vae.encode(linear.wrong.encoder, x))(linear.images)
    assert _missing(linear, start).mean() > 0.5
    assert _missing(linear, result.posteriors).mean() < _SEARCH.tolerance
    assert result.converged.all() and not result.kept_start.any()


def test_a_refined_posterior_is_a_start(linear):
    """One Newton step is exact here, and the search by itself has hardly begun."""
    short = PosteriorSearch(num_samples=1, learning_rate=1e-6, steps_per_round=1, max_rounds=1)
    alone, refined = (
        _search(linear, search=short, refiner=refiner)
        for refiner in (None, gapjax.Refiner(num_steps=1))
    )
    assert _missing(linear, alone.posteriors).mean() > 0.5
    assert _missing(linear, refined.posteriors).max() < 1e-3


def test_finished_images_stop_and_are_counted(linear, found):
    result, done = found
    assert len(set(result.num_steps.tolist())) > 1
    assert len(done) == result.num_steps.max() // _SEARCH.steps_per_round
    assert done == sorted(done) and done[-1] == len(linear.images)
    rounds = result.num_steps // _SEARCH.steps_per_round
    assert done == [(rounds <= n + 1).sum() for n in range(len(done))]


def test_an_image_is_searched_for_by_itself(linear, found):
    """Its result depends on neither the batch size nor when the others were finished."""
    result, _ = found
    other = _search(linear, batch_size=20)
    np.testing.assert_array_equal(result.num_steps, other.num_steps)
    for ours, theirs in zip(
        jax.tree.leaves(result.posteriors), jax.tree.leaves(other.posteriors), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_search_is_divided_among_the_devices(linear, found, monkeypatch):
    """Batches of seven on three devices; and so are bounds and estimates of log p(x)."""
    if len(jax.devices()) < 3:
        pytest.skip("needs three devices; XLA_FLAGS was set from outside")
    result, used = found[0], {"devices": jax.devices()[:3]}
    divided = set()

    def compiled(program, devices, static, _compiled=parallel._compiled):
        if len(devices) == 3 and program.over == "shards":
            divided.add(program.function.__name__)
        return _compiled(program, devices, static)

    monkeypatch.setattr(parallel, "_compiled", compiled)
    other = _search(linear, **used)
    np.testing.assert_array_equal(result.num_steps, other.num_steps)
    for ours, theirs in zip(
        jax.tree.leaves(result.posteriors), jax.tree.leaves(other.posteriors), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    arguments = linear.vae, linear.wrong, jax.random.key(1), linear.images
    measures = [
        lambda **options: posterior_bounds(
            *arguments, result.posteriors, num_samples=3, batch_size=7, **options
        ),
        lambda **options: (
            log_likelihood(*arguments, num_samples=20, batch_size=7, **options).log_prob
        ),
    ]
    for measure in measures:
        np.testing.assert_allclose(measure(**used), measure(), rtol=1e-4, atol=1e-4)
    assert divided == {"_walk", "_judge", "_posterior_bounds", "_log_likelihoods"}


def test_it_is_never_worse_than_the_best_of_its_starts(linear):
    """A learning rate that throws every image away: the better encoder's q comes back."""
    encoders = [linear.wrong.encoder, linear.exact.encoder]
    result = _search(linear, search=_WILD, encoders=encoders)
    assert result.kept_start.all() and not result.converged.any()
    assert np.all(result.num_steps == 4)
    np.testing.assert_allclose(_missing(linear, result.posteriors), 0.0, atol=1e-5)


def test_an_image_goes_back_to_its_best_from_where_it_is_worse_and_on_from_where_it_is_better(
    linear,
):
    images, batch = linear.images[:3], np.arange(3)
    keys = search._keys.on(steps=1, count=50)(jax.random.key(0), batch, None)
    wrong, exact = (
        [np.asarray(leaf) for leaf in search._encode(p.encoder, images, vae=linear.vae)]
        for p in (linear.wrong, linear.exact)
    )

    def judge(state, free, candidate):
        state = state._replace(free=[*map(jnp.array, free)], candidate=[*map(jnp.array, candidate)])
        encoder, decoder = linear.exact
        return search._judge(
            state, encoder, decoder, keys, images, batch, devices=jax.devices()[:1],
            vae=linear.vae, search=_SEARCH,
        )  # fmt: skip

    start = search._Search(
        free=wrong, opt_state=jax.vmap(optimizers.adam(_SEARCH.learning_rate).init)(wrong),
        candidate=wrong, best=[*map(jnp.array, wrong)], best_value=jnp.full(3, -jnp.inf),
        num_steps=jnp.zeros(3, jnp.int32), plateaus=jnp.zeros(3, jnp.int32),
        improved=jnp.zeros(3, bool),
    )  # fmt: skip
    state = judge(start, wrong, wrong)
    elsewhere = [leaf + 1 for leaf in wrong]
    state = judge(state, elsewhere, exact)
    np.testing.assert_array_equal(state.free, elsewhere)
    np.testing.assert_array_equal(state.best, exact)
    state = judge(state, elsewhere, wrong)
    np.testing.assert_array_equal(state.free, exact)
    np.testing.assert_array_equal(state.best, exact)
    np.testing.assert_array_equal(state.plateaus, 1)


def test_every_image_step_and_sample_has_noise_of_its_own():
    batch, num_steps = np.arange(3), jnp.array([0, 0, 5])
    keys = [
        search._keys.on(steps=4, count=6)(jax.random.key(0), batch, num_steps),
        search._keys.on(steps=1, count=6)(jax.random.key(0), batch, None),
    ]
    data = np.concatenate([np.asarray(jax.random.key_data(k)).reshape(-1, 2) for k in keys])
    assert len(np.unique(data, axis=0)) == 3 * 4 * 6 + 3 * 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OwnNormal:
    """A user's posterior: a pytree of two arrays with the two methods that are needed."""

    loc: jax.Array
    log_scale: jax.Array

    def sample(self, rng_key):
        return self.loc + jnp.exp(self.log_scale) * jax.random.normal(rng_key, self.loc.shape)

    def log_prob(self, z):
        standard = (z - self.loc) / jnp.exp(self.log_scale)
        return (-0.5 * standard**2 - self.log_scale - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def test_a_posterior_of_ones_own_will_do(linear):
    encode = lambda encoder, x: _OwnNormal(jnp.zeros(2), jnp.zeros(2))
    vae = linear.vae._replace(encode=encode)
    result = best_posteriors(
        vae, linear.exact, jax.random.key(0), linear.images[:7], search=_SEARCH
    )
    exact = jax.vmap(lambda x: linear.vae.encode(linear.exact.encoder, x).base_dist)
    exact = exact(linear.images[:7])
    np.testing.assert_allclose(result.posteriors.loc, exact.loc, atol=0.1)
    np.testing.assert_allclose(result.posteriors.log_scale, jnp.log(exact.scale), atol=0.15)


def test_a_posterior_that_cannot_be_optimised_is_refused(linear):
    encode = lambda encoder, x: linear.monte_carlo_vae.prior  # a bare object, no pytree
    vae = linear.vae._replace(encode=encode)
    with pytest.raises(TypeError, match=r"PlainNormal cannot be optimised.*register_dataclass"):
        best_posteriors(vae, linear.exact, jax.random.key(0), linear.images)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"search": PosteriorSearch(num_samples=0)}], ids=str
)
def test_sizes_are_checked(linear, options):
    with pytest.raises(ValueError, match="must be positive"):
        _search(linear, **options)
    with pytest.raises(ValueError, match=r"max_rounds is 3\.0; it must be an integer"):
        _search(linear, search=PosteriorSearch(max_rounds=3.0))
    with pytest.raises(ValueError, match="images is empty"):
        best_posteriors(linear.vae, linear.exact, jax.random.key(0), linear.images[:0])
    with pytest.raises(ValueError, match="encoders is empty"):
        _search(linear, encoders=[])
