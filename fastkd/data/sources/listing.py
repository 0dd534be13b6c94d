"""What a split holds, as digests: a run remembers them and notices images that have changed.

Names and sizes of all files, and the contents of some hundreds, spread evenly: for small sets of
all. Modification times alone would call every copy of a data set another one.
"""

import hashlib
import zlib
from pathlib import Path

import numpy as np

from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import ImageSet
from fastkd.errors import UserError
from fastkd.storage.facts import Listing

__all__ = ["READ_FILES", "listing_of"]

READ_FILES = 512
"""The most files of a split that are read, however large it is."""


def listing_of(source: ImageSet | FolderIndex) -> Listing:
    """The listing of a split. UserError for a file that cannot be read."""
    labels_N = source.labels_N
    counts = tuple(np.bincount(labels_N, minlength=len(source.classes)).tolist())
    if isinstance(source, ImageSet):
        pixels = zlib.crc32(np.ascontiguousarray(source.images_NHWC).data)
        return Listing(
            counts=counts,
            files=hashlib.sha256(labels_N.tobytes()).hexdigest(),
            contents=f"{pixels:08x}",
            read=len(source),
        )
    chosen = np.unique(np.linspace(0, len(source) - 1, READ_FILES).round().astype(int))
    return Listing(
        counts=counts,
        files=source.sizes,
        contents=_contents(source, chosen),
        read=len(chosen),
        times=source.listing,
    )


def _contents(source: FolderIndex, samples: np.ndarray) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        path = Path(source.path(sample))
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"{source.name}: {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
