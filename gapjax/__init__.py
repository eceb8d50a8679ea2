"""gapjax: measure and close the generalization gap of amortized inference."""

from gapjax.datasets import DATASETS, Dataset, DatasetError, load_dataset
from gapjax.distributions import DiscretizedLogistic
from gapjax.evaluation import (
    Difference,
    Evaluation,
    effective_number,
    encoder_gradient_norms,
    evaluate,
    paired_difference,
)
from gapjax.gaps import Entry, Gaps, Ledger, inference_gaps, ledger
from gapjax.likelihoods import (
    Annealing,
    LogLikelihood,
    Sandwich,
    log_likelihood,
    sandwich,
)
from gapjax.optimizers import adam, encoder_only
from gapjax.posteriors import (
    OptimalPosteriors,
    PosteriorSearch,
    optimal_posteriors,
    posterior_bounds,
)
from gapjax.sources import Source, data_source, mixture_source, model_source
from gapjax.training import (
    Convergence,
    Curve,
    Progress,
    Refit,
    TrainState,
    optimal_inference,
    refit_encoder,
    self_consistent,
    train,
)
from gapjax.vae import (
    VAE,
    VAEParams,
    bits_per_dim,
    elbo,
    importance_weighted_bound,
    mlp_vae,
    reconstruct,
    sample_model,
)

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
