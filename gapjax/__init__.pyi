from . import checkpoints, jobs, parallel
from .codec.coding import compress, decompress
from .data import Dataset, load_dataset
from .fit import derived_sources, objectives, recipes, sources
from .fit.api import Member, refit_encoder, refit_members, train
from .fit.recipes import close_gap, optimal_inference, self_consistent
from .fit.sources import data_source, mixture_source, model_source
from .fit.step import kernel
from .infer.newton import Refiner, refine
from .infer.search import PosteriorSearch, best_posteriors
from .measure.annealing import Annealing
from .measure.log_likelihood import log_likelihood
from .model.bounds import bits_per_dim, elbo, importance_weighted_bound
from .model.mlp import mlp_vae
from .optimizers import Convergence, adam, encoder_only
from .results.estimates import evaluate, paired_difference
from .results.ledger import ledger
from .vae import VAE, VAEParams

__version__: str
