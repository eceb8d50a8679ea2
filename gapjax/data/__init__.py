"""Data sets: names and paths to uint8 arrays, with a record of where they come from.

    dataset = load_dataset("digits")
    dataset.train      # uint8 [1437, 8, 8]
    dataset.levels     # 2: pixels are 0 or 1

Every named data set has one fixed training part and one fixed test part. They depend on no seed
but `binarization_seed`.

TensorFlow Datasets and scikit-learn are imported when a data set needs them.
"""

from gapjax.data.binarization import BINARIZATIONS
from gapjax.data.dataset import Dataset, DatasetError
from gapjax.data.registry import DATASETS, closest_name, load_dataset, named_levels

__all__ = [
    "BINARIZATIONS",
    "DATASETS",
    "Dataset",
    "DatasetError",
    "closest_name",
    "load_dataset",
    "named_levels",
]
