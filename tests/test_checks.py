"""What is wrong with a model, its data or an argument is told before any work, and in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import PlainNormal, num_programs, random_params
from flax import nnx

import gapjax
from gapjax import kernel
from gapjax.fit.step import TrainState
from gapjax.measure.bounds import encoder_gradient_norms
from gapjax.measure.log_likelihood import sandwich
from gapjax.model.checks import check_model, explain

KEY = jax.random.key(0)
IMAGES = (np.arange(24).reshape(6, 2, 2) % 3 == 0).astype(np.uint8)
VAE = gapjax.mlp_vae((2, 2), latent_dim=2, hidden_sizes=(3,))
PARAMS = random_params(VAE)
NORMAL = dist.Normal(jnp.zeros(2), 1.0)


def _own(**functions):
    """The small model with functions or a prior of one's own."""
    return VAE._replace(**functions)


def _constantly(distribution):
    return lambda params, value: distribution


def _train(vae, images=IMAGES, **options):
    source = options.pop("source", None) or gapjax.data_source(images)
    options = {"num_epochs": 1, "batch_size": 6, **options}
    state = TrainState(PARAMS, gapjax.adam(1e-3).init(PARAMS), jnp.zeros((), jnp.int32), KEY)
    return gapjax.train(vae, source, state=state, **options)


def _entries(vae):
    """Every way to give a model to the library that takes gradients or a bound."""
    source = gapjax.data_source(IMAGES)
    return {
        "train": lambda: _train(vae),
        "refit_encoder": lambda: gapjax.refit_encoder(vae, PARAMS, source, KEY, num_epochs=1),
        "refit_members": lambda: gapjax.refit_members(
            vae, [gapjax.Member(PARAMS, source, KEY)] * 2, num_epochs=1
        ),
        "optimal_inference": lambda: gapjax.optimal_inference(vae, PARAMS, IMAGES, KEY),
        "self_consistent": lambda: gapjax.self_consistent(vae, PARAMS, IMAGES, KEY),
        "kernel": lambda: kernel(vae, source, gapjax.adam(1e-3), batch_size=6).init(PARAMS, KEY),
        "encoder_gradient_norms": lambda: encoder_gradient_norms(vae, PARAMS, KEY, IMAGES),
        "best_posteriors": lambda: gapjax.best_posteriors(vae, PARAMS, KEY, IMAGES),
        "refine": lambda: gapjax.refine(vae, PARAMS, KEY, IMAGES, gapjax.Refiner("adam", 1)),
        "evaluate": lambda: gapjax.evaluate(vae, PARAMS, KEY, IMAGES),
        "log_likelihood": lambda: gapjax.log_likelihood(vae, PARAMS, KEY, IMAGES),
        "sandwich": lambda: sandwich(vae, PARAMS, KEY, 2),
        "ledger": lambda: gapjax.ledger(vae, PARAMS, KEY, IMAGES, IMAGES),
    }


ENTRIES = sorted(_entries(VAE))
GRADIENTS = [name for name in ENTRIES if name not in
             ("evaluate", "log_likelihood", "sandwich", "ledger")]  # fmt: skip


# --- one distribution, one whole example ------------------------------------------------------


CULPRITS = {
    "prior": _own(prior=NORMAL),
    "posterior": _own(encode=_constantly(NORMAL)),
    "likelihood": _own(decode=_constantly(dist.Bernoulli(logits=jnp.zeros((2, 2))))),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("role", CULPRITS)
def test_a_distribution_without_to_event_is_named_before_any_work(role, entry):
    axes = 2 if role == "likelihood" else 1
    before = num_programs()
    with pytest.raises(ValueError, match=rf"the {role} .* log_prob .* by \.to_event\({axes}\)"):
        _entries(CULPRITS[role])[entry]()
    assert num_programs() == before


@pytest.mark.parametrize("bound", [gapjax.elbo, gapjax.importance_weighted_bound])
@pytest.mark.parametrize("prior", [NORMAL, PlainNormal(2)], ids=["analytic", "monte_carlo"])
def test_the_bounds_themselves_refuse_all_three(bound, prior):
    """Also where the KL is analytic, which is then not a scalar, and in a loop of one's own."""
    bound = functools.partial(bound, num_samples=2)
    for role, vae in CULPRITS.items():
        vae = vae._replace(prior=prior) if role == "posterior" else vae
        with pytest.raises(ValueError, match=r"posterior|the " + role):
            jax.eval_shape(functools.partial(bound, vae), PARAMS, KEY, jnp.asarray(IMAGES[0]))


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(
        ValueError, match=r"posterior have the shape \(3,\), those of the prior the shape \(2"
    ):
        check_model(_own(encode=_constantly(dist.Normal(jnp.zeros(3), 1).to_event(1))), PARAMS, X)
    flat = dist.Bernoulli(logits=jnp.zeros(4)).to_event(1)
    with pytest.raises(ValueError, match=r"an x of shape \(4,\), but an example .* \(2, 2\)"):
        check_model(_own(decode=_constantly(flat)), PARAMS, X)


X = jax.ShapeDtypeStruct((2, 2), jnp.uint8)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_encode_that_returns_an_array_is_named(entry):
    vae = _own(encode=lambda params, x: jnp.zeros(2))
    with pytest.raises(TypeError, match=r"posterior .* array of shape \(2,\), has no sample"):
        _entries(vae)[entry]()


def test_a_batched_encode_is_named():
    weight = jnp.zeros((4, 2))
    fails = lambda params, x: dist.Normal(x.reshape(x.shape[0], -1) @ weight, 1.0).to_event(1)
    words = r"encode fails on one example x of shape \(2, 2\) .* without a batch axis: TypeError"
    with pytest.raises(ValueError, match=words):
        gapjax.evaluate(_own(encode=fails), PARAMS, KEY, IMAGES)
    works = lambda params, x: dist.Normal(x.astype(jnp.float32), 1.0).to_event(1)  # [2] of [2]
    with pytest.raises(ValueError, match=r"the posterior .* has the shape \(2,\)"):
        _train(_own(encode=works))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_point_mass_is_refused(entry):
    """What does not depend on the key has no density, whatever its log_prob returns."""
    vae = _own(encode=lambda params, x: dist.Delta(x.astype(jnp.float32)[0]).to_event(1))
    before = num_programs()
    with pytest.raises(ValueError, match=r"posterior .* is a point mass: samples of Delta do not"):
        _entries(vae)[entry]()
    assert num_programs() == before


def test_an_encode_that_changes_its_state_is_named():
    """NNX's layers count their draws; under vmap this is an error of Flax."""
    module, state = nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    noisy = lambda params, x: VAE.encode(params[0], nnx.merge(module, params[1])(x * 1.0))
    params = PARAMS._replace(encoder=[PARAMS.encoder, state])
    with pytest.raises(ValueError, match=r"encode fails on one example .* TraceContextError"):
        gapjax.evaluate(_own(encode=noisy), params, KEY, IMAGES)


def test_what_nothing_depends_on_is_found_through_compiled_functions():
    encode = jax.jit(lambda params, x: VAE.encode(params[0], jnp.ones((2, 2))))
    params = PARAMS._replace(encoder=[PARAMS.encoder, {"spare": jnp.zeros(3)}])
    constant = _constantly(VAE.decode(PARAMS.decoder, jnp.zeros(2)))
    assert check_model(VAE, PARAMS, X).unused == ()
    assert check_model(_own(encode=encode), params, X).unused == ("params.encoder[1]['spare']", "x")
    unused = check_model(_own(decode=constant), PARAMS, X).unused
    assert unused[-1] == "z" and len(unused) == 1 + len(jax.tree.leaves(PARAMS.decoder))


def test_what_is_no_parameters_is_named():
    state = TrainState(PARAMS, None, None, None)
    with pytest.raises(TypeError, match=r"TrainState, not a VAEParams; give its \.params"):
        gapjax.evaluate(VAE, state, KEY, IMAGES)


# --- gradients through samples ----------------------------------------------------------------


def _discrete_model():
    """Two binary latents."""
    prior = dist.Bernoulli(logits=jnp.zeros(2)).to_event(1)

    def encode(encoder, x):
        return dist.Bernoulli(logits=encoder["logits"]).to_event(1)

    def decode(decoder, z):
        return dist.Normal(decoder["weight"] @ z.astype(jnp.float32), 1.0).to_event(1)

    params = gapjax.VAEParams(
        {"logits": jnp.array([0.3, -0.5])}, {"weight": jnp.array([[1.0, 0.5], [-0.3, 2.0]])}
    )
    return gapjax.VAE(lambda rng_key: params, encode, decode, prior), params


def _exact_elbo(vae, params, rng_key, x):
    """The sum over all four latents: its gradient needs no samples."""
    q, values = vae.encode(params.encoder, x), jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])

    def term(z):
        log_p = vae.decode(params.decoder, z).log_prob(x) + vae.prior.log_prob(z)
        return jnp.exp(q.log_prob(z)) * (log_p - q.log_prob(z))

    return jax.vmap(term)(values).sum()


VON_MISES = _own(encode=_constantly(dist.VonMises(jnp.zeros(2), 1.0).to_event(1)))


@pytest.mark.parametrize("entry", GRADIENTS)
def test_a_posterior_that_cannot_be_reparameterized_is_refused(entry):
    before = num_programs()
    words = "VonMises, cannot be reparameterized.*needs_rsample"
    with pytest.raises(TypeError, match=words):
        _entries(VON_MISES)[entry]()
    assert num_programs() == before


def test_it_is_evaluated_all_the_same():
    evaluation = gapjax.evaluate(VON_MISES, PARAMS, KEY, IMAGES)
    assert np.isfinite(evaluation.bpd)


def test_an_objective_may_say_that_it_needs_no_gradient_of_samples():
    """The exact ELBO of a discrete q rises to its maximum, log p(x); a sampled one is refused."""
    vae, params = _discrete_model()
    images = np.ones((4, 2), np.float32)
    options = {"num_epochs": 150, "batch_size": 4, "optimizer": gapjax.adam(0.1)}
    refit = functools.partial(
        gapjax.refit_encoder, vae, params, gapjax.data_source(images), KEY, **options
    )
    with pytest.raises(TypeError, match="BernoulliLogits, cannot be reparameterized"):
        refit()
    with pytest.raises(TypeError, match="cannot be reparameterized"):
        refit(objective=_exact_elbo)

    def objective(vae, params, rng_key, x):
        return _exact_elbo(vae, params, rng_key, x)

    objective.needs_rsample = False
    before = _exact_elbo(vae, params, None, jnp.ones(2))
    after = _exact_elbo(vae, refit(objective=objective).params, None, jnp.ones(2))
    gradient = jax.grad(lambda logits: _exact_elbo(
        vae, params._replace(encoder={"logits": logits}), None, jnp.ones(2)))  # fmt: skip
    best = refit(objective=functools.partial(objective)).params.encoder["logits"]
    assert after > before + 0.1
    assert np.abs(gradient(best)).max() < 0.02 < 0.1 < np.abs(gradient(jnp.zeros(2))).max()


# --- data -------------------------------------------------------------------------------------


def _with(value, dtype=np.float32):
    images = IMAGES.astype(dtype)
    images[3, 1, 0] = value
    return images


GREY = gapjax.mlp_vae((2, 2), "discretized_logistic", latent_dim=2, hidden_sizes=(3,), levels=17)


@pytest.mark.parametrize(
    "vae, images, words",
    [
        (VAE, _with(2, np.uint8), "value 2 at .1, 0.* BernoulliLogits takes Boolean"),
        (VAE, _with(0.5), r"value 0\.5"),
        (VAE, _with(np.nan), "value nan"),
        (GREY, _with(17, np.uint8), "value 17 .* upper_bound=16"),
        (GREY, _with(np.nan), "value nan"),
        (_own(decode=_constantly(dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(2))),
         _with(np.inf), "value inf .* Normal takes Real"),
    ],
    ids=["level", "fraction", "nan", "grey", "grey nan", "inf"],
)  # fmt: skip
def test_data_outside_of_the_support_are_named_before_any_work(vae, images, words):
    before, params = num_programs(), random_params(vae)
    model = gapjax.model_source(vae, params.decoder, len(images))
    mixture = gapjax.mixture_source(model, gapjax.data_source(images), 0.5)
    of_data = gapjax.mixture_source(gapjax.data_source(images), model, 0.5)
    for use in (
        lambda: gapjax.evaluate(vae, params, KEY, images),
        lambda: gapjax.train(vae, gapjax.data_source(images), KEY, num_epochs=1),
        lambda: gapjax.refit_encoder(vae, params, mixture, KEY, num_epochs=1),
        lambda: gapjax.refit_encoder(vae, params, of_data, KEY, num_epochs=1),
        lambda: gapjax.optimal_inference(vae, params, images, KEY),
        lambda: gapjax.log_likelihood(vae, params, KEY, jnp.asarray(images)),
        lambda: gapjax.best_posteriors(vae, params, KEY, images),
        lambda: gapjax.refine(vae, params, KEY, images),
    ):
        with pytest.raises(ValueError, match=f"image 3 has the {words}"):
            use()
    assert num_programs() == before


def test_images_that_are_not_drawn_may_be_anything():
    """Those of a mixture at alpha = 1, and under a likelihood that does not say its support."""
    data = gapjax.data_source(_with(np.nan))
    only_model = gapjax.mixture_source(gapjax.model_source(VAE, PARAMS.decoder, 6), data, 1)
    kernel(VAE, only_model, gapjax.adam(1e-3), batch_size=6).init(PARAMS, KEY)

    class Anything:
        log_prob = staticmethod(lambda x: jnp.nansum(x))

    vae = _own(encode=_constantly(VAE.prior), decode=_constantly(Anything()))
    assert np.isfinite(gapjax.evaluate(vae, PARAMS, KEY, _with(np.nan)).bpd)


def _decode_nan(decoder, z):
    return dist.Bernoulli(logits=jnp.full((2, 2), jnp.nan) * z[0]).to_event(2)


BETA = _own(decode=_constantly(dist.Beta(2 * jnp.ones((2, 2)), 2.0).to_event(2)))


@pytest.mark.parametrize(
    "vae, images, words",
    [
        (_own(decode=_decode_nan), IMAGES, "decode (returns .*NaN|raises.*logits)"),
        (BETA, _with(1.0) / 2 + _with(0.0) / 2, "where x is (0.0|1.0): Beta has no finite density"),
        (_own(encode=_constantly(dist.Normal(jnp.zeros(2), jnp.inf).to_event(1))), IMAGES,
         "encode returns a Normal whose samples are not finite"),
    ],
    ids=["decoder", "edge", "samples"],
)  # fmt: skip
def test_a_bound_that_is_not_finite_says_why(vae, images, words):
    with pytest.raises(FloatingPointError, match=rf"bound of image 0 is .* of 6 images.*{words}"):
        gapjax.evaluate(vae, PARAMS, KEY, images, num_samples=2)
    # Training names the example.
    where = r"epoch 1, step 1; with the.*objective of example 0 of the epoch is not finite"
    with pytest.raises(FloatingPointError, match=f"{where}: .*{words}"):
        _train(vae, images)


def test_a_learning_rate_too_high_is_told_from_the_model():
    optimizer = gapjax.adam(1e30)
    state = TrainState(PARAMS, optimizer.init(PARAMS), jnp.zeros((), jnp.int32), KEY)
    words = r"with the parameters that the run started from, this batch is finite$"
    with pytest.raises(FloatingPointError, match=words):
        gapjax.train(VAE, gapjax.data_source(IMAGES), state=state, num_epochs=9, batch_size=3,
                     optimizer=optimizer)  # fmt: skip


def test_a_gradient_that_is_not_finite_is_told():
    """A loss that is finite and has no gradient: the square root of zero."""
    objective = lambda vae, params, rng_key, x: (
        -jnp.sqrt(sum(jnp.sum(0 * leaf) for leaf in jax.tree.leaves(params)))
    )
    with pytest.raises(FloatingPointError, match="the gradient of the objective is not finite"):
        _train(VAE, objective=objective)


def test_what_is_finite_is_not_explained():
    assert explain(VAE, PARAMS, KEY, jnp.asarray(IMAGES[0]), 3) is None


# --- parameters and arguments -----------------------------------------------------------------


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"count": jnp.zeros((), jnp.int32)}, r"params\.encoder\['count'\] is of type int32"),
        ({"rng": jax.random.key(1)}, r"params\.encoder\['rng'\] is of type key"),
        (
            {"batch_stats": {"mean": jnp.zeros(3)}},
            r"\['batch_stats'\]\['mean'\] .*would be trained",
        ),
        (nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), r"\['mean'\] is a BatchStat of Flax NNX"),
        (nnx.state(nnx.Dropout(0.1, rngs=nnx.Rngs(0))), r"\['count'\] is a RngCount of Flax NNX"),
    ],
    ids=["count", "key", "batch_stats", "nnx_batch_stat", "nnx_dropout"],
)
def test_state_among_the_parameters_is_refused(extra, words):
    params = PARAMS._replace(encoder={**PARAMS.encoder, **extra})
    source = gapjax.data_source(IMAGES)
    with pytest.raises(TypeError, match=words):
        gapjax.refit_encoder(VAE, params, source, KEY, num_epochs=1, batch_size=6)
    with pytest.raises(TypeError, match=words):
        kernel(VAE, source, gapjax.adam(1e-3), batch_size=6).init(params, KEY)


class Tensor:
    """An array of another library: it has a shape and a dtype, which are not NumPy's."""

    def __init__(self, array):
        self.array, self.shape, self.ndim = array, np.shape(array), np.ndim(array)
        self.dtype = "uint8 of another library"


NO_ARRAYS = {"tensor": Tensor(np.zeros(3)), "function": jax.nn.relu, "switch": False, "name": "a"}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_is_no_array_among_the_parameters_is_named(kind, entry, monkeypatch):
    """Tensors, and the functions and switches of an Equinox module that was not partitioned."""
    if entry == "train":
        pytest.skip("it makes its parameters by init")
    leaf = NO_ARRAYS[kind]
    monkeypatch.setitem(globals(), "PARAMS", PARAMS._replace(encoder=[PARAMS.encoder, leaf]))
    words = (
        rf"params\.encoder\[1\] is of type {type(leaf).__name__}, not an array; .*eqx\.partition"
    )
    with pytest.raises(TypeError, match=words):
        _entries(_own(encode=lambda params, x: VAE.encode(params[0], x)))[entry]()


@pytest.mark.parametrize(
    "images", [Tensor(IMAGES), IMAGES.astype(object)], ids=["tensor", "object"]
)
def test_images_of_another_library_are_named(images):
    for use in (
        functools.partial(gapjax.evaluate, VAE, PARAMS, KEY),
        gapjax.data_source,
        lambda images: gapjax.self_consistent(VAE, PARAMS, images, KEY),
        lambda images: gapjax.optimal_inference(VAE, PARAMS, images, KEY),
    ):
        with pytest.raises(TypeError, match=r"images is of type .*, not an array .*np\.asarray"):
            use(images)
    with pytest.raises(TypeError, match="rng_key is of type Tensor, not a key"):
        gapjax.evaluate(VAE, PARAMS, Tensor(np.zeros(2, np.uint32)), IMAGES)


def test_an_array_in_the_place_of_a_source_is_named():
    words = r"source is an array of shape \(6, 2, 2\).*gapjax\.data_source"
    with pytest.raises(TypeError, match=words):
        gapjax.train(VAE, IMAGES, KEY, num_epochs=1)
    with pytest.raises(TypeError, match=words):
        gapjax.refit_encoder(VAE, PARAMS, jnp.asarray(IMAGES), KEY, num_epochs=1)
    with pytest.raises(TypeError, match=r"source is of type Dataset"):
        gapjax.train(VAE, gapjax.Dataset("d", IMAGES, IMAGES, 2, {}), KEY, num_epochs=1)


def test_a_source_or_a_data_set_in_the_place_of_images_is_named():
    data = gapjax.Dataset("d", IMAGES, IMAGES, 2, {})
    for use in (
        functools.partial(gapjax.evaluate, VAE, PARAMS, KEY),
        gapjax.data_source,
        lambda images: gapjax.self_consistent(VAE, PARAMS, images, KEY),
        lambda images: gapjax.optimal_inference(VAE, PARAMS, images, KEY),
    ):
        with pytest.raises(TypeError, match=r"images is of type Dataset.*its \.test is one"):
            use(data)
        with pytest.raises(TypeError, match=r"images is of type DataSource.*its \.images is one"):
            use(gapjax.data_source(IMAGES))


def test_what_is_not_one_key_is_named():
    keys = jax.random.split(KEY, 3)
    evaluate = lambda key: gapjax.evaluate(VAE, PARAMS, key, IMAGES)
    refit = lambda key: gapjax.self_consistent(VAE, PARAMS, IMAGES, key)
    search = lambda key: gapjax.optimal_inference(VAE, PARAMS, IMAGES, key)
    for use in (evaluate, lambda key: sandwich(VAE, PARAMS, key, 2), refit, search):
        with pytest.raises(ValueError, match=r"rng_key holds keys of the shape \(3,\)"):
            use(keys)
    for use in (evaluate, refit, search):
        for wrong, words in ((0, "of type int"), (None, "of type NoneType"), (1.5, "float"),
                             (jnp.zeros(3), "an array of float32")):  # fmt: skip
            with pytest.raises(TypeError, match=rf"rng_key is .*{words}.*not a key"):
                use(wrong)


def test_traced_arguments_are_refused_by_name():
    source = gapjax.data_source(IMAGES)
    uses = {
        "images": lambda images: gapjax.evaluate(VAE, PARAMS, KEY, images).bpd,
        "rng_key": lambda key: gapjax.evaluate(VAE, PARAMS, key, IMAGES).bpd,
        "params": lambda params: gapjax.refit_encoder(VAE, params, source, KEY, num_epochs=1),
        "source": lambda source: gapjax.train(VAE, source, KEY, num_epochs=1)[1],
    }
    values = {"images": IMAGES, "rng_key": KEY, "params": PARAMS, "source": source}
    for name, use in uses.items():
        with pytest.raises(TypeError, match=f"{name} is traced: .* jax.jit"):
            jax.jit(use)(values[name])


@pytest.mark.parametrize("stratified", [False, True])
def test_a_gradient_by_alpha_is_an_error_and_not_zero(stratified):
    def through_a_refit(alpha):
        refit = gapjax.self_consistent(
            VAE, PARAMS, IMAGES, KEY, alpha=alpha, stratified=stratified, num_epochs=1,
            batch_size=6,
        )  # fmt: skip
        return sum(map(jnp.sum, jax.tree.leaves(refit.params.encoder)))

    def through_a_step(alpha, params):
        model = gapjax.model_source(VAE, params.decoder, 6)
        source = gapjax.mixture_source(
            model, gapjax.data_source(IMAGES), alpha, stratified=stratified
        )
        init, step = kernel(VAE, source, gapjax.adam(1e-3), batch_size=6)
        return step(init(params, KEY))[1].objective

    with pytest.raises(TypeError, match=r"alpha is traced: self_consistent"):
        jax.grad(through_a_refit)(0.5)
    with pytest.raises(TypeError, match=r"alpha has no gradient"):
        jax.grad(through_a_step)(0.5, PARAMS)
    # By the parameters there is one, and a step can be vmapped over alpha.
    gradient = jax.eval_shape(jax.grad(through_a_step, 1), 0.5, PARAMS)
    assert jax.tree.structure(gradient) == jax.tree.structure(PARAMS)
    over_alpha = jax.vmap(lambda alpha: through_a_step(alpha, PARAMS))
    assert jax.eval_shape(over_alpha, jnp.array([0.0, 0.5])).shape == (2,)


@pytest.mark.parametrize(
    "alpha, error, words",
    [
        (np.array([0.0, 0.5]), ValueError, r"alpha is an array of shape \(2,\)"),
        ([0.0, 0.5], ValueError, r"alpha is an array of shape \(2,\)"),
        ("0.5", TypeError, "alpha is '0.5'"),
        (None, TypeError, "alpha is None"),
        (np.nan, ValueError, "alpha is nan"),
    ],
)
def test_an_alpha_that_is_not_one_number_is_named(alpha, error, words):
    data = gapjax.data_source(IMAGES)
    with pytest.raises(error, match=words):
        gapjax.mixture_source(gapjax.model_source(VAE, PARAMS.decoder, 6), data, alpha)


@pytest.mark.parametrize("name", ["num_epochs", "batch_size", "monitor_every"])
@pytest.mark.parametrize("value", [1.5, 2.0, "2", None])
def test_sizes_are_integers(name, value):
    options = {"num_epochs": 1, "batch_size": 6, name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; it must be an integer"):
        gapjax.refit_encoder(VAE, PARAMS, gapjax.data_source(IMAGES), KEY, **options)
    if name != "monitor_every":
        with pytest.raises(ValueError, match=rf"{name} is {value!r}; it must be an integer"):
            gapjax.train(VAE, gapjax.data_source(IMAGES), KEY, **options)


def test_samples_are_integers():
    with pytest.raises(ValueError, match=r"num_samples is 1\.5; it must be an integer"):
        gapjax.evaluate(VAE, PARAMS, KEY, IMAGES, num_samples=1.5)
