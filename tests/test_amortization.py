"""How far encoders are from q* on every kind of images: `experiments/studies`."""

import numpy as np
import pytest

from experiments import studies


def test_the_summary_is_over_seeds_and_images():
    values = np.random.default_rng(0).normal(size=(2, 5))
    rows = studies.amortization_summary({"test": [{"paper": one} for one in values]})
    cell = rows["test"]["paper"]
    assert cell["mean"] == pytest.approx(values.mean())
    assert cell["values"] == pytest.approx(values.mean(1))
    assert cell["stderr"] == pytest.approx(values.mean(1).std(ddof=1) / 2**0.5)
    assert cell["stderr_over_images"] == pytest.approx(values.mean(0).std(ddof=1) / 5**0.5)
    assert f"{values.mean():.2f}" in studies.amortization_table(rows)
