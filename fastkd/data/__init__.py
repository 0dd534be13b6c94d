"""Data: sources by name, decoded once, served in batches whose randomness can be replayed.

sources -> ImageSet (digits, CIFAR, synthetic) or FolderIndex -> cache
        -> ResidentLoader (small sets, on the device) or TorchLoader (large folders),
           which crop, flip and normalise (`geometry`) -> Batch
"""

from fastkd.data.batch import Batch, Loader
from fastkd.data.facts import Facts
from fastkd.data.loaders.open import DataPair, open_data
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.loaders.torch_loader import TorchLoader
from fastkd.data.normalization import DATASETS, normalization
from fastkd.data.sources.by_name import open_source, open_split
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import ImageSet

__all__ = [
    "DATASETS",
    "Batch",
    "DataPair",
    "Facts",
    "FolderIndex",
    "ImageSet",
    "Loader",
    "Loading",
    "ResidentLoader",
    "TorchLoader",
    "normalization",
    "open_data",
    "open_source",
    "open_split",
]
