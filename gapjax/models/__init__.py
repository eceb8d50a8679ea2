"""Factories of models beside the paper's: layers, convolutions, counts, colour, priors."""

from gapjax.model.chain import Chain as Chain
from gapjax.models.colour import ColourLogistic as ColourLogistic
from gapjax.models.convolution import conv_vae as conv_vae
from gapjax.models.counts import count_examples as count_examples
from gapjax.models.counts import count_vae as count_vae
from gapjax.models.hierarchy import auxiliary_vae as auxiliary_vae
from gapjax.models.hierarchy import hierarchical_vae as hierarchical_vae
from gapjax.models.priors import FlowPrior as FlowPrior
from gapjax.models.priors import MixturePrior as MixturePrior
from gapjax.models.priors import VampPrior as VampPrior
from gapjax.models.priors import with_prior as with_prior
from gapjax.models.regularized import with_weight_norm as with_weight_norm
from gapjax.vae import Given as Given
