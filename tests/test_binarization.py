"""Grey levels to binary pixels."""

import numpy as np
import pytest
from small_data import load_error, random_images

from gapjax.data import binarization, load_dataset

pytestmark = pytest.mark.usefixtures("no_default_directory")


def test_stochastic_binarization_is_drawn_once_from_the_grey_levels():
    grey = load_dataset("grey_digits")
    dataset = load_dataset("digits", binarization="stochastic", binarization_seed=3)
    again = load_dataset("digits", binarization="stochastic", binarization_seed=3)
    other = load_dataset("digits", binarization="stochastic", binarization_seed=4)
    assert dataset.levels == 2
    assert dataset.provenance["binarization"] == "stochastic, seed 3"
    np.testing.assert_array_equal(dataset.train, again.train)
    np.testing.assert_array_equal(dataset.test, again.test)
    assert dataset.provenance["sha256"] != other.provenance["sha256"]
    for level in range(17):
        drawn = dataset.train[grey.train == level]
        if level in (0, 16):
            assert np.all(drawn == level // 16)
        else:
            error = np.sqrt(level / 16 * (1 - level / 16) / drawn.size)
            assert abs(drawn.mean() - level / 16) < 5 * error


def test_stochastic_binarization_draws_either_part_on_its_own(tmp_path):
    same = np.full((50, 16), 100, np.uint8)
    np.savez(tmp_path / "same.npz", train=same, test=same)
    dataset = load_dataset(tmp_path / "same.npz", binarization="stochastic")
    assert not np.array_equal(dataset.train, dataset.test)


def test_chunks_do_not_change_the_draws(monkeypatch):
    whole = load_dataset("digits", binarization="stochastic")
    monkeypatch.setattr(binarization, "_CHUNK", 100)
    assert load_dataset("digits", binarization="stochastic").provenance == whole.provenance


@pytest.mark.parametrize(
    ("threshold", "lowest"), [(0.5, 128), (1.0, 255), (100 / 255, 100), (1e-9, 1)]
)
def test_threshold_is_met_from_its_level_up(tmp_path, threshold, lowest):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.savez(tmp_path / "all.npz", train=levels, test=levels)
    dataset = load_dataset(tmp_path / "all.npz", binarization="threshold", threshold=threshold)
    np.testing.assert_array_equal(dataset.train, levels >= lowest)
    assert dataset.provenance["binarization"] == f"threshold {threshold:g}"


def test_what_is_binary_is_not_binarized_again(tmp_path):
    bits = random_images(10, shape=(4,), levels=2)
    np.savez(tmp_path / "bits.npz", train=bits, test=bits)
    for method in ("threshold", "stochastic"):
        assert "binary already" in load_error(tmp_path / "bits.npz", binarization=method)
        # Known without the data, so said without them.
        assert "binary already" in load_error("binarized_mnist", binarization=method)
    assert "'mnist'" in load_error("binary_mnist", binarization="none")
