"""VAEs whose latents are in layers, or have an auxiliary one; with feed-forward networks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from gapjax.model import networks
from gapjax.model.chain import Chain
from gapjax.model.checks import check_positive
from gapjax.model.mlp import UNIFORM_WEIGHT, Decode, StandardNormal, mlp_encoder, pixel_decoder
from gapjax.model.networks import InitBoth, apply_module, init_module
from gapjax.vae import VAE, Distribution, Frozen, Params

FORMS = ("non_centred", "top_down", "bottom_up")
_FEATURES = 64  # of an image, which each link of a top-down posterior sees beside the latent above


def hierarchical_vae(
    event_shape: tuple[int, ...],
    likelihood: str = "bernoulli",
    *,
    latent_dims: tuple[int, ...] = (10, 10),
    hidden_sizes: tuple[int, ...] = (500, 500),
    levels: int = 256,
    uniform_weight: float = UNIFORM_WEIGHT,
    form: str = "non_centred",
) -> VAE:
    """A hierarchy of Gaussian latents z_1, below which is x, to z_L at the top.

        p(x, z) = p(x given z_1) p(z_1 given z_2) .. p(z_(L-1) given z_L) N(z_L; 0, I)

    Every conditional is a diagonal Gaussian whose mean and scale a network gives.

    The three forms are the same generative model. With "non_centred" the latent is the noise
    e = (e_1, .., e_L) ~ N(0, I), one vector, with z_L = e_L and z_l = mean(z_(l+1)) +
    scale(z_(l+1)) e_l, and q(e given x) is one diagonal Gaussian: every tool of gapjax takes it.
    The other two have latents {"z1": .., "zL": ..}, which a `Chain` is over:

        "top_down"   q(z given x) = q(z_L given x) q(z_(L-1) given z_L, x) .. q(z_1 given z_2, x)
        "bottom_up"  q(z given x) = q(z_1 given x) q(z_2 given z_1) .. q(z_L given z_(L-1))

    Top-down, the KL is in closed form link by link. Bottom-up, q is a Markov chain, as Bit-Swap
    needs it.

    Args:
      event_shape: shape of one x, whose entries are integer levels.
      latent_dims: sizes of z_1 to z_L.
      form: one of `FORMS`.
      likelihood: see `mlp_vae`.
      hidden_sizes: of every network; see `mlp_vae`.
      levels: see `mlp_vae`.
      uniform_weight: see `mlp_vae`.

    References:
      Sønderby et al., Ladder Variational Autoencoders, 2016; Kingma, Abbeel, Ho, Bit-Swap, 2019;
      Papaspiliopoulos, Roberts, Sköld, A General Framework for the Parametrization of Hierarchical
      Models, 2007.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    if not latent_dims:
        raise ValueError("latent_dims is empty; it needs the size of each layer")
    sizes, hidden_sizes = tuple(latent_dims), tuple(hidden_sizes)
    pixels = pixel_decoder(event_shape, likelihood, sizes[0], hidden_sizes, levels, uniform_weight)
    links = tuple(map(_Gaussian, sizes[1:], sizes[:-1], [hidden_sizes] * len(sizes[1:])))
    if form == "non_centred":
        size = sum(sizes)
        encoder = mlp_encoder(
            event_shape, latent_dim=size, hidden_sizes=hidden_sizes, levels=pixels.levels
        )
        from_noise = _DecodeNoise(pixels, links)
        return VAE(InitBoth(encoder, from_noise), encoder.encode, from_noise, StandardNormal(size))
    names = tuple(f"z{number + 1}" for number in range(len(sizes)))
    shape = event_shape, hidden_sizes, pixels.levels, sizes, names
    encode = (_EncodeDown if form == "top_down" else _EncodeUp)(*shape)
    decode = _DecodeBottom(pixels, links)
    return VAE(InitBoth(encode, decode), encode, decode, _Prior(links, names, sizes[-1]))


def auxiliary_vae(
    event_shape: tuple[int, ...],
    likelihood: str = "bernoulli",
    *,
    latent_dim: int = 10,
    auxiliary_dim: int = 10,
    hidden_sizes: tuple[int, ...] = (500, 500),
    levels: int = 256,
    uniform_weight: float = UNIFORM_WEIGHT,
) -> VAE:
    """The generative model of `mlp_vae` with an auxiliary variable a in its posterior.

        p(z) p(x given z) r(a given z),   q(a given x) q(z given a, x)

    Every conditional is a diagonal Gaussian, but q(z given x), a mixture of them over a, is none.
    The latent is {"z", "a"}. r integrates to 1, so p(x) is that of the plain model, and

        ELBO(x) = E_q[log p(x, z) - log q(z given x)] - E_q[KL(q(a given z, x) || r(a given z))].

    The first term is the bound of the mixture itself. The second is what not knowing its density
    costs. The references have r(a given z, x), which makes it smaller; a prior sees no x here.

    r is trained with the decoder. A refit leaves both as they are, so its encoder learns to fit an
    r that was made for the encoder before: what it gains is a lower bound of what it could gain.

    Args:
      auxiliary_dim: size of a. The others are those of `mlp_vae`.

    References:
      Agakov, Barber, An Auxiliary Variational Method, 2004; Maaløe, Sønderby, Sønderby, Winther,
      Auxiliary Deep Generative Models, 2016.
    """
    check_positive(auxiliary_dim=auxiliary_dim)
    hidden_sizes = tuple(hidden_sizes)
    pixels = pixel_decoder(
        event_shape, likelihood, latent_dim, hidden_sizes, levels, uniform_weight
    )
    sizes = latent_dim, auxiliary_dim
    encode = _EncodeDown(tuple(event_shape), hidden_sizes, pixels.levels, sizes, ("z", "a"))
    links = (_Gaussian(latent_dim, auxiliary_dim, hidden_sizes),)
    decode = _DecodeBottom(pixels, links, "z")
    return VAE(InitBoth(encode, decode), encode, decode, _Prior(links, ("a", "z"), latent_dim))


@dataclasses.dataclass(frozen=True)
class _Gaussian:
    """A network from a vector [I] to a diagonal Gaussian over [Z], or to its mean and scale."""

    num_inputs: int
    size: int
    hidden_sizes: tuple[int, ...]

    def init(self, rng_key: jax.Array) -> Params:
        return init_module(self._module(), rng_key, jnp.zeros(self.num_inputs))

    def loc_and_scale(self, params: Params, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return apply_module(self._module(), params, inputs)[:2]

    def __call__(self, params: Params, inputs: jax.Array) -> Distribution:
        return dist.Normal(*self.loc_and_scale(params, inputs)).to_event(1)

    def _module(self) -> networks.MLPEncoder:
        return networks.MLPEncoder(self.hidden_sizes, self.size)


def _init_all(parts: Any, rng_key: jax.Array) -> list[Params]:
    return [part.init(key) for part, key in zip(parts, _keys(rng_key, len(parts)), strict=True)]


def _keys(rng_key: jax.Array, number: int) -> Any:
    return jax.random.split(rng_key, number) if number else ()


@dataclasses.dataclass(frozen=True)
class _DecodeBottom:
    """p(x given z_1); its parameters hold those of the prior's links, from z_1 to z_(L-1)."""

    pixels: Decode
    links: tuple[_Gaussian, ...]
    name: str = "z1"

    def init(self, rng_key: jax.Array) -> Params:
        pixel_key, link_key = jax.random.split(rng_key)
        links = _init_all(self.links, link_key)
        return {"pixels": self.pixels.init(pixel_key), "links": links}

    def __call__(self, params: Params, z: Any) -> Distribution:
        return self.pixels(params["pixels"], z[self.name])


class _DecodeNoise(_DecodeBottom):
    """The same of the noise e [Z_1 + .. + Z_L] of all layers."""

    def __call__(self, params: Params, z: Any) -> Distribution:
        ends = [self.pixels.latent_dim]
        for link in self.links:
            ends.append(ends[-1] + link.num_inputs)
        *noises, latent = jnp.split(z, ends[:-1])
        for link, weights, noise in reversed(
            list(zip(self.links, params["links"], noises, strict=True))
        ):
            loc, scale = link.loc_and_scale(weights, latent)
            latent = loc + scale * noise
        return self.pixels(params["pixels"], latent)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Link:
    """A link of a chain: a latent given another, and the features of an image where it has any."""

    weights: Frozen  # which are no image's own
    features: jax.Array | None
    network: _Gaussian = dataclasses.field(metadata={"static": True})
    given: str = dataclasses.field(metadata={"static": True})

    def __call__(self, latents: dict[str, jax.Array]) -> Distribution:
        inputs = latents[self.given]
        if self.features is not None:
            inputs = jnp.concatenate([inputs, self.features])
        return self.network(self.weights.params, inputs)


@dataclasses.dataclass(frozen=True)
class _Prior:
    """p(z), from the top down."""

    links: tuple[_Gaussian, ...]
    names: tuple[str, ...]
    top_size: int

    def __call__(self, params: Params) -> Distribution:
        chain: dict[str, Any] = {self.names[-1]: StandardNormal(self.top_size)}
        for number in reversed(range(len(self.links))):
            weights = Frozen(params["links"][number])
            above = self.names[number + 1]
            chain[self.names[number]] = _Link(weights, None, self.links[number], above)
        return Chain(chain)


@dataclasses.dataclass(frozen=True)
class _EncodeDown:
    """q(z_L given x) and below it q(z_l given z_(l+1), features of x)."""

    event_shape: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    levels: int
    sizes: tuple[int, ...]
    names: tuple[str, ...]

    def init(self, rng_key: jax.Array) -> Params:
        start_key, link_key = jax.random.split(rng_key)
        start = init_module(self._start(), start_key, jnp.zeros(self.event_shape))
        return {"start": start, "links": _init_all(self._links(), link_key)}

    def __call__(self, params: Params, x: jax.Array) -> Distribution:
        x = x.astype(jnp.float32) / (self.levels - 1)
        loc, scale, rest = apply_module(self._start(), params["start"], x)
        first, *others = self._order()
        chain: dict[str, Any] = {self.names[first]: dist.Normal(loc, scale).to_event(1)}
        features = jnp.split(rest, len(others)) if len(rest) else [None] * len(others)
        previous = first
        for number, network, weights, own in zip(
            others, self._links(), params["links"], features, strict=True
        ):
            link = _Link(Frozen(weights), own, network, self.names[previous])
            chain[self.names[number]], previous = link, number
        return Chain(chain)

    def _order(self) -> list[int]:
        """The layers in the order of the chain."""
        return list(reversed(range(len(self.sizes))))

    def _num_features(self) -> int:
        return _FEATURES

    def _start(self) -> networks.MLPEncoder:
        rest = self._num_features() * (len(self.sizes) - 1)
        return networks.MLPEncoder(self.hidden_sizes, self.sizes[self._order()[0]], rest)

    def _links(self) -> list[_Gaussian]:
        sizes = [self.sizes[number] for number in self._order()]
        inputs = [size + self._num_features() for size in sizes[:-1]]
        return list(map(_Gaussian, inputs, sizes[1:], [self.hidden_sizes] * len(inputs)))


class _EncodeUp(_EncodeDown):
    """q(z_1 given x) and above it q(z_(l+1) given z_l), which do not see x."""

    def _order(self) -> list[int]:
        return list(range(len(self.sizes)))

    def _num_features(self) -> int:
        return 0
