"""A VAE of count vectors, such as genes of single cells or words of documents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike

from gapjax.data.dataset import dense
from gapjax.model import networks
from gapjax.model.mlp import StandardNormal
from gapjax.model.networks import InitBoth, apply_module, init_module
from gapjax.vae import VAE, Distribution, Given, Params

LIKELIHOODS = ("negative_binomial", "poisson", "multinomial")
_LEAST_MEAN = 1e-8  # so that a count of 0 costs nothing where a library is empty


def count_examples(counts: Any, batch: ArrayLike | None = None) -> Given:
    """Examples for `count_vae`: counts [N, G] with their library sizes and, if given, batches [N].

    The library size of an example is the sum of its counts. A sparse matrix of SciPy will do; it is
    made dense in the smallest type that holds its values.
    """
    counts = dense(counts)
    if counts.ndim != 2 or counts.dtype.kind not in "ui":
        raise TypeError(f"counts are {counts.dtype} of shape {counts.shape}; give integers [N, G]")
    context = {"library": counts.sum(1, dtype=np.int32)}
    if batch is not None:
        batch = np.asarray(batch)
        if batch.shape != counts.shape[:1] or batch.dtype.kind not in "ui":
            raise TypeError(
                f"batch is {batch.dtype} of shape {batch.shape}; give integers [{len(counts)}]"
            )
        context["batch"] = batch.astype(np.int32)
    return Given(counts, context)


def count_vae(
    num_features: int,
    likelihood: str = "negative_binomial",
    *,
    latent_dim: int = 10,
    hidden_sizes: tuple[int, ...] = (128,),
    num_batches: int = 0,
    max_library: int | None = None,
) -> VAE:
    """A VAE of counts x [G] given their library size l and the batch b that they come from.

        mu = l softmax(f(z, b)),   x_g ~ NegativeBinomial(mean mu_g, concentration r_g)

    or Poisson(mu_g), or x ~ Multinomial(l, mu / l). The encoder sees log(1 + x) and b. r is one
    parameter for each of the G features. Examples are made by `count_examples`; a sample of the
    model takes l and b from the data, and only a multinomial one has exactly l counts.

    Args:
      num_features: G.
      likelihood: one of `LIKELIHOODS`.
      latent_dim: Z, of a prior N(0, I) and a diagonal Gaussian q(z given x, b).
      hidden_sizes: widths of the encoder's hidden layers; the decoder has them in reverse.
      num_batches: how many batches there are; 0 for none.
      max_library: the largest library size, which samples of a multinomial need.

    References:
      Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018; Miao,
      Grefenstette, Blunsom, Discovering Discrete Latent Topics with Neural Variational Inference,
      2017.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood is {likelihood!r}; it must be one of {', '.join(LIKELIHOODS)}"
        )
    if likelihood == "multinomial" and max_library is None:
        raise ValueError("max_library is None; samples of a multinomial need the largest library")
    if min(num_features, latent_dim, *hidden_sizes) < 1 or num_batches < 0:
        raise ValueError(
            f"num_features {num_features}, latent_dim {latent_dim} and hidden_sizes "
            f"{hidden_sizes} must be positive, and num_batches {num_batches} not negative"
        )
    sizes = num_features, latent_dim, tuple(hidden_sizes), num_batches
    encode, decode = _Encode(*sizes), _Decode(*sizes, likelihood, max_library)
    return VAE(InitBoth(encode, decode), encode, decode, StandardNormal(latent_dim))


class _Multinomial(dist.MultinomialLogits):
    """NumPyro's, with a sampler of one vector whose total may differ from example to example."""

    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> jax.Array:
        if sample_shape:
            keys = jax.random.split(key, sample_shape[0])
            return jax.vmap(lambda key: self.sample(key, sample_shape[1:]))(keys)
        most: Any = self.total_count_max
        # not `categorical`, whose noise is [most, G]
        probs = jax.nn.softmax(jnp.asarray(self.logits))
        features = jax.random.choice(key, len(probs), (most,), p=probs)
        counted = (jnp.arange(most) < jnp.asarray(self.total_count)).astype(jnp.int32)
        return jnp.zeros(self.event_shape, jnp.int32).at[features].add(counted)


@dataclasses.dataclass(frozen=True)
class _Network:
    """What encoder and decoder have in common: their sizes, and how they see a batch."""

    num_features: int
    latent_dim: int
    hidden_sizes: tuple[int, ...]
    num_batches: int

    def _inputs(self, value: jax.Array, context: dict[str, jax.Array]) -> jax.Array:
        if not self.num_batches:
            return value
        return jnp.concatenate([value, jax.nn.one_hot(context["batch"], self.num_batches)])


class _Encode(_Network):
    """q(z given x, b)."""

    def init(self, rng_key: jax.Array) -> Params:
        inputs = jnp.zeros(self.num_features + self.num_batches)
        return init_module(self._module(), rng_key, inputs)

    def __call__(self, params: Params, x: jax.Array, context: Any) -> Distribution:
        x = jnp.maximum(x.astype(jnp.float32), 0.0)  # as `DenoisingElbo` may give less
        inputs = self._inputs(jnp.log1p(x), context)
        loc, scale, _ = apply_module(self._module(), params, inputs)
        return dist.Normal(loc, scale).to_event(1)

    def _module(self) -> networks.MLPEncoder:
        return networks.MLPEncoder(self.hidden_sizes, self.latent_dim)


@dataclasses.dataclass(frozen=True)
class _Decode(_Network):
    """p(x given z, l, b)."""

    likelihood: str
    max_library: int | None

    def init(self, rng_key: jax.Array) -> Params:
        inputs = jnp.zeros(self.latent_dim + self.num_batches)
        params = {"network": init_module(self._module(), rng_key, inputs)}
        if self.likelihood == "negative_binomial":
            params["log_concentration"] = jnp.zeros(self.num_features)
        return params

    def __call__(self, params: Params, z: jax.Array, context: Any) -> Distribution:
        logits = apply_module(self._module(), params["network"], self._inputs(z, context))
        library = context["library"]
        if self.likelihood == "multinomial":
            return _Multinomial(logits, library, total_count_max=self.max_library)
        mean = jnp.maximum(library.astype(jnp.float32) * jax.nn.softmax(logits), _LEAST_MEAN)
        if self.likelihood == "poisson":
            return dist.Poisson(mean).to_event(1)
        concentration = jnp.exp(params["log_concentration"])
        return dist.NegativeBinomial2(mean, concentration).to_event(1)

    def _module(self) -> networks.MLP:
        return networks.MLP(self.hidden_sizes[::-1], self.num_features)
