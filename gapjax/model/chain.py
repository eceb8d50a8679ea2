"""A joint distribution over named latents, each of which may depend on those before it."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gapjax.vae import Distribution, is_distribution, log_prob, sample

Latents = dict[str, Any]


@jax.tree_util.register_pytree_node_class
class Chain:
    """A joint distribution over latents in layers, link by link.

        p(z) = prod_k p_k(z_k given z_1, .., z_(k-1))

    As a prior it is the top-down generative chain of a hierarchical VAE, as a posterior a top-down
    or bottom-up one. Where both have the same names in the same order, `elbo` takes the KL of each
    link in closed form where NumPyro has it; other pairs are estimated on samples.

    A chain is a pytree. To carry arrays through a compiled program, make a link that is a function
    as `jax.tree_util.Partial(function, *arrays)`; weights that all examples share, in a
    `gapjax.Frozen`, are no parameters of one example's own, so the search for its best posterior
    leaves them as they are.

    Args:
      links: by the name of each latent, in the order of the chain, a distribution, or a function
        of the earlier latents, a dict by name, that returns one.

    Example:
      >>> standard = numpyro.distributions.Normal(jnp.zeros(2), 1.0).to_event(1)
      >>> below = lambda z: numpyro.distributions.Normal(jnp.tanh(z["top"]), 0.5).to_event(1)
      >>> Chain({"top": standard, "below": below})
    """

    def __init__(self, links: Mapping[str, Any]):
        if not links:
            raise ValueError("links is empty; a chain needs at least one")
        self.links = dict(links)

    @property
    def event_shape(self) -> dict[str, Any]:
        """The shape of each latent, by name."""
        drawn = jax.eval_shape(self.sample, jax.random.key(0))
        return {name: drawn[name].shape for name in self.links}

    @property
    def has_rsample(self) -> bool:
        """Whether every link can be reparameterized."""
        found: list[bool] = []

        def look(rng_key: jax.Array) -> None:
            for _, link, _ in self._draw(rng_key):
                found.append(bool(getattr(link, "has_rsample", True)))

        jax.eval_shape(look, jax.random.key(0))
        return all(found)

    def sample(self, rng_key: jax.Array) -> Latents:
        """One sample of all latents, by name."""
        return {name: value for name, _, value in self._draw(rng_key)}

    def log_prob(self, value: Latents) -> jax.Array:
        """The sum of the log-densities of the links, in nats."""
        links = self.links_at(value).items()
        return sum((log_prob(link, value[name]) for name, link in links), jnp.zeros(()))

    def sample_and_log_prob(self, rng_key: jax.Array) -> tuple[Latents, jax.Array]:
        """One sample and its log-density; every link is made once."""
        latents, total = {}, jnp.zeros(())
        for name, link, value in self._draw(rng_key):
            latents[name] = value
            total += log_prob(link, value)
        return latents, total

    def links_at(self, latents: Latents) -> dict[str, Distribution]:
        """The distribution of every link given the latents before it."""
        return {name: self.link_at(name, latents) for name in self.links}

    def link_at(self, name: str, latents: Latents) -> Distribution:
        """The distribution of one link given the latents before it."""
        link = self.links[name]
        if is_distribution(link):
            return link
        names = list(self.links)
        return link({before: latents[before] for before in names[: names.index(name)]})

    def _draw(self, rng_key: jax.Array) -> Iterator[tuple[str, Distribution, Any]]:
        """Name, distribution and a sample of every link in turn."""
        latents: Latents = {}
        keys = jax.random.split(rng_key, len(self.links))
        for name, key in zip(self.links, keys, strict=True):
            link = self.link_at(name, latents)
            latents[name] = sample(link, key)
            yield name, link, latents[name]

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """The links and their names."""
        return tuple(self.links.values()), tuple(self.links)

    @classmethod
    def tree_unflatten(cls, names: tuple, links: tuple) -> "Chain":
        """The inverse of `tree_flatten`."""
        chain = object.__new__(cls)
        chain.links = dict(zip(names, links, strict=True))
        return chain


def is_alike(first: Any, second: Any) -> bool:
    """Whether these are chains with the same names in the same order."""
    both = isinstance(first, Chain) and isinstance(second, Chain)
    return both and list(first.links) == list(second.links)
