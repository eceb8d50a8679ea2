"""The benchmark: its floor is the products of the step, and its table comes out."""

import importlib.util
import json

import pytest
from forked import Forked

from experiments import benchmark_references as references


def _multiplications(products):
    return sum(rows * inner * columns for _, rows, inner, columns in products)


def test_the_floor_counts_every_product_once():
    """Joint training: three products a layer, without the gradient of the images."""
    encoder = 784 * 500 + 500 * 500 + 500 * 20
    decoder = 10 * 500 + 500 * 500 + 500 * 784
    joint = 3 * encoder + 3 * decoder - 784 * 500
    assert _multiplications(references.products("train", 1, 100, 10)) == 100 * joint
    # a refit has no gradient of the decoder's weights, and half a batch of the model's samples
    refit = 100 * (joint - decoder) + 50 * decoder
    assert _multiplications(references.products("refit", 1, 100, 10)) == refit
    evaluation = _multiplications(references.products("evaluate", 1, 100, 10))
    assert evaluation == 100 * (encoder + 10 * decoder)
    grey = _multiplications(references.products("train", 2, 100, 10))
    assert grey == 100 * (joint + 3 * 500 * 784)


@pytest.mark.slow
def test_the_table_comes_out(tmp_path):
    table = tmp_path / "table.json"
    small = ["--steps=2", "--batch_size=4", "--repeats=1", "--num_eval_samples=2"]
    small += ["--likelihood=binary", "--phase=train", "--phase=evaluate", "--phase=codec"]
    code, _, err = Forked("experiments.benchmark", f"--json={table}", *small).end()
    assert code == 0, err
    written = json.loads(table.read_text())
    assert [(row["likelihood"], row["phase"]) for row in written["programs"]] == [
        ("binary", "train"), ("binary", "evaluate"),
    ]  # fmt: skip
    for row in written["programs"]:
        assert row["times_floor"] > 0 and row["images_per_second"] > 0
        assert row["compile_seconds_cold"] > 0 and row["compile_seconds_cached"] > 0
    installed = importlib.util.find_spec("constriction") is not None
    assert [row["likelihood"] for row in written["codec"]] == ["binary"] * installed
    assert all(row["compress_ms"] > 0 and row["decompress_ms"] > 0 for row in written["codec"])
    assert [row["times_data"] for row in written["scaling"]] == [1, 2, 4, 4]
