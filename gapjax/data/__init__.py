"""Data sets: names and paths to arrays, with a record of where they come from."""

from gapjax.data.dataset import BINARIZATIONS as BINARIZATIONS
from gapjax.data.dataset import Dataset as Dataset
from gapjax.data.dataset import DatasetError as DatasetError
from gapjax.data.readers import DATASETS as DATASETS
from gapjax.data.readers import FILES as FILES
from gapjax.data.readers import closest_name as closest_name
from gapjax.data.readers import load_dataset as load_dataset
from gapjax.data.readers import names_data as names_data
