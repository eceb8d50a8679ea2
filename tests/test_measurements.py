"""`results/measurements` and `results/ledger`: every entry has its closed form."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import PlainNormal

import gapjax
from gapjax import PosteriorSearch, parallel
from gapjax.measure.bounds import per_image_bounds
from gapjax.results.ledger import Estimate, balance
from gapjax.results.measurements import Measured, amortization_gaps, measure, subset


def _measured(rng, count, names=("as_trained", "self_consistent", "optimal")):
    """Random numbers in the place of measurements."""
    draw = lambda: rng.normal(size=count)
    flags = rng.random(count) < 0.3
    return Measured(
        elbo={name: draw() for name in names}, optimal=draw(), log_prob=draw(), ess=draw() ** 2,
        acceptance=rng.random(count), kept_start=flags, converged=~flags,
        num_steps=rng.integers(1, 9, count),
    )  # fmt: skip


def test_the_ledger_adds_up():
    rng = np.random.default_rng(0)
    train, test = _measured(rng, 30), _measured(rng, 20)
    book = balance(train, test, refit="optimal", num_available=(100, 20))
    for account, measured in ((book.train, train), (book.test, test)):
        assert account.log_prob.nats == pytest.approx(measured.log_prob.mean())
        approximation = account.approximation_gap.nats
        assert account.log_prob.nats == pytest.approx(account.optimal.nats + approximation)
        for name, encoder in account.encoders.items():
            assert encoder.elbo.nats == pytest.approx(measured.elbo[name].mean())
            lost = encoder.amortization_gap.nats + approximation
            assert account.log_prob.nats == pytest.approx(encoder.elbo.nats + lost)
            assert encoder.bound_gap.nats == pytest.approx(lost)
    for name, encoder in book.test.encoders.items():
        amortization = encoder.inference_gap_by_refit.nats + encoder.capacity_gap.nats
        assert encoder.amortization_gap.nats == pytest.approx(amortization)
        lost = book.model_gap.nats + book.test.approximation_gap.nats + amortization
        assert book.train.log_prob.nats - encoder.elbo.nats == pytest.approx(lost)
        elbo_gap = book.train.encoders[name].elbo.nats - encoder.elbo.nats
        assert book.elbo_gaps[name].nats == pytest.approx(elbo_gap)
    assert book.train.encoders["as_trained"].inference_gap_by_refit is None
    assert (book.train.num_images, book.train.num_available) == (30, 100)
    assert book.test.quality["kept_start"] == test.kept_start.mean()
    assert book.test.quality["ess_least"] == test.ess.min()


def test_errors_are_paired_on_one_set_and_independent_between_two():
    rng = np.random.default_rng(1)
    train, test = _measured(rng, 30), _measured(rng, 20)
    book = balance(train, test, refit="optimal")
    paired = lambda a, b: np.std(a - b, ddof=1) / math.sqrt(len(a))
    encoder = book.test.encoders["as_trained"]
    elbo, refitted = test.elbo["as_trained"], test.elbo["optimal"]
    for entry, upper, lower in (
        (encoder.amortization_gap, test.optimal, elbo),
        (encoder.bound_gap, test.log_prob, elbo),
        (encoder.inference_gap_by_refit, refitted, elbo),
        (encoder.capacity_gap, test.optimal, refitted),
        (book.test.approximation_gap, test.log_prob, test.optimal),
    ):
        assert entry.stderr == pytest.approx(paired(upper, lower))
    expected = math.hypot(paired(train.log_prob, 0), paired(test.log_prob, 0))
    assert book.model_gap.stderr == pytest.approx(expected)


def test_what_was_fitted_on_test_images_says_so():
    rng = np.random.default_rng(2)
    book = balance(_measured(rng, 9), _measured(rng, 9), refit="optimal")
    trained, refitted = book.test.encoders["as_trained"], book.test.encoders["optimal"]
    honest = (
        book.model_gap, book.test.log_prob, trained.elbo, trained.bound_gap, book.train.optimal,
        book.train.encoders["as_trained"].amortization_gap, book.elbo_gaps["self_consistent"],
    )  # fmt: skip
    fitted = (
        book.test.optimal, book.test.approximation_gap, trained.amortization_gap,
        trained.inference_gap_by_refit, trained.capacity_gap, refitted.elbo, refitted.bound_gap,
        book.train.encoders["optimal"].elbo, book.elbo_gaps["optimal"],
    )  # fmt: skip
    assert not any(entry.fitted_on_test for entry in honest)
    assert all(entry.fitted_on_test for entry in fitted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Own:
    """A user's posterior: two methods, two arrays, and no KL that anyone knows."""

    loc: jax.Array
    log_scale: jax.Array

    def sample(self, rng_key):
        return self.loc + jnp.exp(self.log_scale) * jax.random.normal(rng_key, self.loc.shape)

    def log_prob(self, z):
        standard = (z - self.loc) * jnp.exp(-self.log_scale)
        return (-0.5 * standard**2 - self.log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


class _Correlated:
    """A linear Gaussian model whose posterior is correlated, in float64: no diagonal q is exact.

    Training images are drawn from the model, test images from elsewhere; every entry of the
    ledger is an expectation of a quadratic, known in closed form.
    """

    num_repeats, num_images, sigma = 200, 25, 0.6

    def __init__(self):
        rng = np.random.default_rng(3)
        self.weight = np.array([[1.0, 0.6], [0.8, -0.2], [0.3, 0.9]])
        self.bias = np.array([0.3, -0.5, 0.1])
        self.precision = np.eye(2) + self.weight.T @ self.weight / self.sigma**2
        self.covariance = self.weight @ self.weight.T + self.sigma**2 * np.eye(3)
        self.gain = np.linalg.inv(self.precision) @ self.weight.T / self.sigma**2
        self.means = {"train": self.bias, "test": self.bias + np.array([0.6, -0.3, 0.5])}
        variance = 1 / np.diag(self.precision)
        self.encoders = {
            "as_trained": self._encoder(0.8, 0.3, 1.5 * variance),
            "refit": self._encoder(0.9, 0.15, 1.2 * variance),
            "near": self._encoder(0.98, 0.02, 1.05 * variance),  # where the search starts
        }
        factor = np.linalg.cholesky(self.covariance)
        count = self.num_repeats * self.num_images
        self.images = {
            name: (mean + rng.normal(size=(count, 3)) @ factor.T).astype(np.float32)
            for name, mean in self.means.items()
        }
        decoder = {"weight": self.weight, "bias": self.bias}
        as_arrays = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        self.decoder, self.encoders = as_arrays(decoder), as_arrays(self.encoders)
        self.vae = gapjax.VAE(
            init=lambda rng_key: None,
            encode=lambda e, x: _Own(e["weight"] @ x + e["bias"], e["log_scale"]),
            decode=lambda d, z: dist.Normal(d["weight"] @ z + d["bias"], self.sigma).to_event(1),
            prior=PlainNormal(2),
        )
        self.params = gapjax.VAEParams(self.encoders["as_trained"], self.decoder)

    def _encoder(self, share, shift, variance):
        bias = shift - share * self.gain @ self.bias
        return {"weight": share * self.gain, "bias": bias, "log_scale": 0.5 * np.log(variance)}

    def log_prob(self, name):
        shift = self.means[name] - self.bias
        quadratic = 3 + shift @ np.linalg.solve(self.covariance, shift)
        return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * self.covariance)[1])

    def optimal(self, name):
        log_det = np.linalg.slogdet(self.precision)[1]
        return self.log_prob(name) - 0.5 * (np.log(np.diag(self.precision)).sum() - log_det)

    def elbo(self, name, encoder):
        """Log p(x) minus the mean of KL(q || p(z given x)) over this set's distribution of x."""
        e = {key: np.asarray(value, np.float64) for key, value in self.encoders[encoder].items()}
        slope = self.gain - e["weight"]
        shift = slope @ self.means[name] - self.gain @ self.bias - e["bias"]
        distance = np.trace(self.precision @ slope @ self.covariance @ slope.T)
        distance += shift @ self.precision @ shift
        spread = np.diag(self.precision) @ np.exp(2 * e["log_scale"]) - 2 * e["log_scale"].sum()
        log_det = np.linalg.slogdet(self.precision)[1]
        return self.log_prob(name) - 0.5 * (spread + distance - 2 - log_det)

    def truth(self):
        """Every entry of the ledger, by the path that `_entries` gives it."""
        of, trained = self.elbo, "as_trained"
        log_prob, optimal = self.log_prob, self.optimal
        truth = {"model_gap": log_prob("train") - log_prob("test")}
        for name in ("train", "test"):
            truth |= {
                f"{name}.log_prob": log_prob(name),
                f"{name}.optimal": optimal(name),
                f"{name}.approximation_gap": log_prob(name) - optimal(name),
                f"{name}.elbo": of(name, trained),
                f"{name}.amortization_gap": optimal(name) - of(name, trained),
                f"{name}.bound_gap": log_prob(name) - of(name, trained),
            }
        return truth | {
            "test.inference_gap_by_refit": of("test", "refit") - of("test", trained),
            "test.capacity_gap": optimal("test") - of("test", "refit"),
            "elbo_gap": of("train", trained) - of("test", trained),
        }


def _entries(book):
    """The entries of the ledger for the encoder as trained, as one flat mapping."""
    entries = {"model_gap": book.model_gap, "elbo_gap": book.elbo_gaps["as_trained"]}
    for name, account in (("train", book.train), ("test", book.test)):
        found = {**account._asdict(), **account.encoders["as_trained"]._asdict()}
        entries |= {f"{name}.{key}": e for key, e in found.items() if isinstance(e, Estimate)}
    return entries


@pytest.fixture(scope="module")
def correlated():
    """The model, and what was measured of all repeats' images at once."""
    model = _Correlated()
    search = PosteriorSearch(tolerance=0.003, num_decays=1)
    measured = [
        measure(
            model.vae, model.params, jax.random.key(number), model.images[name], model.encoders,
            num_samples=10, search=search, method="importance", num_importance_samples=200,
            batch_size=2500,
        )
        for number, name in enumerate(("train", "test"))
    ]  # fmt: skip
    return model, *measured


def test_every_entry_is_its_closed_form(correlated):
    """Within 3 standard errors, on 2,000 images of each set."""
    model, train, test = correlated
    train, test = jax.tree.map(lambda leaf: leaf[:2000], (train, test))
    entries, truth = _entries(balance(train, test, refit="refit")), model.truth()
    assert set(entries) == set(truth)
    for name, value in truth.items():
        assert abs(entries[name].nats - value) < 3 * entries[name].stderr, name
    assert truth["test.approximation_gap"] > 0.05 and truth["model_gap"] > 0.2
    gaps = {name: entry for name, entry in entries.items() if name.endswith("_gap")}
    assert all(entry.nats > 0 for entry in gaps.values())  # bounds are on their side


def test_standard_errors_cover_the_truth(correlated):
    """95 % intervals of 200 ledgers of 25 images each hold it in 90 to 99 % of them."""
    model, train, test = correlated
    truth = model.truth()
    covered = {name: 0 for name in truth}
    for number in range(model.num_repeats):
        part = slice(number * model.num_images, (number + 1) * model.num_images)
        cut = lambda leaf: leaf[part]  # noqa: B023 (used at once)
        book = balance(jax.tree.map(cut, train), jax.tree.map(cut, test), refit="refit")
        for name, entry in _entries(book).items():
            covered[name] += abs(entry.nats - truth[name]) < 1.96 * entry.stderr
    for name, count in covered.items():
        assert 0.90 <= count / model.num_repeats <= 0.99, (name, count)


def test_a_ledger_of_a_random_subset_without_posteriors(linear, monkeypatch):
    num_devices = set()

    def compiled(program, devices, static, _compiled=parallel._compiled):
        num_devices.add(len(devices))
        return _compiled(program, devices, static)

    monkeypatch.setattr(parallel, "_compiled", compiled)
    with parallel.use_devices(jax.devices()[:2]):
        book = gapjax.ledger(
            linear.vae, linear.wrong, jax.random.key(0), linear.images, linear.images[:7],
            encoders={"exact": linear.exact.encoder}, refit="exact", num_images=9, num_samples=30,
            search=None, method="importance", num_importance_samples=300,
        )  # fmt: skip
        _, test_key = jax.random.split(jax.random.key(0))
        bounds = per_image_bounds(
            linear.vae, linear.wrong, jax.random.split(test_key, 3)[0], linear.images[:7],
            num_samples=30, batch_size=50,
        )  # fmt: skip
    assert num_devices == {len(jax.devices()[:2])}  # all devices, and no others
    assert (book.train.num_images, book.train.num_available) == (9, 20)
    assert (book.test.num_images, book.test.num_available) == (7, 7)
    assert book.test.optimal is None and book.test.approximation_gap is None
    trained, exact = (book.test.encoders[name] for name in ("as_trained", "exact"))
    # Nats as they were measured, which no conversion to BPD and back has rounded.
    assert trained.elbo.nats == np.asarray(bounds, np.float64).mean()
    assert trained.amortization_gap is None and trained.capacity_gap is None
    log_prob = linear.log_prob(linear.images[:7]).mean()
    assert book.test.log_prob.nats == pytest.approx(log_prob, abs=0.1)
    assert exact.elbo.nats == pytest.approx(log_prob, abs=0.3)
    assert trained.inference_gap_by_refit.nats > 0.5
    chosen = subset(linear.images, 9, 0)
    assert len(np.unique(chosen, axis=0)) == 9
    np.testing.assert_array_equal(chosen, subset(linear.images, 9, 0))
    assert not np.array_equal(chosen, subset(linear.images, 9, 1))


def test_a_ledger_takes_another_bound(linear):
    """With the exact q* the bound of several samples is log p(x), whatever their number."""
    search = PosteriorSearch(steps_per_round=1, max_rounds=1, num_heldout=2)
    options = {"num_samples": 40, "search": search, "method": "importance", "num_images": 3}
    book = gapjax.ledger(
        linear.vae, linear.exact, jax.random.key(0), linear.images[:3], linear.images[:3],
        encoders={"wrong": linear.wrong.encoder}, num_importance_samples=250,
        bound=gapjax.importance_weighted_bound, **options,
    )  # fmt: skip
    elbo = gapjax.evaluate(
        linear.vae, linear.wrong, jax.random.key(1), linear.images[:3], num_samples=200
    )
    log_prob, wrong = linear.log_prob(linear.images[:3]).mean(), book.test.encoders["wrong"].elbo
    assert book.test.encoders["as_trained"].elbo.nats == pytest.approx(log_prob, abs=1e-3)
    assert book.test.optimal.nats == pytest.approx(log_prob, abs=0.05)
    assert -elbo.bpd * 6 * math.log(2) + 0.3 < wrong.nats < log_prob + 0.3


def test_bad_arguments_of_a_ledger_are_named(linear):
    arguments = linear.vae, linear.wrong, jax.random.key(0), linear.images, linear.images
    with pytest.raises(ValueError, match="'optimal'"):
        gapjax.ledger(*arguments, refit="optimal")
    with pytest.raises(ValueError, match="num_images is 1"):
        gapjax.ledger(*arguments, num_images=1)


def test_gaps_are_those_of_the_exact_posterior(linear):
    """The best q is the exact posterior, so its ELBO is log p(x)."""
    search = PosteriorSearch(steps_per_round=10, max_rounds=12, num_heldout=50)
    gaps = amortization_gaps(
        linear.vae, linear.wrong, jax.random.key(0), linear.images,
        {"exact": linear.exact.encoder}, num_samples=100, search=search,
    )  # fmt: skip
    assert abs(gaps.per_image["exact"].mean()) < 0.02  # the noise of the judgement
    bound = gapjax.evaluate(
        linear.vae, linear.wrong, jax.random.key(1), linear.images, num_samples=2000
    )
    lost = linear.log_prob(linear.images) + bound.per_image * np.log(2) * 6
    assert abs(gaps.per_image["as_trained"].mean() - lost.mean()) < 0.1 * lost.mean()
    assert gaps.converged.shape == (len(linear.images),)
