"""Names and arguments; `data/registry`, `data/dataset`, `data/digits`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import load_error

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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"binarization": "round"}, ["binarization='round'", "threshold, stochastic, none"]),
        ({"threshold": 0.0}, ["threshold=0.0", "above 0"]),
        ({"threshold": 1.5}, ["threshold=1.5"]),
        ({"threshold": float("nan")}, ["threshold=nan"]),
        ({"threshold": "half"}, ["threshold='half'"]),
        ({"binarization_seed": -1}, ["binarization_seed=-1", "non-negative"]),
        ({"binarization_seed": 1.5}, ["binarization_seed=1.5"]),
        ({"binarization_seed": True}, ["binarization_seed=True"]),
        ({"levels": 1}, ["levels=1", "2 to 256"]),
        ({"levels": 257}, ["levels=257"]),
        ({"levels": 16.0}, ["levels=16.0"]),
        ({"levels": 16}, ["levels=16", "'digits'", "17"]),
    ],
)
def test_unusable_arguments(arguments, words):
    message = load_error("digits", **arguments)
    assert all(word in message for word in words), message


def test_unknown_names_are_answered_by_the_known_ones(tmp_path):
    message = load_error("binary-mnst")
    assert "did you mean 'binary_mnist'" in message
    assert all(name in message for name in DATASETS)
    assert "is a directory" in load_error(tmp_path)
    text = tmp_path / "data.csv"
    text.write_text("1,2")
    assert "not an .npz" in load_error(text)
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
