"""gapjax: measure and close the generalization gap of amortized inference.

`import gapjax` imports neither JAX nor any other library. Modules are imported when their
names are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names as in _ROOMS, for type checkers and editors
    from gapjax.codec.coding import compress, decompress
    from gapjax.codec.stack import CodecError
    from gapjax.data import DATASETS, Dataset, DatasetError, load_dataset
    from gapjax.fit.augmentation import augmented_source, noisy_source
    from gapjax.fit.codes import interpolation_source, reconstruction_source
    from gapjax.fit.loop import Curve, Progress
    from gapjax.fit.objectives import (
        consistent_codes,
        denoising_elbo,
        distillation,
        imitation,
        several_samples,
        sleep_phase,
        wake_sleep,
        with_sleep,
    )
    from gapjax.fit.optimizers import adam, cosine_adam, encoder_only
    from gapjax.fit.paper_refits import optimal_inference, self_consistent
    from gapjax.fit.plateau import Convergence
    from gapjax.fit.posteriors import OptimalPosteriors, PosteriorSearch, optimal_posteriors
    from gapjax.fit.recipes import RECIPES, Closed, Recipe, close_gap
    from gapjax.fit.refine import Refined, Refiner, refine
    from gapjax.fit.refits import Refit, refit_encoder
    from gapjax.fit.sources import (
        Source,
        data_source,
        mixture_source,
        model_source,
        weighted_source,
    )
    from gapjax.fit.steps import TrainState, init_state
    from gapjax.fit.training import train
    from gapjax.measure.annealing import Annealing
    from gapjax.measure.importance import LogLikelihood
    from gapjax.measure.likelihoods import Sandwich, log_likelihood, sandwich
    from gapjax.measure.per_image import encoder_gradient_norms, posterior_bounds
    from gapjax.measure.statistics import effective_number
    from gapjax.model.bounds import bits_per_dim, elbo, importance_weighted_bound
    from gapjax.model.distributions import DiscretizedLogistic
    from gapjax.model.mlp import mlp_encoder, mlp_vae
    from gapjax.model.refining import RefiningParams, refining_params, refining_vae
    from gapjax.model.vae import (
        VAE,
        Distribution,
        Encoder,
        Frozen,
        VAEParams,
        reconstruct,
        sample_model,
        with_encoder,
    )
    from gapjax.results.amortization import AmortizationGaps, amortization_gaps
    from gapjax.results.estimates import Difference, Evaluation, evaluate, paired_difference
    from gapjax.results.gaps import Gaps, inference_gaps
    from gapjax.results.ledger import Entry, Estimate, Ledger, ledger

__version__ = "0.1.0"

__all__ = [
    "DATASETS",
    "RECIPES",
    "VAE",
    "AmortizationGaps",
    "Annealing",
    "Closed",
    "CodecError",
    "Convergence",
    "Curve",
    "Dataset",
    "DatasetError",
    "Difference",
    "DiscretizedLogistic",
    "Distribution",
    "Encoder",
    "Entry",
    "Estimate",
    "Evaluation",
    "Frozen",
    "Gaps",
    "Ledger",
    "LogLikelihood",
    "OptimalPosteriors",
    "PosteriorSearch",
    "Progress",
    "Recipe",
    "Refined",
    "Refiner",
    "RefiningParams",
    "Refit",
    "Sandwich",
    "Source",
    "TrainState",
    "VAEParams",
    "adam",
    "amortization_gaps",
    "augmented_source",
    "bits_per_dim",
    "close_gap",
    "compress",
    "consistent_codes",
    "cosine_adam",
    "data_source",
    "decompress",
    "denoising_elbo",
    "distillation",
    "effective_number",
    "elbo",
    "encoder_gradient_norms",
    "encoder_only",
    "evaluate",
    "imitation",
    "importance_weighted_bound",
    "inference_gaps",
    "init_state",
    "interpolation_source",
    "ledger",
    "load_dataset",
    "log_likelihood",
    "mixture_source",
    "mlp_encoder",
    "mlp_vae",
    "model_source",
    "noisy_source",
    "optimal_inference",
    "optimal_posteriors",
    "paired_difference",
    "posterior_bounds",
    "reconstruct",
    "reconstruction_source",
    "refine",
    "refining_params",
    "refining_vae",
    "refit_encoder",
    "sample_model",
    "sandwich",
    "self_consistent",
    "several_samples",
    "sleep_phase",
    "train",
    "wake_sleep",
    "weighted_source",
    "with_encoder",
    "with_sleep",
]

# The public names by the module that defines them.
_ROOMS = {
    "codec.coding": ("compress", "decompress"),
    "codec.stack": ("CodecError",),
    "data": ("DATASETS", "Dataset", "DatasetError", "load_dataset"),
    "fit.augmentation": ("augmented_source", "noisy_source"),
    "fit.codes": ("interpolation_source", "reconstruction_source"),
    "fit.loop": ("Curve", "Progress"),
    "fit.objectives": (
        "consistent_codes",
        "denoising_elbo",
        "distillation",
        "imitation",
        "several_samples",
        "sleep_phase",
        "wake_sleep",
        "with_sleep",
    ),
    "fit.optimizers": ("adam", "cosine_adam", "encoder_only"),
    "fit.paper_refits": ("optimal_inference", "self_consistent"),
    "fit.plateau": ("Convergence",),
    "fit.posteriors": ("OptimalPosteriors", "PosteriorSearch", "optimal_posteriors"),
    "fit.recipes": ("RECIPES", "Closed", "Recipe", "close_gap"),
    "fit.refine": ("Refined", "Refiner", "refine"),
    "fit.refits": ("Refit", "refit_encoder"),
    "fit.sources": (
        "Source",
        "data_source",
        "mixture_source",
        "model_source",
        "weighted_source",
    ),
    "fit.steps": ("TrainState", "init_state"),
    "fit.training": ("train",),
    "measure.annealing": ("Annealing",),
    "measure.importance": ("LogLikelihood",),
    "measure.likelihoods": ("Sandwich", "log_likelihood", "sandwich"),
    "measure.per_image": ("encoder_gradient_norms", "posterior_bounds"),
    "measure.statistics": ("effective_number",),
    "model.bounds": ("bits_per_dim", "elbo", "importance_weighted_bound"),
    "model.distributions": ("DiscretizedLogistic",),
    "model.mlp": ("mlp_encoder", "mlp_vae"),
    "model.refining": ("RefiningParams", "refining_params", "refining_vae"),
    "model.vae": (
        "VAE",
        "Distribution",
        "Encoder",
        "Frozen",
        "VAEParams",
        "reconstruct",
        "sample_model",
        "with_encoder",
    ),
    "results.amortization": ("AmortizationGaps", "amortization_gaps"),
    "results.estimates": ("Difference", "Evaluation", "evaluate", "paired_difference"),
    "results.gaps": ("Gaps", "inference_gaps"),
    "results.ledger": ("Entry", "Estimate", "Ledger", "ledger"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}
_MODULES = {room.split(".")[0] for room in _ROOMS} | {"checkpoints", "parallel"}

if not TYPE_CHECKING:  # for a type checker, a module with __getattr__ has every name

    def __getattr__(name):
        """Imports a public name, a folder or a module when it is first used (PEP 562)."""
        if name in _HOMES:
            value = getattr(importlib.import_module(f"gapjax.{_HOMES[name]}"), name)
        elif name in _MODULES:
            value = importlib.import_module(f"gapjax.{name}")
        else:
            raise AttributeError(f"module 'gapjax' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__, *_MODULES})
