"""What alpha does: every alpha is the library's refit, and the errors are those of the images."""

import json

import numpy as np
import pytest
from small_runs import TINY, on_accelerator, untrained_runs

import gapjax
from experiments import alpha, stores, studies
from experiments.config import UsageError
from experiments.show import figures

ALPHAS = [0.0, 0.7]
EPOCH = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    config = TINY._replace(validation=0, num_epochs=EPOCH)
    folders = untrained_runs(tmp_path_factory.mktemp("runs"), EPOCH, config)
    return studies.open_runs(folders, None, validation=False)


def test_the_figure_of_alpha(runs, tmp_path, monkeypatch):
    alpha.refit(runs, EPOCH, ALPHAS, tmp_path)
    monkeypatch.setattr(gapjax, "self_consistent", None)  # nothing is done again
    alpha.refit(runs, EPOCH, ALPHAS, tmp_path)
    results = alpha.summary(runs, [EPOCH], ALPHAS, tmp_path)
    (checkpoint,) = results["checkpoints"]
    row = checkpoint["alphas"][1]
    monkeypatch.undo()
    trained, after = [], []
    for run in runs:
        params = stores.trained_params(run, EPOCH)
        refit = gapjax.self_consistent(
            run.vae, params, run.dataset.train, run.key("refit", EPOCH),
            alpha=np.float32(0.7), num_epochs=1, batch_size=200,
        )  # fmt: skip
        for bpds, each in ((trained, params), (after, refit.params)):
            bpds.append(
                gapjax.evaluate(
                    run.vae, each, run.key("evaluate"), run.dataset.test, num_samples=2
                ).per_image
            )
    gain = np.subtract(trained, after)
    np.testing.assert_allclose(row["gain"]["values"], gain.mean(1), atol=1e-6)
    assert row["gain"]["stderr"] == pytest.approx(gain.mean(1).std(ddof=1) / 2**0.5, rel=1e-3)
    paired = gain.mean(0).std(ddof=1) / len(gain[0]) ** 0.5
    assert row["gain"]["stderr_over_images"] == pytest.approx(paired, rel=1e-3)
    assert row["test_bpd"]["mean"] == pytest.approx(np.mean(after), rel=1e-5)
    assert checkpoint["as_trained"]["mean"] == pytest.approx(np.mean(trained), rel=1e-5)
    assert [each["alpha"] for each in checkpoint["alphas"]] == ALPHAS
    assert len(alpha.table(results).splitlines()) == 3
    json.loads(json.dumps(results, allow_nan=False))
    assert figures.save(figures.alpha(results), tmp_path / "alpha")[0].stat().st_size > 1000


def test_on_an_accelerator_all_are_one_program(runs, tmp_path, monkeypatch):
    alpha.refit(runs, EPOCH, ALPHAS, tmp_path / "each")
    programs = on_accelerator(monkeypatch)
    alpha.refit(runs, EPOCH, ALPHAS, tmp_path / "together")
    assert programs == [len(runs) * len(ALPHAS)]
    each, together = (
        alpha.summary(runs, [EPOCH], ALPHAS, tmp_path / out)["checkpoints"][0]["alphas"]
        for out in ("each", "together")
    )
    for one, other in zip(each, together, strict=True):
        np.testing.assert_allclose(
            one["test_bpd"]["values"], other["test_bpd"]["values"], rtol=1e-4
        )


def test_an_alpha_is_a_share():
    assert alpha.numbers(["1", "0", "0.5", "1"]) == [0, 0.5, 1]
    for given in (["2"], ["half"], []):
        with pytest.raises(UsageError, match="--alphas"):
            alpha.numbers(given)
