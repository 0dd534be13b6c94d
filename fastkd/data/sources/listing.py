"""What a split holds, as digests: a run remembers them and notices images that have changed.

Names and sizes of all files, and the contents of some hundreds, spread evenly: for small sets of
all. Modification times alone would call every copy of a data set another one.
"""

import hashlib
import zlib
from itertools import product

import numpy as np

from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import ImageSet, images_per_class
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.errors import UserError
from fastkd.storage.facts import Listing

__all__ = ["READ_FILES", "listing_of"]

READ_FILES = 512
"""The most files of a split that are read, however large it is."""


def listing_of(source: ImageSet | FolderIndex | LabelMaps, *, skips: bool = False) -> Listing:
    """The listing of a split. UserError for a file that cannot be opened, unless it is skipped."""
    labels_N, counts = source.labels_N, ()
    if not isinstance(source, LabelMaps):
        counts = tuple(images_per_class(labels_N, len(source.classes)))
    num = len(source) if labels_N.ndim == 2 or isinstance(source, LabelMaps) else None
    if isinstance(source, ImageSet):
        pixels = zlib.crc32(np.ascontiguousarray(source.images_NHWC).data)
        return Listing(
            counts=counts,
            num=num,
            files=hashlib.sha256(labels_N.tobytes()).hexdigest(),
            contents=f"{pixels:08x}",
            read=len(source),
        )
    chosen = np.unique(np.linspace(0, len(source) - 1, READ_FILES).round().astype(int))
    return Listing(
        counts=counts,
        num=num,
        files=source.sizes,
        contents=_contents(source, chosen, skips=skips),
        read=len(chosen),
        times=source.listing,
    )


def _contents(source: FolderIndex | LabelMaps, samples: np.ndarray, *, skips: bool) -> str:
    digest = hashlib.sha256()
    openers = [source.open, source.open_map] if isinstance(source, LabelMaps) else [source.open]
    for sample, opener in product(samples, openers):
        try:
            with opener(sample) as stream:
                digest.update(hashlib.sha256(stream.read()).digest())
        except UserError as error:
            if not skips:
                raise UserError(f"{source.name}: {error}") from None
            digest.update(b"unread")
    return digest.hexdigest()
