"""Data sets by name, the digits and .npz files."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import load_error, random_images

from gapjax.data import DATASETS, Dataset, closest_name, load_dataset

_ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("no_default_directory")


def test_digits_are_scikit_learns_rounded_and_split_once_and_for_all():
    dataset = load_dataset("digits")
    assert isinstance(dataset, Dataset)
    assert dataset.train.shape == (1437, 8, 8)
    assert dataset.test.shape == (360, 8, 8)
    assert dataset.event_shape == (8, 8)
    assert dataset.train.dtype == dataset.test.dtype == np.uint8
    assert dataset.levels == 2
    assert set(np.unique(dataset.train)) == {0, 1}
    assert dataset.provenance["binarization"] == "threshold 0.5"
    # The split is part of what "digits" means: no release of scikit-learn may change it unseen.
    expected = "01784d7e3e20808922ea7ded40efca639a70a0a7ace73a7289c06f8717103623"
    assert dataset.provenance["sha256"] == expected


def test_grey_digits_hold_every_digit_once_with_stratified_labels():
    from sklearn.datasets import load_digits

    grey = load_dataset("grey_digits")
    assert grey.levels == 17
    assert grey.provenance["binarization"] == "none"
    images, labels = load_digits(return_X_y=True)
    both = np.concatenate([grey.train, grey.test]).reshape(-1, 64)
    assert sorted(map(bytes, both)) == sorted(map(bytes, images.astype(np.uint8)))
    label_of = {bytes(x): y for x, y in zip(images.astype(np.uint8), labels, strict=True)}
    counts = np.bincount([label_of[bytes(x)] for x in grey.test.reshape(-1, 64)], minlength=10)
    assert np.all(np.abs(counts - 0.2 * np.bincount(labels)) < 1)

    rounded = load_dataset("digits")
    np.testing.assert_array_equal(rounded.train, grey.train >= 8)
    assert load_dataset("digits", binarization="none").levels == 17


def test_split_and_rounding_depend_on_no_seed():
    np.random.seed(1)  # noqa: NPY002
    first = load_dataset("digits", binarization_seed=1)
    np.random.seed(2)  # noqa: NPY002
    second = load_dataset("digits", binarization_seed=2)
    assert first.provenance == second.provenance


def test_unknown_names_are_answered_by_the_known_ones(tmp_path):
    message = load_error("binary-mnst")
    assert "did you mean 'binary_mnist'" in message
    assert all(name in message for name in DATASETS)
    assert "has no train/ and test/" in load_error(tmp_path)
    text = tmp_path / "data.csv"
    text.write_text("1,2")
    assert "none of these files" in load_error(text)
    for nothing in ("", None, 3, "a\0b"):
        assert "name_or_path=" in load_error(nothing)


def test_a_folder_of_the_same_name_does_not_hide_a_name(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits").test) == 360


def test_the_closest_name_is_one_of_the_known():
    assert closest_name("Binary-MNST", DATASETS) == "binary_mnist"
    assert closest_name("grey_digit", {"digits": 1, "grey_digits": 2}) == "grey_digits"
    assert closest_name("xyz", DATASETS) is None
    assert closest_name("anything", []) is None


def test_importing_is_quick():
    program = (
        "import sys, gapjax.data\n"
        "print([x for x in ('sklearn', 'tensorflow_datasets', 'PIL', 'jax') if x in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    assert done.stdout.strip() == "[]"


def test_npz_file(tmp_path):
    train, test = random_images(12, shape=(3, 5)), random_images(7, 1, shape=(3, 5))
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, train=train, test=test)
    dataset = load_dataset(str(path))
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)
    assert dataset.name == "mine.npz"
    assert dataset.levels == 256
    assert dataset.event_shape == (3, 5)
    provenance = dataset.provenance
    assert provenance["files"] == {"mine.npz": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (provenance["num_train"], provenance["num_test"]) == (12, 7)
    assert str(tmp_path) not in json.dumps(provenance)


def test_levels_of_an_npz_file(tmp_path):
    path = tmp_path / "x.npz"
    x = random_images(200, shape=(4,), levels=5)
    np.savez(path, train=x, test=x)
    with pytest.warns(UserWarning, match="taken to have 256 levels"):
        assert load_dataset(path).levels == 256
    assert load_dataset(path, levels=5).levels == 5
    message = load_error(path, levels=4)
    assert "levels=4" in message
    assert "values from 0 to 4" in message
    np.savez(path, train=x, test=x, levels=5)
    assert load_dataset(path).levels == 5
    assert load_dataset(path, levels=5).levels == 5
    assert "levels=5" in load_error(path, levels=6)
    np.savez(path, train=x > 2, test=x > 2)
    assert load_dataset(path).levels == 2
    for levels in (1, 70_000, 2.5, [2, 3], True):
        np.savez(path, train=x, test=x, levels=levels)
        assert "2 to 65536" in load_error(path)
