"""Recipes of encoder refits as plain data, and `close_gap`, which follows one.

A recipe says where x comes from, how long the refit is, and with which optimizer. None of them
uses test data. "paper" is `self_consistent` with its defaults, bit for bit.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gapjax.examples import context_of, count, event_shape, take
from gapjax.fit import objectives
from gapjax.fit.api import Member, Refit, init_params, refit_encoder
from gapjax.fit.derived_sources import (
    augmented_source,
    interpolation_source,
    noisy_source,
    reconstruction_source,
    thinned_source,
)
from gapjax.fit.objectives import SeveralSamples
from gapjax.fit.sources import (
    DataSource,
    Source,
    data_source,
    first_example,
    model_source,
    weighted_source,
)
from gapjax.fit.step import Objective, steps_per_epoch
from gapjax.infer.learned import RefinementParams, with_refinement
from gapjax.infer.newton import Refiner
from gapjax.measure.bounds import Images
from gapjax.model.distributions import integer_range
from gapjax.model.mlp import mlp_encoder
from gapjax.optimizers import adam, cosine_adam
from gapjax.vae import (
    VAE,
    Encoder,
    Frozen,
    VAEParams,
    bind,
    latent_size,
    prior_of,
    sample,
    with_encoder,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an encoder is refitted, as plain data."""

    # names of `SOURCES` with their weights; see `weighted_source`
    sources: tuple[tuple[str, float], ...]
    num_epochs: int = 100  # epochs, each of as many examples as there are training images
    batch_size: int = 100  # examples in a step
    learning_rate: float = 1e-3  # of Adam
    # "constant", or "cosine": after a rise in the first twentieth it falls to 0
    schedule: str = "constant"
    num_samples: int = 1  # samples of z in the ELBO of each example
    objective: str = "elbo"  # a name of `OBJECTIVES`
    # of a new feed-forward encoder, where another size than the trained one's is wanted; it starts
    # anew, and scales x by the likelihood's levels if it has any
    hidden_sizes: tuple[int, ...] | None = None
    evidence: str = ""  # what chose it
    # of learned refinement after the encoder; see `with_refinement`. It then costs more at test
    # time
    refinement_steps: int = 0


class RefittedModel(NamedTuple):
    """The result of `close_gap`: the model with the encoder that `params` are for, and the refit.

    The model is the one given, unless the recipe asks for another encoder.
    """

    vae: VAE
    params: VAEParams
    refit: Refit


def _affine(data: Source) -> Source:
    return augmented_source(data, max_rotation=0.2, max_scale=0.15, max_shear=0.2)


# From the name of a source to how it is made from the model as trained and its training images.
SOURCES: Mapping[str, Callable[[VAE, VAEParams, DataSource], Source]] = {
    "data": lambda vae, params, data: data,
    "model": lambda vae, params, data: model_source(
        vae, params.decoder, data.num_examples, context_of(data.images)
    ),
    "reconstructions": reconstruction_source,
    "affine_reconstructions": lambda vae, params, data: reconstruction_source(
        vae, params, _affine(data)
    ),
    "interpolations": functools.partial(interpolation_source, max_angle=math.pi / 2),
    "widened": functools.partial(interpolation_source, partner="prior"),
    "affine": lambda vae, params, data: _affine(data),
    "noisy": lambda vae, params, data: noisy_source(data, 0.1),
    "thinned": lambda vae, params, data: thinned_source(data, 0.3),
}

_MOVED = ("affine", "affine_reconstructions")  # sources that are made of images alone
_OPTIMIZERS: Mapping[str, Callable[[float, int], Any]] = {
    "constant": lambda rate, num_steps: adam(rate),
    "cosine": functools.partial(cosine_adam, warmup=0.05),
}

# From the name of an objective to what it is, for so many samples of z.
OBJECTIVES: Mapping[str, Callable[[int], Objective]] = {
    "elbo": SeveralSamples,
    "sleep": lambda num_samples: objectives.sleep_phase,
    "elbo_and_sleep": lambda num_samples: objectives.WithSleep(1.0, SeveralSamples(num_samples)),
    "denoising": lambda num_samples: objectives.DenoisingElbo(0.3),
    "consistent_codes": lambda num_samples: objectives.ConsistentCodes(1.0),
    "distillation": lambda num_samples: objectives.Distillation(Refiner(num_steps=1, num_judged=3)),
}

_but = dataclasses.replace
_PAPER = Recipe((("model", 0.5), ("data", 0.5)), evidence="Zhang, Hayes, Barber, eqs. 14-16")
_MIXTURE = (("model", 1.0), ("interpolations", 1.0), ("noisy", 1.0), ("affine", 0.5))
# All as long as the paper's, so that they can be compared with it and with each other.
_QUICK = Recipe(
    _MIXTURE, learning_rate=3e-3, schedule="cosine", evidence="compared on validation images"
)
_LONG = _but(_QUICK, num_epochs=500, num_samples=4)
_REFINEMENT = _but(_LONG, learning_rate=1e-3)  # which trials on digits preferred here
# For tens of thousands of images: decoded codes at, between and around those of training images.
_DECODED = ("reconstructions", "affine_reconstructions", "interpolations", "widened")
_MNIST = Recipe(
    tuple((name, 1.0) for name in _DECODED), num_epochs=200, schedule="cosine",
    evidence="short trials on validation images of binary MNIST, one seed; see docs/close.md",
)  # fmt: skip
# One of the four alone is as good in such trials, and its epochs take two thirds of the time.
_WIDENED = _but(
    _MNIST, sources=(("widened", 1.0),),
    evidence="compared on grey MNIST, one seed; see docs/close.md",
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = {
    "paper": _PAPER,
    "control": _but(_PAPER, sources=(("model", 0.0), ("data", 1.0)), evidence="alpha = 0"),
    "best": _but(_LONG, evidence="lowest validation BPD on digits, 5 seeds; see docs/close.md"),
    "best_control": _but(_LONG, sources=(("data", 1.0),)),
    "best_mnist": _MNIST,
    "widened": _WIDENED,
    # On binary MNIST it closes 48 % of the gap, `best_mnist` with a quarter of the epochs 44 %.
    "widened_long": _but(
        _WIDENED, num_epochs=800, evidence="compared on binary MNIST, one seed; see docs/close.md"
    ),
    "refinement_mnist": _but(
        _WIDENED,
        refinement_steps=2,
        num_epochs=60,
        evidence="lowest validation BPD on binary and grey MNIST, one seed; see docs/close.md",
    ),
    "counts": _but(
        _LONG,
        sources=(("model", 1.0), ("widened", 1.0), ("thinned", 1.0)),
        num_epochs=200,
        evidence="for counts; compared by the atlas",
    ),
    "larger": _but(_LONG, hidden_sizes=(1000, 1000)),
    "refinement_1": _but(_REFINEMENT, refinement_steps=1),
    "refinement_2": _but(_REFINEMENT, refinement_steps=2),
    "mixture": _QUICK,
    "samples": _but(_QUICK, sources=(("model", 1.0),)),
    "sleep": _but(_QUICK, objective="sleep"),
    "distillation": _but(_QUICK, objective="distillation"),
    "elbo_and_sleep": _but(_QUICK, objective="elbo_and_sleep"),
    "noisy": _but(_QUICK, sources=(("noisy", 1.0),)),
    "thinned": _but(_QUICK, sources=(("thinned", 1.0),)),
    "reconstructions": _but(_QUICK, sources=(("reconstructions", 1.0),)),
    "affine": _but(_QUICK, sources=(("affine", 1.0),)),
    "denoising": _but(_QUICK, sources=(("data", 1.0),), objective="denoising"),
    "consistent_codes": _but(_QUICK, sources=(("data", 1.0),), objective="consistent_codes"),
}


def close_gap(
    vae: VAE,
    params: VAEParams,
    train_images: Images,
    rng_key: jax.Array,
    recipe: str | Recipe | None = None,
    *,
    encoder: Encoder | None = None,
    **options: Any,
) -> RefittedModel:
    """Refits the encoder by a recipe: closes a part of the gap, without test data.

    Args:
      recipe: a name of `RECIPES`, or a `Recipe` of your own. By default it is "counts" where the
        likelihood is of integers without a greatest one, and "best" elsewhere: the mixtures with
        the lowest validation loss in most rows of the atlas, each with many epochs.
      encoder: a new encoder to train in place of the model's, e.g. `mlp_encoder(...)`; by default
        what the recipe says.
      **options: see `refit_encoder`; what is given here goes before the recipe.

    Raises:
      ValueError: an unknown recipe or source.
    """
    recipe = recipe or default_recipe(vae, train_images)
    named: Recipe = _named("recipe", recipe, RECIPES) if isinstance(recipe, str) else recipe
    sizes = {name: options[name] for name in ("num_epochs", "batch_size") if name in options}
    chosen = dataclasses.replace(named, **sizes)
    model = recipe_model(chosen, vae, train_images, encoder)
    member = recipe_member(chosen, vae, params, train_images, rng_key, encoder)
    options = recipe_options(chosen, count(train_images)) | options
    refit = refit_encoder(model, *member[:3], **options)
    return RefittedModel(model, refit.params, refit)


def default_recipe(vae: VAE, train_images: Images) -> str:
    """The recipe that `close_gap` follows by default."""
    likelihood = _likelihood(bind(vae, take(train_images, 0))[0])
    is_discrete = getattr(getattr(likelihood, "support", None), "is_discrete", False)
    return "counts" if is_discrete and integer_range(likelihood) is None else "best"


def recipe_member(
    recipe: Recipe,
    vae: VAE,
    params: VAEParams,
    train_images: Images,
    rng_key: jax.Array,
    encoder: Encoder | None = None,
) -> Member:
    """What `close_gap` refits, for `refit_members` of the model that `recipe_model` gives."""
    source = recipe_source(recipe, vae, params, data_source(train_images))
    model = recipe_model(recipe, vae, train_images, encoder)
    if model is vae:
        return Member(params, source, rng_key)
    init_key, rng_key = jax.random.split(rng_key)
    start = init_params.on(vae=model)(init_key).encoder
    if isinstance(start, RefinementParams):  # which may keep the trained encoder
        is_fresh = recipe.hidden_sizes is not None or encoder is not None
        base = start.base if is_fresh else params.encoder
        start = start._replace(base=base, decoder=Frozen(params.decoder))
    return Member(params._replace(encoder=start), source, rng_key)


def recipe_options(recipe: Recipe, num_examples: int) -> dict[str, Any]:
    """The options of `refit_members` that a recipe sets, for so many training images."""
    num_steps = recipe.num_epochs * steps_per_epoch(num_examples, recipe.batch_size)
    optimizer = _named("schedule", recipe.schedule, _OPTIMIZERS)
    return {
        "num_epochs": recipe.num_epochs,
        "batch_size": recipe.batch_size,
        "optimizer": optimizer(recipe.learning_rate, num_steps),
        "objective": _named("objective", recipe.objective, OBJECTIVES)(recipe.num_samples),
    }


def recipe_model(
    recipe: Recipe, vae: VAE, train_images: Images, encoder: Encoder | None = None
) -> VAE:
    """The model with the encoder that a recipe asks for; the one given where it asks for none."""
    if encoder is None and recipe.hidden_sizes is not None:
        if not hasattr(train_images, "shape"):
            raise TypeError(
                "the recipe's hidden_sizes are of a feed-forward encoder of one array; give "
                "encoder, an encoder of your own for these examples, or a recipe without them"
            )
        encoder = mlp_encoder(
            np.shape(train_images)[1:],
            latent_dim=latent_size(vae),
            hidden_sizes=recipe.hidden_sizes,
            levels=_levels(vae),
        )
    model = vae if encoder is None else with_encoder(vae, encoder)
    if not recipe.refinement_steps:
        return model
    latent_dim = latent_size(bind(vae, take(train_images, 0))[0])
    return with_refinement(model, recipe.refinement_steps, latent_dim=latent_dim)


def recipe_source(recipe: Recipe, vae: VAE, params: VAEParams, data: DataSource) -> Source:
    """The mixture of sources that a recipe names, made from the model as trained."""
    shape = event_shape(jax.eval_shape(first_example, data))
    moved = [name for name, _ in recipe.sources if name in _MOVED and len(shape) not in (2, 3)]
    if moved:
        warnings.warn(
            f"the recipe does without {', '.join(moved)}: x has the shape {shape}, and only images "
            "[H, W] or [H, W, C] can be moved", stacklevel=4,
        )  # fmt: skip
    kept = [pair for pair in recipe.sources if pair[0] not in moved] or [("data", 1.0)]
    sources = [_named("source", name, SOURCES)(vae, params, data) for name, _ in kept]
    return weighted_source(sources, [weight for _, weight in kept])


def _named(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """What a recipe names, from the table of what there is."""
    if name not in table:
        raise ValueError(f"{kind} is {name!r}; it must be one of {', '.join(table)}")
    return table[name]


def _levels(vae: VAE) -> int:
    """The levels of x that the likelihood knows of; 2, with which x stays as it is, else."""
    known = integer_range(_likelihood(vae))
    return max(2, 1 + known[1]) if known else 2


def _likelihood(vae: VAE) -> Any:
    """p(x given z), for its type and support."""
    found = None

    def look(rng_key: jax.Array) -> None:
        nonlocal found
        decoder = vae.init(rng_key).decoder
        found = vae.decode(decoder, sample(prior_of(vae, decoder), rng_key))

    jax.eval_shape(look, jax.random.key(0))
    return found
