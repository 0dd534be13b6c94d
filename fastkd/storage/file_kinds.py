"""What a file is that somebody takes for weights: recognised by its first bytes and its entries."""

import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fastkd.errors import UserError
from fastkd.printable import few

__all__ = ["refuse_other_kinds", "weights_in"]

OF_FOLDERS = (
    "best.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of a folder's weights in fastkd, transformers and accelerate, in the order of choice."""

SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".t7", ".tar"})

SAVE = "where it was made, save the weights: torch.save(model.state_dict(), FILE)"

STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: git lfs pull"),
    (b"\x89HDF", f"an HDF5 file, such as Keras writes, not a PyTorch checkpoint; {SAVE}"),
    (b"\x93NUMPY", f"a numpy array, not a PyTorch checkpoint; {SAVE}"),
    (b"\x1f\x8b", "a gzip archive: unpack it and give the weight file in it"),
    (b"BZh", "a bzip2 archive: unpack it and give the weight file in it"),
    (b"\xfd7zXZ", "an xz archive: unpack it and give the weight file in it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it and give the weight file in it"),
    (b"GGUF", f"a GGUF file, not a PyTorch checkpoint; {SAVE}"),
)


def weights_in(folder: Path) -> Path:
    """The weight file of a folder: of a run, of transformers and accelerate, or the only one."""
    for name in OF_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no best.safetensors yet, this run has not been evaluated")
    if (folder / ".metadata").is_file():
        raise UserError(
            f"{folder}: a checkpoint of torch.distributed in many parts; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE"
        )
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) == 1:
        return found[0]
    names = few(path.name for path in found)
    holds = f"several: {names}; name one of them" if found else "none of the usual names"
    raise UserError(f"{folder}: expected a folder with one weight file, it has {holds}")


def refuse_other_kinds(path: Path) -> None:
    """UserError for a file that is not a `torch.save` file, saying what it is."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path}: the file is empty; copy or download it again")
    for beginning, what in STARTS:
        if start.startswith(beginning):
            raise UserError(f"{path}: {what}")
    if start.lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: a web page, not weights: the download gave a page instead of the file; "
            f"use the address of the file itself"
        )
    if start.startswith(b"PK"):
        _refuse_other_zips(path)
    # Names such as model.pth.tar are usual for files of torch.save, and torch reads old ones.
    elif tarfile.is_tarfile(path) and not _has_entries(path, "storages", "tensors", "pickle"):
        raise UserError(f"{path}: a tar archive: unpack it and give the weight file in it")


def _has_entries(path: Path, *names: str) -> bool:
    with tarfile.open(path) as archive:
        return {member.name for member in archive} >= {*names}


def _refuse_other_zips(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: damaged, or not a PyTorch checkpoint: its end is missing, as after an "
            f"interrupted copy or download"
        ) from error
    for applies, what in ZIPS:
        if applies(entries):
            raise UserError(f"{path}: {what}")


def _ends(*endings: str) -> Callable[[Sequence[str]], bool]:
    return lambda entries: any(entry.endswith(endings) for entry in entries)


ZIPS: tuple[tuple[Callable[[Sequence[str]], bool], str], ...] = (
    (
        _ends("/archive_format", "serialized_exported_program.json"),
        f"an exported program (torch.export), not weights; {SAVE}",
    ),
    (
        lambda entries: any("/code/" in entry for entry in entries),
        f"an exported program (TorchScript), not weights; {SAVE}",
    ),
    (
        lambda entries: bool(entries) and all(entry.endswith(".npy") for entry in entries),
        f"an archive of numpy arrays (.npz), not a PyTorch checkpoint; {SAVE}",
    ),
    (_ends("model.weights.h5"), f"a file of Keras, not a PyTorch checkpoint; {SAVE}"),
    (
        lambda entries: not any(entry.endswith("data.pkl") for entry in entries),
        "a zip archive: unpack it and give the weight file in it",
    ),
)
"""Files that are zip archives, as those of torch.save are; the first that applies."""
