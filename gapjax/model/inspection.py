"""What can be seen of a model and its data before it is trained or measured."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gapjax import parallel
from gapjax.examples import on_device, shape_of_one, take
from gapjax.model import checks
from gapjax.model.distributions import innermost, type_name
from gapjax.vae import VAE, Given, VAEParams, log_prob, observed, prior_of, sample

_NUM_IMAGES, _NUM_SAMPLES, _NUM_VALUES = 64, 2000, 2**23


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `check_vae` has seen of a model; `print` shows it as a report."""

    seen: dict[str, str]  # what was looked at, such as "posterior", and what was seen
    problems: tuple[str, ...]  # a line for each thing that is wrong, or hardly meant

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.seen.items()]
        lines += [f"PROBLEM: {line}" for line in self.problems] or ["no problem was seen"]
        return "\n".join(lines)


def check_vae(vae: VAE, params: VAEParams, images: Any) -> Inspection:
    """Looks at all that can be seen of a model; `print(gapjax.check_vae(...))` is a report.

    Beside what every call refuses, it looks whether q moves with x, whether the data's type can
    hold the model's samples, which parameters nothing depends on, such as those of a learned prior
    that is not in `vae.prior`, and whether `log_prob` and `sample` agree: for y drawn from a
    density f, and a region A where f > 0,

        E[1{y in A} / f(y)] / |A| = 1.

    A holds about half of the samples: an interval for each number with a `log_prob` of its own,
    else an ellipsoid of up to 50 real numbers. The estimate is good for an f with one hill.
    All `images` [N, *event] are compared with the support of p, and 64 are given to q.
    """
    seen: dict[str, str] = {}
    problems: list[str] = []
    try:
        checks.check_array("images", images)
        model = checks.check_model(vae, params, shape_of_one(images))
    except (TypeError, ValueError) as error:
        return Inspection(seen, (str(error),))
    for check in (
        lambda: checks.check_reparameterized(model),
        lambda: checks.check_trainable(params),
        lambda: checks.check_images("images", images, model),
    ):
        try:
            check()
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    for name in model.unused:
        hint = "; what a prior has learned belongs into the prior of the VAE" * ("." in name)
        problems.append(f"neither encode nor decode uses {name}{hint}")
    if isinstance(images, Given):  # all at the context of the first
        vae, images = vae.at(on_device(take(images.context, 0))), images.x
    few = jax.tree.map(np.asarray, take(images, slice(_NUM_IMAGES)))
    reason = checks.explain(vae, params, jax.random.key(0), on_device(take(few, 0)))
    if reason:
        return Inspection(seen, (*problems, f"the ELBO of image 0 is not finite: {reason}"))
    z = jax.eval_shape(lambda key: sample(prior_of(vae, params.decoder), key), jax.random.key(0))
    if not (hasattr(images, "shape") and hasattr(z, "shape")):
        seen["samples"] = "not looked at, as x or z is not one array"
        return Inspection(seen, tuple(problems))
    number = max(40, min(_NUM_SAMPLES, _NUM_VALUES // max(1, few[0].size)))
    drawn = _draw(params, jnp.asarray(few), vae=vae, num_samples=number)
    drawn, latents = jax.tree.map(np.asarray, drawn)
    seen["images"] = f"{len(images)} of {_describe(images)}"
    prior = prior_of(vae, params.decoder)
    learned = "fixed in training" if prior is vae.prior else "trained with the decoder"
    kinds = {
        "prior": f"{type_name(prior)}, {learned}",
        "posterior": model.posterior + ", reparameterized" * model.has_rsample,
        "likelihood": f"{model.likelihood}, support {model.support or 'unknown'}",
    }
    for role in filter(drawn.get, kinds):
        integral, stderr = _integral(*drawn[role])
        seen[role] = f"{kinds[role]}; samples are {_describe(drawn[role][0])}"
        if _disagree(integral, stderr):
            problems.append(
                f"log_prob and samples of the {role} do not agree: E[1/f]/|A| of f = exp(log_prob) "
                f"is {integral:.3g} +- {stderr:.2g} where it must be 1"
            )
    spread = drawn["posterior"][0].astype(np.float64).std(axis=0)
    moves = np.ptp(latents.astype(np.float64), axis=0)
    if np.any(few != few[0]) and not np.any(moves > 1e-4 * spread):
        problems.append(
            f"q(z given x) is the same for {len(few)} images: it does not depend on x, as after "
            "batch normalization of one example, or with a last layer of zeros"
        )
    x = drawn.get("likelihood", (few,))[0]
    with np.errstate(invalid="ignore"):
        fits = images.dtype.kind not in "biu" or np.all(x.astype(images.dtype) == x)
    if not fits:
        problems.append(
            f"{images.dtype}, the type of the images, cannot hold the model's samples, "
            f"{_describe(x)}; give the images in a wider type, such as float32"
        )
    return Inspection(seen, tuple(problems))


@parallel.on_one_device
def _draw(params: VAEParams, images: jax.Array, *, vae: VAE, num_samples: int) -> Any:
    """Samples of all three and their log_prob, for the first image; and a z of one key for each."""
    rng_key = jax.random.key(0)

    def draw(distribution: Any, cast: Any = lambda z: z) -> Any:
        keys = jax.random.split(rng_key, num_samples)
        values = jax.vmap(lambda key: sample(distribution, key))(keys)
        of = lambda one: jax.vmap(lambda value: log_prob(one, cast(value)))(values)
        each = of(innermost(distribution))  # often one log_prob for every number
        return values, each if each.shape == values.shape else of(distribution)

    latent = lambda x: sample(vae.encode(params.encoder, x), rng_key)
    p = vae.decode(params.decoder, latent(images[0]))
    prior, posterior = prior_of(vae, params.decoder), vae.encode(params.encoder, images[0])
    drawn = {"prior": draw(prior), "posterior": draw(posterior)}
    if hasattr(p, "sample"):
        drawn["likelihood"] = draw(p, observed)
    return drawn, jax.vmap(latent)(images)


def _integral(values: np.ndarray, log_probs: np.ndarray) -> tuple[float, float]:
    """The mean that `check_vae` compares with 1, and its standard error; NaN where it has none."""
    half, is_integer = len(values) // 2, bool(np.all(values == np.round(values)))
    values, log_probs = values.reshape(len(values), -1), log_probs.astype(np.float64)
    size, first = values.shape[1], values[:half].astype(np.float64)
    if log_probs.size == values.size:
        low, high = np.sort(first, axis=0)[[half // 4, -half // 4]]
        inside = (values >= low) & (values <= high)
        with np.errstate(divide="ignore"):
            log_volume = np.log(high - low + is_integer)
    elif is_integer or size > 50 or np.linalg.cond(cov := np.cov(first.T)) > 1e10:
        return math.nan, math.nan
    else:
        factor = np.linalg.cholesky(cov)
        radius = np.linalg.norm(np.linalg.solve(factor, (values - first.mean(axis=0)).T), axis=0)
        limit = np.median(radius[:half])
        inside = radius <= limit
        log_volume = size / 2 * math.log(math.pi * limit**2) - math.lgamma(size / 2 + 1)
        log_volume += np.log(np.diag(factor)).sum()
    with np.errstate(over="ignore"):
        weights = np.exp(-log_probs.reshape(inside.shape) - log_volume)
    means = np.where(inside, weights, 0.0)[half:].reshape(half, -1).mean(axis=1)
    return float(means.mean()), float(means.std() / math.sqrt(half))


def _disagree(integral: float, error: float) -> bool:
    """Whether an estimate of 1 is off by more than its error and a hill of another form explain."""
    integral = max(integral, 1e-300)
    return abs(math.log(integral)) > 0.3 + 5 * error / integral


def _describe(values: np.ndarray) -> str:
    """Type, shape and range of a batch."""
    return f"{values.dtype} {list(values.shape[1:])}, {values.min():.4g} to {values.max():.4g}"
