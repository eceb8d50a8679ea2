"""The handwritten digits of scikit-learn, with a fixed split."""

import pathlib

import numpy as np

from gapjax.data.dataset import DatasetError, Stored, reason

DIGITS_LEVELS = 17

_TEST_FRACTION = 0.2
_SPLIT_SEED = 0  # the split is part of the data set and depends on no seed of the user's


def read_digits(name: str, folder: pathlib.Path | None) -> Stored:
    """Reads the digits, split 1,437 to 360 and stratified by label.

    Args:
      name: What to call the data set.
      folder: Not used; the digits come with scikit-learn.

    Returns:
      The digits with all their levels.

    Raises:
      DatasetError: if scikit-learn is not installed.
    """
    del folder
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DatasetError(
            f"data set {name!r} needs scikit-learn ({reason(error)}); pip install scikit-learn, "
            "or install gapjax with its extra 'experiments'"
        ) from error

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    parts = train_test_split(
        images, test_size=_TEST_FRACTION, random_state=_SPLIT_SEED, stratify=labels
    )
    train, test = map(np.asarray, parts)
    return Stored(
        name=name,
        train=train,
        test=test,
        levels=DIGITS_LEVELS,
        source="scikit-learn load_digits, fixed stratified split with 20 % for the test",
    )
