"""A VAE so small that every quantity is known: 12 binary pixels, 2 latents, integrals on a grid.

All is NumPy in float64 and shares no code with gapjax but the form of a `VAE`. The images are a
population of 120, drawn from another decoder; a data set is a draw of them with replacement, so
what is true of a set on average is a plain mean over the population.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import gapjax

PIXELS, LATENTS, HIDDEN, POPULATION = 12, 2, 6, 120
_POINTS = np.linspace(
    -6, 6, 41
)  # of each axis; the trapezoid rule is exact to 1e-8 and better here
_STEP = _POINTS[1] - _POINTS[0]
_GRID = np.stack(np.meshgrid(_POINTS, _POINTS, indexing="ij"), axis=-1)
# Of each point, with the area that it stands for.
_LOG_PRIOR = -(_GRID**2).sum(-1) / 2 - np.log(2 * np.pi) + 2 * np.log(_STEP)


class Exact(NamedTuple):
    """The model, its encoders and images, and what is true of each image [N], in nats."""

    vae: gapjax.VAE
    params: dict[str, gapjax.VAEParams]  # by encoder: "trained", "control", "refit"
    images: np.ndarray  # [N, 12] uint8
    log_prob: np.ndarray
    elbo: dict[str, np.ndarray]  # of every encoder, and of "best", the best diagonal Gaussian q
    best: tuple[np.ndarray, np.ndarray]  # its means and scales [N, 2]
    log_likelihood: np.ndarray  # [N, 41, 41], log p(x given z) on the grid
    logits: np.ndarray  # [41, 41, 12], of the pixels on the grid


def build() -> Exact:
    """The model with fixed weights; its encoders are linear, and good but for some noise."""
    rng = np.random.default_rng(0)
    decoder = {
        "in": 0.9 * rng.normal(size=(HIDDEN, LATENTS)), "in_bias": 0.3 * rng.normal(size=HIDDEN),
        "out": 0.9 * rng.normal(size=(PIXELS, HIDDEN)), "out_bias": 0.3 * rng.normal(size=PIXELS),
    }  # fmt: skip
    z = rng.normal(size=(POPULATION, LATENTS))
    noisy = _logits(decoder, z) + 0.7 * rng.normal(size=(POPULATION, PIXELS))
    images = (rng.random(noisy.shape) < 1 / (1 + np.exp(-noisy))).astype(np.uint8)
    logits = _logits(decoder, _GRID)
    log_likelihood = _log_likelihood(images, logits)
    joint = log_likelihood + _LOG_PRIOR
    log_prob = np.log(np.exp(joint).sum((1, 2)))
    posterior = np.exp(joint - log_prob[:, None, None])
    means = np.einsum("nij,ijk->nk", posterior, _GRID)
    scales = np.sqrt(np.einsum("nij,ijk->nk", posterior, _GRID**2) - means**2)
    best = _best(log_likelihood, means, scales)
    inputs = np.concatenate([images, np.ones((POPULATION, 1))], axis=1)
    fit = np.linalg.lstsq(inputs, np.concatenate([best[0], np.log(best[1])], axis=1), rcond=None)[0]
    encoders = {
        name: fit + error * rng.normal(size=fit.shape)
        for name, error in (("trained", 0.09), ("control", 0.08), ("refit", 0.03))
    }
    params = {
        name: gapjax.VAEParams(
            jnp.asarray(encoder, jnp.float32),
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), decoder),
        )
        for name, encoder in encoders.items()
    }
    of = {name: np.split(inputs @ encoder, 2, axis=1) for name, encoder in encoders.items()}
    elbo = {name: bound(log_likelihood, q[0], np.exp(q[1])) for name, q in of.items()}
    elbo["best"] = bound(log_likelihood, *best)
    return Exact(_vae(), params, images, log_prob, elbo, best, log_likelihood, logits)


def prob(exact: Exact, images: np.ndarray) -> np.ndarray:
    """p(x) of any images [N, 12]."""
    return np.exp(_log_likelihood(images, exact.logits) + _LOG_PRIOR).sum((1, 2))


def bound(log_likelihood: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The ELBO [N] with q of these means and scales [N, 2]."""
    kl = 0.5 * (loc**2 + scale**2 - 1).sum(1) - np.log(scale).sum(1)
    return _expectation(log_likelihood, loc, scale) - kl


def _vae() -> gapjax.VAE:
    def encode(encoder, x):
        loc, log_scale = jnp.split(jnp.append(x.astype(jnp.float32), 1.0) @ encoder, 2)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def decode(decoder, z):
        hidden = jnp.tanh(decoder["in"] @ z + decoder["in_bias"])
        return dist.Bernoulli(logits=decoder["out"] @ hidden + decoder["out_bias"]).to_event(1)

    prior = dist.Normal(jnp.zeros(LATENTS), jnp.ones(LATENTS)).to_event(1)
    return gapjax.VAE(None, encode, decode, prior)


def _logits(decoder: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    hidden = np.tanh(z @ decoder["in"].T + decoder["in_bias"])
    return hidden @ decoder["out"].T + decoder["out_bias"]


def _log_likelihood(images: np.ndarray, logits: np.ndarray) -> np.ndarray:
    by_pixel = np.tensordot(images.astype(float), logits, axes=(1, 2))
    return by_pixel - np.logaddexp(0, logits).sum(-1)


def _expectation(
    function: np.ndarray, loc: np.ndarray, scale: np.ndarray, powers: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """E_q [function u_1^a u_2^b] with u = (z - loc) / scale and the powers (a, b)."""
    u = (_POINTS - loc[..., None]) / scale[..., None]  # [N, 2, 41]
    weights = np.exp(-0.5 * u**2) * _STEP / (np.sqrt(2 * np.pi) * scale[..., None])
    first, second = (weights[:, k] * u[:, k] ** powers[k] for k in (0, 1))
    return np.einsum("ni,nij,nj->n", first, function, second, optimize=True)


def _best(
    log_likelihood: np.ndarray, loc: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means and scales [N, 2] of the highest ELBO, by natural gradients.

    At the optimum loc = E[f'] and 1 / scale^2 = 1 - E[f''], with the derivatives of f, which is
    log p(x given z). Their expectations are E[f u] / scale and E[f (u^2 - 1)] / scale^2.
    """
    loc, scale = loc.copy(), scale.copy()
    for _ in range(50):
        plain = _expectation(log_likelihood, loc, scale)
        slope, curvature = np.zeros_like(loc), np.zeros_like(loc)
        for k, powers in enumerate((np.array([1, 0]), np.array([0, 1]))):
            slope[:, k] = _expectation(log_likelihood, loc, scale, tuple(powers)) / scale[:, k]
            square = _expectation(log_likelihood, loc, scale, tuple(2 * powers))
            curvature[:, k] = (square - plain) / scale[:, k] ** 2
        scale = (0.5 / scale**2 + 0.5 * np.maximum(1 - curvature, 0.1)) ** -0.5
        loc = loc + 0.5 * scale**2 * (slope - loc)
    return loc, scale
