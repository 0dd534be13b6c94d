"""The cache of a recipe's teacher: where it lies, and what its answers follow from.

Flow: `runs.stages` asks for it before it builds a teacher, and again once the teacher is proven.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastkd.augment.mix import MIXES
from fastkd.compute.machine import version_of
from fastkd.compute.placement import Placement
from fastkd.compute.ranks import on_main
from fastkd.data import DataPair
from fastkd.data.config import AppearanceConfig
from fastkd.evaluation.headline import headline
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import Recipe
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.cache.identity import Identity, refuse
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.cache.store import Manifest, TeacherFacts
from fastkd.teachers.config import MemberConfig, TeacherConfig
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.loading import filled, load_teacher

__all__ = ["find_cache", "seen_in"]

_OTHERWISE = {"kernels", "weights", "weights_key", "train", "epochs", "lr", "seed", "compile"}
"""Keys of a teacher that its weights answer for, and those that change roundings at most."""
_NEW_HEAD = {"pretrained", "new_head", "frozen"}
"""Keys of a teacher's training."""


def find_cache(
    recipe: Recipe,
    data: DataPair,
    placement: Placement,
    root: Path,
    *,
    folder_of: Callable[[MemberConfig], Path],
    say: Callable[[str], None],
    facts: TeacherFacts | None = None,
) -> AnswerCache | None:
    """The cache that the recipe names; None if it names none, or a teacher is not trained yet.

    root: where run folders go. folder_of: where a teacher is trained. facts: of a teacher that has
    just been evaluated. All ranks must call this. UserError for a damaged manifest.
    """
    config = recipe.teacher
    if config is None or config.cache is None:
        return None
    # On all ranks, because it is a question to all.
    trained = {key: folder_of(one) for key, one in config.members().items() if one.trains}

    def look() -> tuple[Path, Identity, Manifest | None] | None:
        if not all(RunFolder(folder).summary() for folder in trained.values()):
            _refuse_early(recipe, data, placement, trained)
            return None
        identity = _identity(recipe, data, placement, trained)
        folder = _folder(config, identity, root)
        return folder, identity, Manifest.read(folder)

    found = on_main(placement.world, look)
    if found is None:
        return None
    folder, identity, manifest = found
    return AnswerCache(
        folder=folder,
        identity=identity,
        manifest=manifest,
        facts=facts,
        believed=manifest is not None and _holds(manifest.teacher, config, data),
        load=partial(_load, config, data, trained),
        part=data.train.part,
        places=data.train.num_samples,
        epochs=recipe.shown_epochs,
        format=config.cache_format,
        top=config.cache_top,
        maps=config.cache_maps,
        pool=recipe.augment.pick.pool if recipe.augment.pick else 1,
        world=placement.world,
        say=say,
    )


def _refuse_early(
    recipe: Recipe, data: DataPair, placement: Placement, trained: Mapping[str, Path]
) -> None:
    """UserError before a teacher is trained, if the cache belongs to other images than it sees."""
    assert recipe.teacher is not None
    if recipe.teacher.cache == "auto":
        return
    folder = Path(str(recipe.teacher.cache)).expanduser()
    if (manifest := Manifest.read(folder)) is None:
        return
    ready = {key: path for key, path in trained.items() if RunFolder(path).summary()}
    identity = _identity(recipe, data, placement, ready)
    unknown = {f"{key}.weights" for key in trained.keys() - ready.keys()}
    refuse(folder, manifest.identity.without(unknown), identity.without(unknown), identity.views)


def seen_in(data: DataPair) -> str:
    """A fingerprint of the images on which a teacher is evaluated."""
    return data.remembered.fingerprint(evaluation=True)


def _holds(facts: TeacherFacts, config: TeacherConfig, data: DataPair) -> bool:
    """Whether what a cache says of the teacher would be found again, and is good enough."""
    summary = facts.summary
    each = summary.get("members", [summary])
    keys = config.members().values()
    return facts.validation == seen_in(data) and all(
        one.min_accuracy is None or found[headline(found)] >= one.min_accuracy
        for one, found in zip(keys, each, strict=True)
    )


def _load(
    config: TeacherConfig, data: DataPair, trained: Mapping[str, Path]
) -> tuple[LoadedNet, ...]:
    nets = zip(config.members(), load_teacher(config, data), strict=True)
    return tuple(filled(net, trained[key]) if key in trained else net for key, net in nets)


def _folder(config: TeacherConfig, identity: Identity, root: Path) -> Path:
    """The folder that the recipe names, or one of its own for every identity."""
    if config.cache != "auto":
        return Path(str(config.cache)).expanduser()
    return root / "teachers" / f"{config.name.replace(':', '-')}-answers-{identity.digest()[:8]}"


def _identity(
    recipe: Recipe, data: DataPair, placement: Placement, trained: Mapping[str, Path]
) -> Identity:
    """What decides the answers of the recipe's teachers to its views."""
    augment, facts = recipe.augment, data.remembered
    shared: dict[str, Any] = {
        f"{key}.{name}": value
        for key, one in (recipe.teacher.members() if recipe.teacher else {}).items()
        for name, value in _of_teacher(one, trained.get(key)).items()
    }
    if recipe.teacher:
        shared["teacher.cache_format"] = recipe.teacher.cache_format
        if recipe.teacher.cache_format.startswith("top"):
            shared["teacher.cache_top"] = recipe.teacher.cache_top
    shared |= {
        "precision": placement.precision.name,
        # A student from outside the zoo takes images in fp32, and the teacher sees the same.
        "images": str(placement.dtype),
        "seed": data.seed,
        "data": facts.model_dump(
            mode="json", include={"name", "classes", "image_size", "normalization", "train"}
        ),
        "data.backend": _decoder(data.backend),
        "data.on_bad": recipe.data.on_bad,
    }
    del shared["data"]["train"]["times"]
    for name in ("exif", "alpha", "white"):
        shared[f"data.{name}"] = getattr(recipe.data, name)
    appearance = augment.model_dump(mode="json", include=set(AppearanceConfig.model_fields))
    shared |= {f"augment.{name}": value for name, value in appearance.items()}
    shared |= {
        f"augment.{name}": getattr(augment, name) for name in ("mixup", "cutmix", "mix_share")
    }
    if augment.mixing:
        shared["batch_size"] = recipe.batch_size
    if augment.sizes:
        shared |= {"augment.sizes": list(augment.sizes), "epochs": recipe.total_epochs}
    views: dict[str, dict[str, Any]] = {"x": {}}
    if augment.xprime != "none":
        views["xprime"] = {
            "augment.xprime": augment.xprime,
            "augment.pick.pool": augment.pick.pool if augment.pick else 1,
        }
        if augment.xprime in MIXES:
            views["xprime"]["batch_size"] = recipe.batch_size
    return Identity(shared=shared, views=views)


def _of_teacher(config: MemberConfig, trained: Path | None) -> dict[str, Any]:
    """What decides the answers of one network, by key."""
    aside = (
        _OTHERWISE
        | {"ensemble", "min_accuracy"}
        | set(TeacherConfig.model_fields) - set(MemberConfig.model_fields)
    )
    found = config.model_dump(mode="json", exclude=aside, exclude_none=True)
    weights = trained or config.weights
    if config.trains and trained is None:
        return found  # not yet trained
    if weights is None:
        source = config.name.partition(":")[0]
        return found | {"weights": f"published, {source} {version_of(source)}"}
    kept = {key: value for key, value in found.items() if key not in _NEW_HEAD}
    return kept | {"weights": _digest_of(WeightFile.open(weights, config.weights_key))}


def _digest_of(file: WeightFile) -> str:
    """Sixteen hex digits of the tensors and of the metadata by which they are loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(file.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    for key in ("architecture", "options", "normalization", "classes"):
        digest.update(f"{key}={file.facts.get(key)}".encode())
    return digest.hexdigest()[:16]


def _decoder(backend: str) -> str:
    """The backend and, where it reads files, the version of what decodes them."""
    package = {"torch": "pillow", "dali": "nvidia-dali-cuda130"}.get(backend)
    return backend if package is None else f"{backend} ({package} {version_of(package)})"
