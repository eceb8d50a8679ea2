"""Settings of the whole suite and the one trained model that the tests share."""

import collections
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from small_data import no_default_directory, small_mnist  # noqa: F401  (fixtures)

import gapjax
from gapjax import parallel
from gapjax.fit.loop import Curve
from gapjax.fit.step import TrainState, run_steps

# Most of the suite's time is the compiler's. These make it quick and its code slow; what XLA is
# asked to compute, and its own passes, are as always.
_SOON_COMPILED = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def _set_xla_flags():
    """Adds the flags to XLA_FLAGS, unless this version of XLA, which aborts, does not know one."""
    flags = " ".join((*_SOON_COMPILED, os.environ.get("XLA_FLAGS", ""))).strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(start, env=environment, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = flags


if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit them
    _set_xla_flags()
# A CPU is eight virtual devices. Where a test does not say which, it gets the first alone, which
# compiles sooner; GAPJAX_TEST_DEVICES=8 ./launch.sh test runs everything on all of them.
NUM_DEVICES = 8
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
_DEFAULT = int(os.environ.get("GAPJAX_TEST_DEVICES", "1"))
parallel._default.set(tuple(jax.devices()[:_DEFAULT]))
# NumPyro's own Bernoulli promotes dtypes, so only ranks are held strictly.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "gapjax" / "jax")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Tracing makes many small objects, and an object of a trace that ends soon is best not looked at:
# by Python's default of 700 a twentieth of the suite's time is the collection of garbage.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Files with a slow test begin first, then those of many tests: the processes end together."""
    number = collections.Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -number[item.path], item.path))


_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def bounded_programs():
    """Frees the compiled programs of files that are done, before they are too many.

    Each takes several memory maps. Linux allows a process 65,530 of them; beyond that the compiler
    ends with a segmentation fault.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        parallel._compiled.cache_clear()
        jax.clear_caches()
        gc.collect()


class LinearGaussian(NamedTuple):
    """x = W z + b + sigma eps with a standard Gaussian z: everything is known in closed form.

    The columns of W are orthogonal, so the posterior is a diagonal Gaussian with a mean that is
    linear in x and a scale that is the same for every x: the encoder's family contains it.
    """

    vae: gapjax.VAE  # analytic KL
    monte_carlo_vae: gapjax.VAE  # the same model; NumPyro has no KL for its prior
    exact: gapjax.VAEParams  # the encoder is the exact posterior
    wrong: gapjax.VAEParams  # the same decoder, another encoder
    images: np.ndarray  # [N, D] float32, drawn from the model
    log_prob: Callable[[np.ndarray], np.ndarray]  # exact log p(x) [N], float64


class PlainNormal:
    """A standard Gaussian on [Z] with the two methods that a distribution must have, no more."""

    def __init__(self, size):
        self.event_shape = (size,)

    def sample(self, rng_key):
        return jax.random.normal(rng_key, self.event_shape)

    def log_prob(self, z):
        return -0.5 * (z**2 + np.log(2 * np.pi)).sum(-1)


@pytest.fixture(scope="session")
def linear() -> LinearGaussian:
    rng = np.random.default_rng(0)
    num_pixels, latent_dim, sigma = 6, 2, 0.5
    basis, _ = np.linalg.qr(rng.normal(size=(num_pixels, latent_dim)))
    weight, bias = basis * np.array([1.5, 0.7]), rng.normal(size=num_pixels)
    covariance = weight @ weight.T + sigma**2 * np.eye(num_pixels)
    posterior_covariance = np.linalg.inv(np.eye(latent_dim) + weight.T @ weight / sigma**2)
    scale = np.sqrt(np.diag(posterior_covariance))
    np.testing.assert_allclose(posterior_covariance, np.diag(scale**2), atol=1e-12)
    gain = posterior_covariance @ weight.T / sigma**2

    def encode(encoder, x):
        loc = encoder["weight"] @ x + encoder["bias"]
        return dist.Normal(loc, jax.nn.softplus(encoder["raw_scale"])).to_event(1)

    def decode(decoder, z):
        return dist.Normal(decoder["weight"] @ z + decoder["bias"], sigma).to_event(1)

    def init(rng_key):
        return jax.tree.map(lambda p: 0.1 * jax.random.normal(rng_key, p.shape), exact)

    def log_prob(x):
        residual = np.asarray(x, np.float64) - bias
        quadratic = (residual @ np.linalg.inv(covariance) * residual).sum(-1)
        return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])

    decoder = {"weight": weight, "bias": bias}
    exact = gapjax.VAEParams(
        {"weight": gain, "bias": -gain @ bias, "raw_scale": np.log(np.expm1(scale))}, decoder
    )
    exact = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), exact)
    wrong_encoder = {
        "weight": exact.encoder["weight"] * 0.7,
        "bias": exact.encoder["bias"] + 0.2,
        "raw_scale": jnp.log(jnp.expm1(jnp.asarray(scale * np.array([2.0, 1.3]), jnp.float32))),
    }
    prior = dist.Normal(jnp.zeros(latent_dim), jnp.ones(latent_dim)).to_event(1)
    noise = rng.normal(size=(20, latent_dim + num_pixels))
    images = noise[:, :latent_dim] @ weight.T + bias + sigma * noise[:, latent_dim:]
    return LinearGaussian(
        vae=gapjax.VAE(init, encode, decode, prior),
        monte_carlo_vae=gapjax.VAE(init, encode, decode, PlainNormal(latent_dim)),
        exact=exact,
        wrong=exact._replace(encoder=wrong_encoder),
        images=images.astype(np.float32),
        log_prob=log_prob,
    )


class SmallModel(NamedTuple):
    """A small binary VAE that was trained until its encoder over-fits, and its data."""

    vae: gapjax.VAE
    state: TrainState
    curve: Curve
    num_epochs: int
    batch_size: int
    train_images: np.ndarray  # [N, 5, 5] uint8; N is no multiple of the batch size
    test_images: np.ndarray  # [M, 5, 5] uint8

    @property
    def params(self):
        return self.state.params


@pytest.fixture(scope="session")
def small() -> SmallModel:
    """Five prototypes of 25 pixels, a tenth of the pixels flipped."""
    rng = np.random.default_rng(1)
    prototypes = rng.integers(0, 2, (5, 5, 5), dtype=np.uint8)
    images = prototypes[rng.integers(0, 5, 130)] ^ (rng.random((130, 5, 5)) < 0.1)
    train_images, test_images = images[:90].astype(np.uint8), images[90:].astype(np.uint8)
    vae = gapjax.mlp_vae((5, 5), "bernoulli", latent_dim=3, hidden_sizes=(32,))
    num_epochs, batch_size = 60, 20
    state, curve = gapjax.train(
        vae,
        gapjax.data_source(train_images),
        jax.random.key(0),
        num_epochs=num_epochs,
        batch_size=batch_size,
        optimizer=gapjax.adam(5e-3),
    )
    return SmallModel(vae, state, curve, num_epochs, batch_size, train_images, test_images)


_TRACED = []


@functools.wraps(run_steps.function)
def _counted(*args, _run_steps=run_steps.function, **options):
    """Every training program is traced through here, once."""
    _TRACED.append(1)
    return _run_steps(*args, **options)


object.__setattr__(run_steps, "function", _counted)


def num_programs():
    """How many training programs were made so far."""
    return len(_TRACED)


def random_params(vae, seed=0):
    """Parameters as `vae.init` gives them but from NumPy, which need not be compiled."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(vae.init, jax.random.key(0))
    one = lambda s: jax.device_put(np.asarray(0.5 * rng.normal(size=s.shape), s.dtype))
    return jax.tree.map(one, shapes)


def assert_same_bits(first, second):
    """Two pytrees are equal bit for bit: -0.0 is not 0.0, and a NaN equals itself."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype  # a key is not its bits
        a, b = (
            np.asarray(jax.random.key_data(leaf))
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else np.asarray(leaf)
            for leaf in (a, b)
        )
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
