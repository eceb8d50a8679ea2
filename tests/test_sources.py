"""Sources: every image once an epoch, the right share from each, and arrays that are leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import assert_same_bits

import gapjax
from gapjax.fit import sources
from gapjax.fit.sources import draw_examples, weighted_source
from gapjax.model.distributions import DiscretizedLogistic
from gapjax.vae import sample_model

N = 400


def _coin_vae():
    """A model on one pixel of 256 levels that gives levels of 100 and above, its z apart."""
    prior = dist.Normal(jnp.zeros(1), jnp.ones(1)).to_event(1)
    decode = lambda decoder, z: DiscretizedLogistic(
        decoder + 0.02 * jnp.tanh(z), jnp.full(1, 0.01), 256
    ).to_event(1)
    return gapjax.VAE(lambda rng_key: None, lambda encoder, x: prior, decode, prior)


VAE = _coin_vae()
DECODER = jnp.full(1, 0.7)  # far above the images' levels
IMAGES = np.arange(N, dtype=np.int32)[:, None] % 100  # [N, 1], levels below 100


@functools.partial(jax.jit, static_argnames="num_draws")
def _epoch(source, rng_key, num_draws=N):
    """The examples [num_draws, *event] of one epoch, in order."""
    return draw_examples(source, *_plan_keys_positions(source, rng_key, num_draws))


@functools.partial(jax.jit, static_argnames="num_draws")
def _one_by_one(source, rng_key, num_draws=N):
    """The same epoch by the source's own `draw`."""
    plan, keys, positions = _plan_keys_positions(source, rng_key, num_draws)
    return jax.vmap(functools.partial(source.draw, plan))(keys, positions)


def _plan_keys_positions(source, rng_key, num_draws):
    plan_key, draw_key = jax.random.split(rng_key)
    positions = jnp.arange(num_draws)
    keys = jax.vmap(lambda i: jax.random.fold_in(draw_key, i))(positions)
    return source.begin_epoch(plan_key), keys, positions


@pytest.fixture(scope="module")
def model():
    return gapjax.model_source(VAE, DECODER, N)


@pytest.fixture(scope="module")
def data():
    return gapjax.data_source(IMAGES)


def test_an_epoch_of_data_is_every_image_once_in_a_fresh_order():
    images = np.arange(N, dtype=np.uint16)
    source = gapjax.data_source(images)
    assert source.num_examples == N
    epochs = [np.asarray(_epoch(source, jax.random.key(seed))) for seed in (0, 1)]
    for epoch in epochs:
        assert epoch.dtype == images.dtype
        np.testing.assert_array_equal(np.sort(epoch), images)
        assert np.mean(epoch == images) < 0.1
    assert np.mean(epochs[0] == epochs[1]) < 0.1


def test_images_stay_as_they_are_stored():
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3)).astype(np.uint8)
    source = gapjax.data_source(images)
    draws = np.asarray(_epoch(source, jax.random.key(0), 5))
    assert draws.dtype == np.uint8
    assert sorted(x.tobytes() for x in draws) == sorted(x.tobytes() for x in images)


def test_model_draws_are_samples_of_the_model(model):
    rng_key = jax.random.key(3)
    drawn = jax.jit(lambda key: model.draw(model.begin_epoch(key), key, 0))(rng_key)
    sampled = jax.jit(lambda key: sample_model(VAE, DECODER, key))(rng_key)
    np.testing.assert_array_equal(drawn, sampled)
    assert model.num_examples == N
    epoch = np.asarray(_epoch(model, rng_key))
    assert len(np.unique(epoch)) > 5 and epoch.min() >= 100


@pytest.mark.parametrize("alpha, from_model", [(0, False), (0.0, False), (1, True), (1.0, True)])
def test_both_ends_are_exact_as_numbers_and_as_arrays(model, data, alpha, from_model):
    """The very draws, and the type of them, are those of the traced alpha at its end."""
    rng_key = jax.random.key(4)
    by_number = _epoch(gapjax.mixture_source(model, data, alpha), rng_key)
    by_array = _epoch(gapjax.mixture_source(model, data, jnp.float32(alpha)), rng_key)
    assert np.all((np.asarray(by_array) >= 100) == from_model)
    np.testing.assert_array_equal(by_number, by_array)
    if not from_model:
        np.testing.assert_array_equal(np.sort(np.asarray(by_number), 0), np.sort(IMAGES, 0))


@pytest.mark.parametrize("alpha", [0, 0.3, 1, np.float32(1)])
def test_a_mixture_draws_in_the_type_of_the_data(model, alpha):
    source = gapjax.mixture_source(model, gapjax.data_source(IMAGES.astype(np.uint8)), alpha)
    assert source.num_examples == N
    draws = jax.eval_shape(_epoch, source, jax.random.key(0))
    assert (draws.dtype, draws.shape) == (jnp.uint8, (N, 1))


_LIKELIHOODS = {
    "bernoulli": lambda z: dist.Bernoulli(logits=jnp.zeros(2)).to_event(1),
    "normal": lambda z: dist.Normal(1.5 + jnp.zeros(2), 2.0).to_event(1),
    "counts": lambda z: dist.Poisson(200 + jnp.zeros(2)).to_event(1),
    "many_levels": lambda z: DiscretizedLogistic(jnp.zeros(2), 0.1, 1000).to_event(1),
}


@pytest.mark.parametrize(
    "likelihood, of_data, expected",
    [
        ("bernoulli", "uint8", "uint8"),
        ("bernoulli", "float32", "float32"),
        ("normal", "uint8", "float32"),
        ("normal", "float16", "float32"),
        ("counts", "uint8", "int32"),
        ("counts", "int16", "int32"),
        ("counts", "bfloat16", "float32"),
        ("many_levels", "uint8", "uint16"),
    ],
)
def test_no_sample_of_the_model_is_changed(likelihood, of_data, expected):
    """It is not cast to the data's dtype unless it fits: x has a dtype that holds both."""
    decode = lambda decoder, z: _LIKELIHOODS[likelihood](z)
    model = gapjax.model_source(VAE._replace(decode=decode), jnp.zeros(()), 8)
    data = gapjax.data_source(jnp.ones((8, 2), of_data))
    key = jax.random.key(0)
    samples = jax.vmap(lambda key: sample_model(model.vae, None, jax.random.split(key)[0]))
    for alpha, only in ((0, "data"), (1, "model"), (jnp.float32(0.5), None)):
        source = gapjax.mixture_source(model, data, alpha)
        drawn = [jax.eval_shape(f, source, key, 8).dtype for f in (_epoch, _one_by_one)]
        assert (drawn, source.only) == ([jnp.dtype(expected)] * 2, only)
    if expected == of_data or of_data != "uint8":
        return
    plan, keys, positions = _plan_keys_positions(source, key, 8)
    drawn = np.asarray(draw_examples(source, plan, keys, positions), np.float64)
    exact = np.where(np.asarray(plan[0])[:, None], np.asarray(samples(keys), np.float64), 1)
    np.testing.assert_array_equal(drawn, exact)


def test_what_no_dtype_holds_is_refused(model):
    data = gapjax.data_source(np.ones((N, 1), np.uint32))
    counts = gapjax.model_source(
        VAE._replace(decode=lambda decoder, z: dist.Poisson(jnp.ones(1)).to_event(1)), DECODER, N
    )
    with pytest.raises(TypeError, match="no dtype holds both int32 and uint32"):
        jax.eval_shape(_epoch, gapjax.mixture_source(counts, data, 0.5), jax.random.key(0))
    with pytest.raises(ValueError, match="num_examples is 0"):
        gapjax.model_source(VAE, DECODER, 0)


@pytest.mark.parametrize("num_draws", [N, 30])
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_many_draws_at_once_are_the_draws_of_each(model, data, alpha, num_draws):
    mixtures = (
        gapjax.mixture_source(model, data, jnp.float32(alpha), stratified=stratified)
        for stratified in (False, True)
    )
    for source in (data, model, *mixtures):
        together = _epoch(source, jax.random.key(8), num_draws)
        alone = _one_by_one(source, jax.random.key(8), num_draws)
        assert together.dtype == alone.dtype
        np.testing.assert_array_equal(together, alone)


def test_a_mixture_asks_the_model_for_no_more_than_it_takes(data):
    """But for the last block; each sample of the model costs a pass through its decoder."""
    drawn = []

    def decode(decoder, z):
        jax.debug.callback(lambda z: drawn.append(z), z)
        return VAE.decode(decoder, z)

    model = gapjax.model_source(VAE._replace(decode=decode), DECODER, N)
    for alpha, most in ((0.0, 0), (0.3, 250), (1.0, 500)):
        drawn.clear()
        _epoch(gapjax.mixture_source(model, data, jnp.float32(alpha)), jax.random.key(9))
        jax.effects_barrier()
        assert len(drawn) == most


def test_the_share_is_alpha_for_each_example_apart(model, data):
    """Over epochs the count is binomial, at every position; so it is not drawn per batch."""
    alpha, epochs = 0.3, 100
    source = gapjax.mixture_source(model, data, alpha)
    draws = [_epoch(source, jax.random.key(seed)) for seed in range(epochs)]
    from_model = np.stack(draws)[..., 0] >= 100  # [epochs, N]
    spread = np.sqrt(alpha * (1 - alpha))
    assert abs(from_model.mean() - alpha) < 4.5 * spread / np.sqrt(epochs * N)
    assert np.all(abs(from_model.mean(0) - alpha) < 5 * spread / np.sqrt(epochs))
    per_epoch = from_model.mean(1)
    np.testing.assert_allclose(per_epoch.std(), spread / np.sqrt(N), rtol=0.3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.98, 1.0])
def test_a_stratified_mixture_has_its_share_in_every_batch(model, data, alpha):
    source = gapjax.mixture_source(model, data, jnp.float32(alpha), stratified=True)
    from_model = np.asarray(_epoch(source, jax.random.key(5)))[:, 0] >= 100
    for size in (20, 50):
        counts = from_model.reshape(-1, size).sum(1)
        assert np.all(abs(counts - alpha * size) < 1)
        assert alpha != 0.5 or np.all(counts == size // 2)


def test_the_first_n_examples_have_floor_of_alpha_n_of_the_model():
    """For every n, where the product in float32 is rounded to another integer."""
    number = 60_000
    exact = [(0, 1), (1, 1), (1, 2), (1, 3), (2, 7), (1, 1024), (1, 100_000), (617, 5000)]
    exact += [(thousandths, 1000) for thousandths in range(7, 1000, 124)]
    p, q = np.array(exact).T
    strata = jax.jit(jax.vmap(lambda alpha: sources._strata(alpha, number)))
    counts = np.asarray(strata(jnp.asarray(p / q, jnp.float32))).cumsum(1)
    n = np.arange(1, number + 1)
    np.testing.assert_array_equal(counts, p[:, None] * n // q[:, None])
    in_float32 = np.floor(np.float32(p / q)[:, None] * n.astype(np.float32))
    assert np.any(counts != in_float32)


def test_a_stratified_mixture_takes_no_training_image_twice(model):
    data = gapjax.data_source(np.arange(N, dtype=np.uint16)[:, None] % 100)
    source = gapjax.mixture_source(model, data, 0.5, stratified=True)
    epochs = [np.asarray(_epoch(source, jax.random.key(seed)))[:, 0] for seed in range(2)]
    images = [epoch[epoch < 100] for epoch in epochs]
    for taken in images:
        assert len(taken) == N // 2 and np.bincount(taken).max() <= N // 100
    assert np.any(np.sort(images[0]) != np.sort(images[1]))  # another half of them


@pytest.mark.parametrize("stratified", [False, True])
def test_any_alpha_takes_the_draws_of_the_ends(model, data, stratified):
    rng_key = jax.random.key(6)
    source_of = lambda alpha: gapjax.mixture_source(
        model, data, jnp.float32(alpha), stratified=stratified
    )
    draws = [np.asarray(_epoch(source_of(alpha), rng_key)) for alpha in (0.0, 0.5, 1.0)]
    from_model = draws[1] >= 100
    assert 0 < from_model.mean() < 1
    np.testing.assert_array_equal(draws[1], np.where(from_model, draws[2], draws[0]))


def test_a_sweep_over_alpha_is_one_vmapped_program(model, data):
    alphas, rng_key = jnp.array([0.0, 0.25, 1.0]), jax.random.key(7)
    sweep = jax.jit(jax.vmap(lambda a: _epoch(gapjax.mixture_source(model, data, a), rng_key)))
    for alpha, draws in zip(alphas, sweep(alphas), strict=True):
        alone = _epoch(gapjax.mixture_source(model, data, alpha), rng_key)
        np.testing.assert_array_equal(draws, alone)


@pytest.mark.parametrize("alpha", [1.5, -0.1, float("nan"), np.array([0.5, 2.0])])
def test_alpha_outside_the_unit_interval_is_refused(model, data, alpha):
    with pytest.raises(ValueError, match="alpha is"):
        gapjax.mixture_source(model, data, alpha)


def _levels(low):
    """A source whose draws say which it is."""
    return gapjax.data_source(IMAGES + low)


def test_two_weights_are_the_mixture_to_the_draw(model, data):
    rng_key = jax.random.key(10)
    for weights, alpha in (((1, 3), 0.25), ((0, 2.0), 0), ((2, 0), 1)):
        weighted = _epoch(weighted_source((model, data), weights), rng_key)
        np.testing.assert_array_equal(
            weighted, _epoch(gapjax.mixture_source(model, data, alpha), rng_key)
        )


@pytest.mark.parametrize("traced", [False, True])
def test_each_source_has_its_share(traced):
    weights, epochs = [1.0, 4.0, 2.0, 0.0, 3.0], 40
    sources = [_levels(1000 * number) for number in range(5)]
    source = weighted_source(sources, [jnp.float32(w) for w in weights] if traced else weights)
    draws = np.stack([_epoch(source, jax.random.key(seed)) for seed in range(epochs)])
    shares = np.array([np.mean(draws // 1000 == number) for number in range(5)])
    expected = np.array(weights) / 10
    assert np.all(abs(shares - expected) <= 4.5 * np.sqrt(expected / (epochs * N)))
    only = weighted_source(sources, [0, 0, 1, 0, 0])
    assert np.all(np.asarray(_epoch(only, jax.random.key(0))) // 1000 == 2)


def test_traced_weights_may_all_but_one_be_zero(data):
    sweep = jax.jit(
        jax.vmap(
            lambda weights: _epoch(
                weighted_source([_levels(1000 * n) for n in range(3)], list(weights)),
                jax.random.key(12),
            )
        )
    )
    for number, draws in enumerate(sweep(jnp.eye(3))):
        assert np.all(np.asarray(draws) // 1000 == number)


@pytest.mark.parametrize(
    "sources, weights, message",
    [
        (2, [1.0], "2 sources cannot have 1 weights"),
        (0, [], "0 sources"),
        (2, [1.0, -0.1], "none may be below 0"),
        (2, [float("nan"), 1.0], "none may be below 0"),
        (2, [0, 0.0], "at least one must be above 0"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(data, sources, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_source([data] * sources, weights)
    with pytest.raises(ValueError, match=r"\[7, 400\] examples"):
        weighted_source([data, gapjax.data_source(IMAGES[:7])], [1, 1])


def test_a_data_source_of_nothing_is_refused():
    with pytest.raises(ValueError, match="images is empty"):
        gapjax.data_source(np.zeros((0, 8, 8), np.uint8))


def test_sources_are_pytrees_whose_arrays_are_leaves(model, data):
    mixture = gapjax.mixture_source(model, data, 0.5)
    for source, arrays in ((data, [data.images]), (model, [DECODER])):
        assert_same_bits(jax.tree.leaves(source), arrays)
    assert len(jax.tree.leaves(mixture)) == 3
    for source in (data, model, mixture):
        leaves, structure = jax.tree.flatten(source)
        assert structure == jax.tree.flatten(jax.tree.unflatten(structure, leaves))[1]
        hash(structure)
    # Other arrays of the same shape are the same program: nothing is baked into it.
    _epoch(data, jax.random.key(0))
    num_programs = _epoch._cache_size()
    others = _epoch(gapjax.data_source(IMAGES + 1000), jax.random.key(0))
    assert np.all(np.asarray(others) >= 1000)
    assert _epoch._cache_size() == num_programs
