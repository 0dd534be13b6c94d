"""Image sets in tar files ("shards", the layout of WebDataset), read in any order by position.

    ROOT/train-000000.tar, ..  and val-000000.tar: a word of the name (train; val, validation or
                               test) says the split
    KEY.jpg                    a picture, of any format that is opened
    KEY.cls                    its class id in digits; or KEY.json with {"label": id}, or with
                               {"present": [ids], "unknown": [ids]} for several labels
    ROOT/classes.txt           names of the classes, a line each; without it they are called by id
    ROOT/train.index           where everything is; `fastkd data pack` writes it

Without an index the headers of the shards are read once and the outcome is kept in the cache
folder. Pictures are read where they lie: nothing is unpacked, and an archive that holds links or
paths that lead out of it is refused. Canonical order: by KEY.

An index of `fastkd data pack` also keeps the names that the files had. So a split that was packed
as it is has the same listing as the folder: whoever compares the data of two runs finds them equal.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fastkd.data.batch import IGNORED
from fastkd.data.sources.class_names import name_problem
from fastkd.data.sources.folder import (
    FolderIndex,
    digest_of,
    label_facts,
    lacking_classes,
    split_whole,
)
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.lock import locked
from fastkd.data.sources.pixels import DEFAULTS, Decoding
from fastkd.data.sources.progress import in_threads
from fastkd.data.sources.tree import is_image
from fastkd.errors import UserError
from fastkd.printable import few, shown
from fastkd.storage.atomic import atomic_path
from fastkd.storage.cache_folder import cache_folder

__all__ = [
    "CLASSES",
    "Packed",
    "ShardIndex",
    "find_shards",
    "index_path",
    "open_shards",
    "write_index",
]

CLASSES = "classes.txt"
_WORDS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Words of a shard's name -> the split that it belongs to."""
_FORMAT = "fastkd shards 1"
_LONGEST_LABEL = 1 << 16
"""Bytes of a .cls or .json member; a picture beside it may be large, its labels are not."""


class Packed(NamedTuple):
    """What a split's shards hold, in canonical order."""

    names: list[bytes]
    """Of the files, for messages; their extensions say how they are read."""
    spans_N3: np.ndarray
    """int64: number of the shard, first byte, bytes."""
    labels_N: np.ndarray
    """int64, or of several labels float32 [N, C]."""
    classes: tuple[str, ...]
    sizes: str
    """Digest of names and sizes, as of a FolderIndex."""


@dataclass(frozen=True)
class ShardIndex(FolderIndex):
    """The files of one split that lie in shards.

    shards    names of the tar files below the folder
    spans_N3  see `Packed`
    """

    shards: tuple[str, ...] = ()
    spans_N3: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def path(self, sample: int) -> str:
        """Shard and member of a sample id, for messages."""
        shard = self.shards[self.spans_N3[sample, 0]]
        return f"{os.path.join(self.folder, shard)}: {self.file(sample)}"

    def size(self, sample: int) -> int:
        """Bytes of the file of a sample id."""
        return int(self.spans_N3[sample, 2])

    def open(self, sample: int) -> IO[bytes]:
        """The file of a sample id. UserError: the shard cannot be read."""
        shard, first, size = self.spans_N3[sample].tolist()
        return BytesIO(_read(self.folder / self.shards[shard], first, size))

    def take(self, positions: np.ndarray) -> Self:
        """A new split of the samples at these positions; ids count from 0 again."""
        return replace(super().take(positions), spans_N3=self.spans_N3[positions])


def find_shards(root: Path) -> dict[str, list[str]]:
    """Names of the shards in a folder by split, "train" and "val"; empty if there are none.

    As in folders, shards for testing serve where there are none for validation. UserError for a
    name that says two splits.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        if not name.endswith(".tar") or name.startswith("."):
            continue
        splits = {_WORDS[word] for word in re.split(r"[-_.]", name) if word in _WORDS}
        if len(splits) > 1:
            raise UserError(
                f"the name of {shown(root / name)} says {' and '.join(sorted(splits))}; rename it, "
                "so that it says one split"
            )
        for split in splits:
            found.setdefault(split, []).append(name)
    of_test = found.pop("test", None)
    return {"val": of_test, **found} if of_test else found


def index_path(root: Path, split: str) -> Path:
    """Where the index of a split is, if it was packed here."""
    return root / f"{split}.index"


def open_shards(
    name: str,
    root: Path,
    split: str,
    decoding: Decoding = DEFAULTS,
    holdout: Holdout | None = None,
) -> ShardIndex:
    """The images of a split.

    holdout: what becomes "val" where there are only shards for training.

    Raises:
        OSError: something cannot be read.
        UserError: damaged shards, or shards that lack the split.
    """
    found = find_shards(root)
    lacking = [one for one in ("train", "val") if one not in found]
    if lacking == ["val"] and holdout is not None:
        whole = _open(name, root, "train", found["train"], decoding)
        return split_whole(whole, name, root, split, holdout)
    if lacking:
        cure = (
            "set data.val_share=0.1 to hold back a tenth of the images"
            if lacking == ["val"]
            else ""
        )
        raise UserError(
            f"{shown(root)} has shards ({few(chain.from_iterable(found.values()))}) but none for "
            f"{lacking[0]}: expected {lacking[0]}-000000.tar and so on{cure and '; or ' + cure}"
        )
    index = _open(name, root, split, found[split], decoding)
    if holdout is None or split == "val":
        return index
    idle = "data.val_share is not used, there are shards with validation images"
    return index.remarked(idle)


def write_index(path: Path, packed: Packed, shards: Sequence[tuple[str, int]]) -> None:
    """Write the index of a split; shards: name and bytes of each."""
    ends = np.cumsum([len(name) for name in packed.names], dtype=np.int64)
    tensors = {
        "names": np.frombuffer(b"".join(packed.names), np.uint8),
        "ends": ends,
        "spans": packed.spans_N3,
        "labels": packed.labels_N,
    }
    facts = {"classes": packed.classes, "shards": shards, "sizes": packed.sizes}
    with atomic_path(path) as staged:
        # One entry: safetensors writes several in any order. Its own files only their owner reads.
        staged.write_bytes(save(tensors, {_FORMAT: json.dumps(facts)}))


def _open(name: str, root: Path, split: str, shards: list[str], decoding: Decoding) -> ShardIndex:
    states = [os.stat(root / shard) for shard in shards]
    sizes = [(shard, state.st_size) for shard, state in zip(shards, states, strict=True)]
    listing = _listing(sizes, [state.st_mtime_ns for state in states])
    packed = _packed(name, root, split, sizes, listing)
    remarks = [f"is read from {len(shards)} {'shard' if len(shards) == 1 else 'shards'}"]
    remarks += lacking_classes(packed.labels_N, packed.classes)
    return ShardIndex(
        f"{name}/{split}",
        root,
        np.array(packed.names, dtype=np.bytes_),
        packed.labels_N,
        packed.classes,
        listing,
        packed.sizes,
        decoding,
        tuple(f"{name}/{split} {remark}" for remark in remarks),
        tuple(shards),
        packed.spans_N3,
    )


def _listing(sizes: Sequence[tuple[str, int]], times: Sequence[int]) -> str:
    said = [(name, size, time) for (name, size), time in zip(sizes, times, strict=True)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _packed(
    name: str, root: Path, split: str, sizes: Sequence[tuple[str, int]], listing: str
) -> Packed:
    own, names = index_path(root, split), _class_names(root)
    if own.exists():
        return _renamed(_read_index(own, sizes), names, root)
    place = os.path.realpath(root)
    stem = hashlib.sha256(os.fsencode(f"{place}|{split}|{listing}|{names}")).hexdigest()[:16]
    folder = cache_folder()
    kept = folder / f"shards-{stem}.index"
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / f"shards-{stem}.lock"))
        except OSError as error:
            raise UserError(
                f"the index of {shown(root)} cannot be kept in {folder}: {error}; set FASTKD_CACHE "
                "to a writable folder"
            ) from error
        if not kept.exists():
            write_index(kept, _scan(name, root, split, sizes, names), sizes)
    return _read_index(kept, sizes)


def _renamed(packed: Packed, names: tuple[str, ...] | None, root: Path) -> Packed:
    """With the names that classes.txt has now."""
    if names is None:
        return packed
    if len(names) != len(packed.classes):
        raise UserError(
            f"{shown(root / CLASSES)} names {len(names)} classes, and the shards beside it have "
            f"{len(packed.classes)}"
        )
    return packed._replace(classes=names)


def _read_index(path: Path, sizes: Sequence[tuple[str, int]]) -> Packed:
    try:
        packed, shards = _parsed(path)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{shown(path)} is damaged ({error}); {_REMOVE}") from error
    if shards != [tuple(one) for one in sizes]:
        raise UserError(
            f"{shown(path)} is the index of other shards than those beside it; {_REMOVE}"
        )
    return packed


_REMOVE = "remove it, and an index is made from the shards"


def _parsed(path: Path) -> tuple[Packed, list[tuple[str, int]]]:
    """What an index says. ValueError and the like: it contradicts itself."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as opened:
        metadata = opened.metadata() or {}
    if _FORMAT not in metadata:
        raise ValueError(f"it is no index of {_FORMAT!r}")
    facts: Any = json.loads(metadata[_FORMAT])
    shards = [(str(shard), int(size)) for shard, size in facts["shards"]]
    classes = tuple(str(one) for one in facts["classes"])
    tensors = load_file(path)
    ends, spans_N3, labels_N = tensors["ends"], tensors["spans"], tensors["labels"]
    letters = tensors["names"].tobytes()
    num = len(ends)
    _must(num > 0 and len(classes) > 0, "it lists no image")
    _must(ends.dtype == np.int64 and (np.diff(ends, prepend=0) > 0).all(), "names")
    _must(int(ends[-1]) == len(letters), "names")
    _must(spans_N3.dtype == np.int64 and spans_N3.shape == (num, 3), "spans")
    number, first, size = spans_N3.T
    _must(number.min() >= 0 and number.max() < len(shards), "spans")
    whole = np.array([size for _, size in shards])[number]
    _must((first >= 0).all() and (size >= 0).all() and (first <= whole - size).all(), "spans")
    if labels_N.ndim == 2:
        _must(labels_N.shape == (num, len(classes)) and labels_N.dtype == np.float32, "labels")
        _must(np.isin(labels_N, (0, 1, IGNORED)).all(), "labels")
    else:
        _must(labels_N.shape == (num,) and labels_N.dtype == np.int64, "labels")
        _must(labels_N.min() >= 0 and labels_N.max() < len(classes), "labels")
    starts = np.concatenate([[0], ends[:-1]])
    names = [letters[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    return Packed(names, spans_N3, labels_N, classes, str(facts["sizes"])), shards


def _must(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


class _Member(NamedTuple):
    name: str
    shard: int
    first: int
    size: int


def _scan(
    name: str,
    root: Path,
    split: str,
    sizes: Sequence[tuple[str, int]],
    names: tuple[str, ...] | None,
) -> Packed:
    """Read the headers of all shards, and the labels; names: of the classes, if there are any."""
    paths = [root / shard for shard, _ in sizes]
    what = f"Listing {name}/{split} ({len(paths)} shards, once)"
    found = in_threads(what, lambda k: list(_members(paths[k], k)), len(paths), 16)
    images: dict[tuple[str, int], _Member] = {}
    labels: dict[tuple[str, int], list[_Member]] = {}
    for member in chain.from_iterable(chain.from_iterable(found)):
        folder, _, base = member.name.rpartition("/")
        key = f"{folder}/{base.partition('.')[0]}", member.shard
        if is_image(member.name):
            if key in images:
                raise UserError(
                    f"{shown(paths[member.shard])} has two pictures of one key, "
                    f"{shown(images[key].name)} and {shown(member.name)}; a key ends at the first "
                    "dot of a name"
                )
            images[key] = member
        elif member.name.endswith((".cls", ".json")):
            labels.setdefault(key, []).append(member)
    if not images:
        raise UserError(f"the shards of {name}/{split} in {shown(root)} hold no picture")
    keys = sorted(images)
    said = [_label(paths, images[key], labels.get(key, [])) for key in keys]
    labels_N, classes = _as_labels(said, names, root)
    listed = [os.fsencode(images[key].name) for key in keys]
    spans_N3 = np.array([images[key][1:] for key in keys], dtype=np.int64)
    files = digest_of(zip(listed, spans_N3[:, 2].tolist(), strict=True))
    # Names of members need not say the class.
    digest = hashlib.sha256(files.encode() + label_facts(labels_N, classes)).hexdigest()
    return Packed(listed, spans_N3, labels_N, classes, digest)


def _members(path: Path, number: int) -> Iterator[_Member]:
    """The files in a shard. UserError: it is damaged, or holds what is no plain file."""
    whole = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for one in archive:
                if one.isdir():
                    continue
                parts = one.name.split("/")
                if not one.isreg() or one.issparse():
                    raise UserError(
                        f"{shown(path)} holds {shown(one.name)}, which is a link or no plain file; "
                        "pack the pictures themselves"
                    )
                if one.name.startswith("/") or ".." in parts or "\0" in one.name:
                    raise UserError(
                        f"{shown(path)} holds {shown(one.name)}, a path that leads out of it"
                    )
                if one.offset_data + one.size > whole:
                    raise tarfile.ReadError("it ends within a file")
                if not parts[-1].startswith("."):
                    yield _Member(one.name, number, one.offset_data, one.size)
            # tarfile takes a damaged header for the end.
            rest = min(tarfile.BLOCKSIZE, max(0, whole - archive.offset))
            if _read(path, archive.offset, rest).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
            if archive.offset > whole:
                raise tarfile.ReadError("it ends within a file")
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, ArithmeticError) as error:
        raise UserError(f"{shown(path)} is no tar file, or is damaged: {error}") from error


def _label(paths: Sequence[Path], image: _Member, members: Sequence[_Member]) -> Any:
    """A class id, or a pair of lists of ids: present and unknown."""
    what = f"{shown(paths[image.shard])}: {shown(image.name)}"
    if not members:
        raise UserError(f"{what} has no label: expected a member .cls or .json beside it")
    member = min(members, key=lambda one: not one.name.endswith(".cls"))
    if member.size > _LONGEST_LABEL:
        raise UserError(f"{what} has a label of {member.size} bytes ({shown(member.name)})")
    content = _read(paths[member.shard], member.first, member.size)
    try:
        said = json.loads(content)
        if isinstance(said, dict):
            if "present" in said:
                return [_ids(said["present"]), _ids(said.get("unknown", []))]
            said = said["label"]
        return _ids([said])[0]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{what} has a label that is not understood ({shown(member.name)}: "
            f"{shown(content[:80].decode(errors='replace'))}); expected a class id from 0 up"
        ) from error


def _ids(said: Any) -> list[int]:
    if not all(type(one) is int and 0 <= one < 1 << 20 for one in said):
        raise ValueError("no class ids")
    return list(said)


def _class_names(root: Path) -> tuple[str, ...] | None:
    try:
        text = (root / CLASSES).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(root / CLASSES)} is no UTF-8 text") from error
    names = tuple(text.rstrip("\n").split("\n"))
    for place, name in enumerate(names, 1):
        problem = name_problem(name) if name.strip() else "is empty"
        if problem or name in names[: place - 1]:
            raise UserError(
                f"{shown(root / CLASSES)}, line {place}: the class {name!a} "
                f"{problem or 'appears twice'}; every class needs a name of its own"
            )
    return names


def _as_labels(
    said: Sequence[Any], names: tuple[str, ...] | None, root: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    several = [isinstance(one, list) for one in said]
    if any(several) and not all(several):
        raise UserError(
            f"the shards in {shown(root)} label some pictures with several classes only"
        )
    flat = chain.from_iterable(chain.from_iterable(said)) if any(several) else said
    largest = max(flat, default=-1)
    classes = names or tuple(str(number) for number in range(largest + 1))
    if largest >= len(classes):
        raise UserError(
            f"{shown(root)} has a label {largest}, and {CLASSES} names {len(classes)} classes "
            f"(0 to {len(classes) - 1})"
        )
    if not any(several):
        return np.array(said, dtype=np.int64), classes
    labels_NC = np.zeros((len(said), len(classes)), np.float32)
    for row, (present, unknown) in enumerate(said):
        labels_NC[row, unknown] = IGNORED
        labels_NC[row, present] = 1
    return labels_NC, classes


def _read(path: Path, first: int, size: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), size, first)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror}") from error
    if len(content) < size:
        raise UserError(f"{shown(path)} ends early: it was written anew since it was opened")
    return content
