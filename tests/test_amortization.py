"""How far encoders are from q*: exact in a linear Gaussian model, and on every kind of images."""

import jax
import numpy as np
import pytest

import gapjax
from experiments import studies

_SEARCH = gapjax.PosteriorSearch(steps_per_round=10, max_rounds=12, num_heldout=50)


def test_gaps_are_those_of_the_exact_posterior(linear):
    """The best q is the exact posterior, so its ELBO is log p(x)."""
    gaps = gapjax.amortization_gaps(
        linear.vae, linear.wrong, jax.random.key(0), linear.images,
        {"exact": linear.exact.encoder}, num_samples=100, search=_SEARCH,
    )  # fmt: skip
    assert abs(gaps.per_image["exact"].mean()) < 0.02  # the noise of the judgement
    bound = gapjax.evaluate(
        linear.vae, linear.wrong, jax.random.key(1), linear.images, num_samples=2000
    )
    lost = linear.log_prob(linear.images) + bound.per_image * np.log(2) * 6
    assert abs(gaps.per_image["as_trained"].mean() - lost.mean()) < 0.1 * lost.mean()
    assert gaps.converged.shape == (len(linear.images),)


def test_the_summary_is_over_seeds_and_images():
    values = np.random.default_rng(0).normal(size=(2, 5))
    rows = studies.amortization_summary({"test": [{"paper": one} for one in values]})
    cell = rows["test"]["paper"]
    assert cell["mean"] == pytest.approx(values.mean())
    assert cell["values"] == pytest.approx(values.mean(1))
    assert cell["stderr"] == pytest.approx(values.mean(1).std(ddof=1) / 2**0.5)
    assert cell["stderr_over_images"] == pytest.approx(values.mean(0).std(ddof=1) / 5**0.5)
    assert f"{values.mean():.2f}" in studies.amortization_table(rows)
