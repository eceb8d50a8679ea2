"""gapjax: measure and close the generalization gap of amortized inference."""

from gapjax.data.datasets import DATASETS, Dataset, DatasetError, load_dataset
from gapjax.fit.loop import Curve, Progress
from gapjax.fit.optimizers import adam, encoder_only
from gapjax.fit.plateau import Convergence
from gapjax.fit.posteriors import (
    OptimalPosteriors,
    PosteriorSearch,
    optimal_posteriors,
    posterior_bounds,
)
from gapjax.fit.refits import (
    Refit,
    optimal_inference,
    refit_encoder,
    self_consistent,
)
from gapjax.fit.sources import Source, data_source, mixture_source, model_source
from gapjax.fit.steps import TrainState
from gapjax.fit.training import train
from gapjax.measure.likelihoods import (
    Annealing,
    LogLikelihood,
    Sandwich,
    log_likelihood,
    sandwich,
)
from gapjax.measure.per_image import encoder_gradient_norms
from gapjax.measure.statistics import effective_number
from gapjax.model.bounds import bits_per_dim, elbo, importance_weighted_bound
from gapjax.model.distributions import DiscretizedLogistic
from gapjax.model.mlp import mlp_vae
from gapjax.model.vae import VAE, VAEParams, reconstruct, sample_model
from gapjax.results.estimates import Difference, Evaluation, evaluate, paired_difference
from gapjax.results.gaps import Gaps, inference_gaps
from gapjax.results.ledger import Entry, Ledger, ledger

__version__ = "0.1.0"

__all__ = [
    "DATASETS",
    "VAE",
    "Annealing",
    "Convergence",
    "Curve",
    "Dataset",
    "DatasetError",
    "Difference",
    "DiscretizedLogistic",
    "Entry",
    "Evaluation",
    "Gaps",
    "Ledger",
    "LogLikelihood",
    "OptimalPosteriors",
    "PosteriorSearch",
    "Progress",
    "Refit",
    "Sandwich",
    "Source",
    "TrainState",
    "VAEParams",
    "adam",
    "bits_per_dim",
    "data_source",
    "effective_number",
    "elbo",
    "encoder_gradient_norms",
    "encoder_only",
    "evaluate",
    "importance_weighted_bound",
    "inference_gaps",
    "ledger",
    "load_dataset",
    "log_likelihood",
    "mixture_source",
    "mlp_vae",
    "model_source",
    "optimal_inference",
    "optimal_posteriors",
    "paired_difference",
    "posterior_bounds",
    "reconstruct",
    "refit_encoder",
    "sample_model",
    "sandwich",
    "self_consistent",
    "train",
]
