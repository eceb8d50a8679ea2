from . import checkpoints as checkpoints, jobs as jobs, parallel as parallel
from .codec.coding import compress as compress, decompress as decompress
from .data import Dataset as Dataset, load_dataset as load_dataset
from .fit import (
    derived_sources as derived_sources,
    objectives as objectives,
    recipes as recipes,
    sources as sources,
)
from .fit.api import (
    Member as Member,
    refit_encoder as refit_encoder,
    refit_members as refit_members,
    train as train,
)
from .fit.recipes import (
    close_gap as close_gap,
    optimal_inference as optimal_inference,
    self_consistent as self_consistent,
)
from .fit.sources import (
    data_source as data_source,
    mixture_source as mixture_source,
    model_source as model_source,
)
from .fit.step import kernel as kernel
from .infer.newton import Refiner as Refiner, refine as refine
from .infer.search import PosteriorSearch as PosteriorSearch, best_posteriors as best_posteriors
from .measure.annealing import Annealing as Annealing
from .measure.log_likelihood import log_likelihood as log_likelihood
from .model.bounds import (
    bits_per_dim as bits_per_dim,
    elbo as elbo,
    importance_weighted_bound as importance_weighted_bound,
)
from .model.mlp import mlp_vae as mlp_vae
from .optimizers import Convergence as Convergence, adam as adam, encoder_only as encoder_only
from .results.estimates import evaluate as evaluate, paired_difference as paired_difference
from .results.ledger import ledger as ledger
from .vae import VAE as VAE, VAEParams as VAEParams

__version__: str
