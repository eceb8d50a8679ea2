"""Data sets: names and paths to uint8 arrays, with a record of where they come from."""

from gapjax.data.dataset import BINARIZATIONS, Dataset, DatasetError
from gapjax.data.readers import DATASETS, closest_name, load_dataset, named_levels

__all__ = [
    "BINARIZATIONS",
    "DATASETS",
    "Dataset",
    "DatasetError",
    "closest_name",
    "load_dataset",
    "named_levels",
]
