"""Images a second of the loaders alone, beside torchvision's and a bare DALI pipeline.

    pytest benchmarks/bench_loaders.py --part PART [--pairs 20] [--save-results]

Parts, on the images below FASTKD_TEST_DATA:

- photographs: random resized crops of 224 pixels from 100 ImageNet photographs of full size
  (imagenet-sample/, four copies), by DALI, by Pillow in workers, by torchvision v2 on ImageFolder
  in as many workers, and by a DALI pipeline of its own reader, decoder, resize and normalisation,
  which is the ceiling of DALI here. All on two threads or workers.
- evaluation: the same with resize to 256 and the central 224 pixels.
- shards: the photographs from files and from tar shards; 20 MiB, so from the page cache.
- bad: the photographs whole, and with 1 of 100 damaged and skipped.
- cifar: 5,000 CIFAR-10 images (cifar10/), padded crop and flip, resident and by the classic loader:
  ImageFolder, transforms, DataLoader workers.

- policies: RandAugment and TrivialAugment on a batch in memory, and torchvision v2's image by
  image.

A sample is one epoch, or one batch. Before the clock starts the pixels of our own loaders are
compared; the others draw crops of their own.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import Loading, ResidentLoader, TorchLoader, open_source
from fastkd.data.draws import POLICY, sample_words
from fastkd.data.geometry import Geometry
from fastkd.data.loaders.streaming import StreamingLoader
from fastkd.data.normalization import normalization
from fastkd.data.policies.policy import make_policy
from fastkd.data.sources.by_name import decode_source
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import stratified_positions
from fastkd.data.sources.packing import pack_split
from fastkd.storage.facts import Framing

DATA = os.environ.get("FASTKD_TEST_DATA")
WORKERS, SIDE, RESIZE, COPIES = 2, 224, 256, 4
WORLD = World(0, 0, 1, torch.device("cpu"), None)
MEAN, STD = normalization("folder")
AS_FLOATS = [
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
]
# Mean difference of the sides' pixels in levels of 0..255: decoders and filters round differently.
ALIKE = 1.0


def images(name: str) -> Path:
    if DATA is None or not (Path(DATA) / name).is_dir():
        pytest.skip(f"FASTKD_TEST_DATA has no {name}/")
    return Path(DATA) / name


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> FolderIndex:
    """400 files of 100 classes: the photographs four times, for an epoch of 16 batches."""
    root = tmp_path_factory.mktemp("photographs")
    shutil.copytree(images("imagenet-sample"), root / "val")
    for file in sorted((root / "val").glob("*/*")):
        for copy in range(COPIES):
            target = root / "train" / file.parent.name / f"{copy}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    found = open_source("folder", root)
    assert isinstance(found, FolderIndex)
    return found


def loading(batch: int, *, train: bool, geometry: Geometry | None = None) -> Loading:
    return Loading(
        batch_size=batch,
        seed=0,
        train=train,
        normalization=(MEAN, STD),
        placement=Placement(WORLD, Precision("fp32", "cpu")),
        geometry=geometry or Geometry(flip=True),
        drop_last=False,
    )


def ours(
    kind: type[StreamingLoader], source: FolderIndex, *, train: bool, skips: bool = False
) -> StreamingLoader:
    return kind(
        source,
        loading(25, train=train),
        image_size=SIDE,
        crop="resized" if train else "none",
        framing=Framing(resize=RESIZE, crop=SIDE),
        workers=WORKERS,
        skips=skips,
    )


def torchvisions(root: Path, transform: list[Any], batch: int, keep: Any = None) -> DataLoader:
    found: Any = ImageFolder(root, v2.Compose([*transform, *AS_FLOATS]))
    return DataLoader(
        found if keep is None else Subset(found, keep),
        batch,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )


def epoch_of(data: Any) -> Callable[[], int]:
    """A call that runs through one epoch of one of our loaders, a new one each time."""
    number = iter(range(1 << 30))
    return lambda: count(batch.images_NCHW for batch in data.epoch(next(number)))


def count(batches: Iterable[torch.Tensor]) -> int:
    return sum(len(batch) for batch in batches)


def pixels(data: Any) -> dict[int, torch.Tensor]:
    std = torch.tensor(STD)[:, None, None]
    return {
        sample: image * std * 255
        for batch in data.epoch(0)
        for sample, image in zip(batch.index_N.tolist(), batch.images_NCHW, strict=True)
    }


def check_alike(one: Any, other: Any) -> float:
    """Mean difference in levels; the same ids, and pixels that differ by rounding."""
    first, second = pixels(one), pixels(other)
    assert first.keys() == second.keys()
    difference = torch.stack([(first[n] - second[n]).abs().mean() for n in first])
    assert difference.max() < 2 * ALIKE
    assert difference.mean() < ALIKE
    return difference.mean().item()


def bare_dali(root: Path) -> Callable[[], int]:
    """What DALI does with its own reader and draws."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=25, num_threads=WORKERS, device_id=None)
    def graph() -> Any:
        files, labels = fn.readers.file(file_root=str(root), random_shuffle=True, name="files")
        shown = fn.decoders.image_random_crop(
            files, random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0], num_attempts=10
        )
        shown = fn.resize(shown, size=[SIDE, SIDE], antialias=True)
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        flip = fn.random.coin_flip()
        return fn.crop_mirror_normalize(shown, mirror=flip, mean=mean, std=std), labels

    pipeline = graph()
    pipeline.build()
    batches = pipeline.epoch_size("files") // 25
    return lambda: sum(len(pipeline.run()[0]) for _ in range(batches))


def row(race: Any, table: Any, what: str, num: int, sides: dict[str, Any], **more: Any) -> None:
    found = race(sides)
    rates = {f"{side} images/s": round(1e3 * num / found.ms(side)) for side in sides}
    ratios = {key: value for key, value in found.cells().items() if "vs" in key}
    table.rows.append({"what": what, "images": num, **rates, **ratios, **more})


def bench_photographs(photographs: FolderIndex, race: Any, table: Any) -> None:
    pytest.importorskip("nvidia.dali")
    from fastkd.data.loaders.dali_loader import DaliLoader

    dali = ours(DaliLoader, photographs, train=True)
    workers = ours(TorchLoader, photographs, train=True)
    difference = check_alike(dali, workers)
    root = photographs.folder
    theirs = torchvisions(root, [v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip()], 25)
    sides = {
        "fastkd": epoch_of(dali),
        "fastkd torch": epoch_of(workers),
        "torchvision": lambda: count(batch for batch, _ in theirs),
        "bare DALI": bare_dali(root),
    }
    num = len(photographs)
    row(race, table, "random resized crop 224", num, sides, **{"levels apart": difference})


def bench_evaluation(photographs: FolderIndex, race: Any, table: Any) -> None:
    pytest.importorskip("nvidia.dali")
    from fastkd.data.loaders.dali_loader import DaliLoader

    dali = ours(DaliLoader, photographs, train=False)
    workers = ours(TorchLoader, photographs, train=False)
    difference = check_alike(dali, workers)
    theirs = torchvisions(photographs.folder, [v2.Resize(RESIZE), v2.CenterCrop(SIDE)], 25)
    sides = {
        "fastkd": epoch_of(dali),
        "fastkd torch": epoch_of(workers),
        "torchvision": lambda: count(batch for batch, _ in theirs),
    }
    num = len(photographs)
    row(race, table, "resize 256, centre 224", num, sides, **{"levels apart": difference})


def bench_shards(
    photographs: FolderIndex, race: Any, table: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        pack_split(photographs, target, split)
    (target / "classes.txt").write_text("".join(f"{one}\n" for one in photographs.classes))
    packed = open_source("folder", target)
    assert isinstance(packed, FolderIndex)
    files, shards = (ours(TorchLoader, source, train=True) for source in (photographs, packed))
    first, second = pixels(files), pixels(shards)
    assert all(torch.equal(first[n], second[n]) for n in first)
    sides = {"fastkd": epoch_of(shards), "files": epoch_of(files)}
    row(race, table, "tar shards", len(photographs), sides)


def bench_bad(
    photographs: FolderIndex, race: Any, table: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("bad")
    shutil.copytree(photographs.folder.parent, root, dirs_exist_ok=True)
    spoilt = open_source("folder", root)
    assert isinstance(spoilt, FolderIndex)
    for sample in range(50, len(spoilt), 100):
        file = Path(spoilt.path(sample))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    bad = ours(TorchLoader, spoilt, train=True, skips=True)
    whole = ours(TorchLoader, photographs, train=True)
    assert sum(len(batch.unread) for batch in bad.epoch(0)) == COPIES
    sides = {"fastkd": epoch_of(bad), "whole": epoch_of(whole)}
    row(race, table, "1 of 100 damaged, skipped", len(photographs), sides)


def bench_cifar(race: Any, table: Any) -> None:
    root = images("cifar10")
    source = open_source("cifar10", root, limit=5000)
    geometry = Geometry(padding=4, flip=True)
    resident = ResidentLoader(
        decode_source(source, Framing.whole(32)), loading(128, train=True, geometry=geometry)
    )
    transform = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    labels_N = np.array(ImageFolder(root / "train").targets)
    classic = torchvisions(root / "train", transform, 128, stratified_positions(labels_N, 5000))
    sides = {
        "fastkd": epoch_of(resident),
        "classic": lambda: count(batch for batch, _ in classic),
    }
    assert {side: call() for side, call in sides.items()} == dict.fromkeys(sides, 5000)
    row(race, table, "CIFAR-10, pad 4, flip", 5000, sides)


@pytest.mark.parametrize(("side", "batch"), [(32, 256), (224, 64)])
@pytest.mark.parametrize("name", ["randaugment", "trivial"])
def bench_policies(name: Any, side: int, batch: int, race: Any, table: Any) -> None:
    noise = torch.rand(batch, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")
    images_BCHW = (255 * smooth).to(torch.uint8)
    images_BHWC = images_BCHW.permute(0, 2, 3, 1).contiguous()
    policy = make_policy(name)
    theirs = {"randaugment": v2.RandAugment, "trivial": v2.TrivialAugmentWide}[name]()
    assert policy is not None
    number = iter(range(1 << 30))

    def mine() -> torch.Tensor:
        ids, epoch = np.arange(batch), next(number)
        words = sample_words(0, epoch, POLICY, batch, ids, policy.words)
        return policy.of(images_BHWC, words)

    def one_by_one() -> torch.Tensor:
        return torch.stack([theirs(image) for image in images_BCHW])

    # Both draw; tests/data/test_policies.py compares pixels for the same draws.
    means = [torch.stack([call().float().mean() for _ in range(20)]) for call in (mine, one_by_one)]
    assert (means[0].mean() - means[1].mean()).abs() < 4 * means[0].std()
    sides = {"fastkd": mine, "torchvision": one_by_one}
    row(race, table, f"{name} {side}x{side}", batch, sides)
