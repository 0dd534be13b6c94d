"""CIFAR-10 and CIFAR-100 as their authors distribute them: python batches or binary files.

Python batches are pickles, and a pickle can run any program when it is loaded. They are read by an
unpickler that can build numpy arrays, bytes, text, numbers and containers, and nothing else.
Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. Pixels are stored as 1,024 red, 1,024 green,
1,024 blue bytes per image, row by row.
"""

import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.sources.image_set import ImageSet
from fastkd.data.sources.lock import locked
from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["LAYOUTS", "CifarLayout", "download_cifar", "find_archive", "load_cifar"]

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarLayout:
    """File names of one of the two data sets, in the python and the binary distribution."""

    classes: int
    python_dir: str
    binary_dir: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    binary_train: tuple[str, ...]
    binary_val: tuple[str, ...]
    meta: str
    binary_meta: str
    label_key: str
    names_key: str
    label_bytes: int  # the fine label is the last of them

    def files(self, split: str, binary: bool) -> tuple[str, ...]:
        """The files of a split."""
        if binary:
            return self.binary_train if split == "train" else self.binary_val
        return self.train if split == "train" else self.val


_TEN = tuple(f"data_batch_{part}" for part in range(1, 6))
LAYOUTS = {
    "cifar10": CifarLayout(
        classes=10,
        python_dir="cifar-10-batches-py",
        binary_dir="cifar-10-batches-bin",
        train=_TEN,
        val=("test_batch",),
        binary_train=tuple(f"{part}.bin" for part in _TEN),
        binary_val=("test_batch.bin",),
        meta="batches.meta",
        binary_meta="batches.meta.txt",
        label_key="labels",
        names_key="label_names",
        label_bytes=1,
    ),
    "cifar100": CifarLayout(
        classes=100,
        python_dir="cifar-100-python",
        binary_dir="cifar-100-binary",
        train=("train",),
        val=("test",),
        binary_train=("train.bin",),
        binary_val=("test.bin",),
        meta="meta",
        binary_meta="fine_label_names.txt",
        label_key="fine_labels",
        names_key="fine_label_names",
        label_bytes=2,
    ),
}


def find_archive(name: str, folders: list[Path]) -> tuple[Path, bool] | None:
    """(folder, is it the binary distribution) of the first one found, or None.

    Each folder may be the archive's own folder or the one that holds it.
    """
    layout = LAYOUTS[name]
    for folder in folders:
        for binary, subfolder in ((False, layout.python_dir), (True, layout.binary_dir)):
            for place in (folder / subfolder, folder):
                present = layout.files("train", binary) + layout.files("val", binary)
                if any((place / file).is_file() for file in present):
                    return place, binary
    return None


def load_cifar(name: str, folder: Path, binary: bool, split: str) -> ImageSet:
    """Read one split of an unpacked archive: uint8 [N, 32, 32, 3] and int64 fine labels.

    Raises:
        UserError: a file is missing, damaged, or a pickle that asks for more than arrays.
    """
    layout = LAYOUTS[name]
    files = [folder / file for file in layout.files(split, binary)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{name}: {', '.join(missing)} missing in {shown(folder)}; unpack it again")
    read = _read_binary if binary else _read_python
    parts = [read(file, layout) for file in files]
    planes_N3HW = np.concatenate([planes for planes, _ in parts]).reshape(-1, 3, 32, 32)
    return ImageSet(
        f"{name}/{split}",
        np.ascontiguousarray(planes_N3HW.transpose(0, 2, 3, 1)),
        np.concatenate([labels for _, labels in parts]),
        _class_names(folder, layout, binary),
    )


def download_cifar(name: str, root: Path) -> None:
    """Fetch and unpack the python distribution below `root` with torchvision's own downloader.

    One process does it while the others wait; the folder appears when it is complete.

    Raises:
        UserError: no network, a wrong checksum, or a folder that cannot be written.
    """
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    source, folder = (CIFAR10 if name == "cifar10" else CIFAR100), LAYOUTS[name].python_dir
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{name}.lock"):
            if find_archive(name, [root]):
                return
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as unpacked:
                # Not CIFAR10(download=True), which also unpickles without restrictions.
                download_and_extract_archive(
                    source.url, str(root), unpacked, filename=source.filename, md5=source.tgz_md5
                )
                (Path(unpacked) / folder).rename(root / folder)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} could not be downloaded from {source.url} to {shown(root)}: {error}; "
            "fetch it by hand, unpack it there and leave data.download out"
        ) from error


def _read_binary(file: Path, layout: CifarLayout) -> tuple[np.ndarray, np.ndarray]:
    row = layout.label_bytes + _PIXELS
    content = np.fromfile(file, dtype=np.uint8)
    if len(content) == 0 or len(content) % row:
        raise UserError(
            f"{shown(file)} is damaged: {len(content)} bytes are not a multiple of {row}; "
            "unpack it again"
        )
    rows = content.reshape(-1, row)
    return rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(file: Path, layout: CifarLayout) -> tuple[np.ndarray, np.ndarray]:
    content = _load_arrays(file)
    pixels, labels = content.get("data"), content.get(layout.label_key)
    if not (isinstance(pixels, np.ndarray) and isinstance(labels, list)):
        raise UserError(
            f"{shown(file)} holds no 'data' array with '{layout.label_key}'; unpack it again"
        )
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise UserError(
            f"{shown(file)} is damaged: data is {pixels.dtype} {pixels.shape}, "
            f"expected uint8 ({len(labels)}, {_PIXELS}); unpack it again"
        )
    return pixels, np.array([int(label) for label in labels], dtype=np.int64)


def _class_names(folder: Path, layout: CifarLayout, binary: bool) -> tuple[str, ...]:
    """Names from the meta file; the numbers as text if that file is missing."""
    file = folder / (layout.binary_meta if binary else layout.meta)
    if not file.is_file():
        return tuple(str(label) for label in range(layout.classes))
    if binary:
        names: Any = file.read_text(encoding="utf-8", errors="replace").split()
    else:
        names = _load_arrays(file).get(layout.names_key)
    if not isinstance(names, list) or len(names) != layout.classes:
        raise UserError(
            f"{shown(file)} does not list {layout.classes} class names; unpack it again"
        )
    return tuple(_text(name) for name in names)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _load_arrays(file: Path) -> dict[str, Any]:
    """The dictionary pickled in `file`, with text keys, under the restrictions described above."""
    try:
        with open(file, "rb") as stream:
            content = _ArrayUnpickler(stream, encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{shown(file)}: {error}") from error
    except Exception as error:
        # A damaged pickle can raise nearly anything (EOFError, KeyError, ValueError, MemoryError).
        raise UserError(f"{shown(file)} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise UserError(f"{shown(file)} holds a {type(content).__name__}, expected a dictionary")
    return {_text(key): value for key, value in content.items()}


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Python 3 writes bytes in old pickle protocols as a call of _codecs.encode(text, "latin1").
    if encoding not in ("latin1", b"latin1"):
        raise UserError(f"refused: text in the encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays, bytes and plain containers; every other name is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name == "_reconstruct" and module_name in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return np.ndarray.__reduce__(np.empty(0))[0]
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode_latin1,
        }
        if (module_name, global_name) in allowed:
            return allowed[module_name, global_name]
        raise UserError(
            f"refused: it asks for {module_name}.{global_name}, a data file needs numpy arrays only"
        )
