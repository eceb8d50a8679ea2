"""Data sets: names and paths to arrays, with a record of where they come from."""

from gapjax.data.dataset import BINARIZATIONS, Dataset, DatasetError
from gapjax.data.readers import (
    DATASETS,
    FILES,
    closest_name,
    load_dataset,
    named_levels,
    names_data,
)

__all__ = [
    "BINARIZATIONS",
    "DATASETS",
    "FILES",
    "Dataset",
    "DatasetError",
    "closest_name",
    "load_dataset",
    "named_levels",
    "names_data",
]
