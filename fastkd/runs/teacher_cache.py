"""The cache of a recipe's teacher: where it lies, and what its answers follow from.

Flow: `runs.stages` asks for it before it builds a teacher, and again once the teacher is proven.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastkd.augment.mix import MIXES
from fastkd.compute.machine import version_of
from fastkd.compute.placement import Placement
from fastkd.compute.ranks import on_main
from fastkd.config.values import is_list, is_mapping
from fastkd.data import DataPair
from fastkd.data.config import AppearanceConfig
from fastkd.data.normalization import LABEL_MAPS
from fastkd.data.sources.image_set import ImageSet
from fastkd.evaluation.headline import headline
from fastkd.losses.base.registry import build_terms
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import Recipe
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.cache.cached import Keeping
from fastkd.teachers.cache.identity import Identity, refuse
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.cache.store import Manifest, TeacherFacts
from fastkd.teachers.config import MemberConfig, TeacherConfig
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.loading import filled, good_enough, load_teacher
from fastkd.training.step import needed_taps

__all__ = ["find_cache", "keeping", "seen_in"]

_OF_ITS_TRAINING = {"pretrained", "new_head", "frozen", "train", "epochs", "lr", "seed"}
_OF_ITS_FILE = {"weights", "weights_key"}
_ASIDE = (
    _OF_ITS_TRAINING
    | _OF_ITS_FILE
    | {"kernels", "compile", "min_accuracy"}
    | (TeacherConfig.model_fields.keys() - MemberConfig.model_fields.keys())
)
"""Keys of a teacher that the digest of its weights answers for, that change roundings at most, or
that say what happens to its answers."""


def find_cache(
    recipe: Recipe,
    data: DataPair,
    placement: Placement,
    root: Path,
    *,
    folder_of: Callable[[MemberConfig], Path],
    say: Callable[[str], None],
) -> AnswerCache | None:
    """The cache that the recipe names; None if it names none, or a teacher is not trained yet.

    root: where run folders go. folder_of: where a teacher is trained. All ranks must call this.
    UserError for a damaged manifest.
    """
    config = recipe.teacher
    if config is None or config.cache is None:
        return None
    # On all ranks, because it is a question to all.
    trained = {key: folder_of(one) for key, one in config.members().items() if one.trains}

    def look() -> tuple[Path, Identity, Manifest | None, bool] | None:
        if not all(RunFolder(folder).summary() for folder in trained.values()):
            _refuse_early(recipe, data, placement, trained)
            return None
        identity = _identity(recipe, data, placement, trained)
        folder = _folder(recipe, identity, root)
        manifest = Manifest.read(folder)
        believed = (
            manifest is not None
            and manifest.identity.shared == identity.shared
            and _holds(manifest.teacher, config, data)
        )
        return folder, identity, manifest, believed

    found = on_main(placement.world, look)
    if found is None:
        return None
    folder, identity, manifest, believed = found
    return AnswerCache(
        folder=folder,
        identity=identity,
        manifest=manifest,
        believed=believed,
        compiled=any(one.compile == "on" for one in config.members().values()),
        load=partial(_load, config, data, trained),
        part=data.train.part,
        places=data.train.num_samples,
        epochs=recipe.shown_epochs,
        keeping=keeping(recipe, data),
        world=placement.world,
        say=say,
    )


def keeping(recipe: Recipe, data: DataPair) -> Keeping:
    """How the recipe's cache keeps answers."""
    config, pick = recipe.teacher, recipe.augment.pick
    assert config is not None
    return Keeping(
        format=config.cache_format,
        top=config.cache_top,
        maps=config.cache_maps,
        pool=pick.pool if pick else 1,
        images=data.train.num_samples * recipe.shown_epochs,
    )


def _refuse_early(
    recipe: Recipe, data: DataPair, placement: Placement, trained: Mapping[str, Path]
) -> None:
    """UserError before a teacher is trained, if the cache belongs to other images than it sees."""
    assert recipe.teacher is not None
    if recipe.teacher.cache == "auto":
        return
    folder = _named(recipe.teacher)
    if (manifest := Manifest.read(folder)) is None:
        return
    ready = {key: path for key, path in trained.items() if RunFolder(path).summary()}
    identity = _identity(recipe, data, placement, ready)
    unknown = {f"{key}.weights" for key in trained.keys() - ready.keys()}
    views = _asked(recipe)
    refuse(folder, manifest.identity.without(unknown), identity.without(unknown), views)


def seen_in(data: DataPair) -> str:
    """A fingerprint of the images on which a teacher is evaluated."""
    return data.remembered.fingerprint(evaluation=True)


def _holds(facts: TeacherFacts, config: TeacherConfig, data: DataPair) -> bool:
    """Whether what a cache says of the teachers would be found again, and is good enough."""
    each = facts.evaluations
    return (
        _reportable(facts.summary, config)
        and facts.validation == seen_in(data)
        and len(each) == len(config.members())
        and all(
            good_enough(one, found, data)
            for one, found in zip(config.members().values(), each, strict=True)
        )
    )


def _reportable(summary: Mapping[str, Any], config: TeacherConfig) -> bool:
    """Whether the end of a run can be told with what a manifest says of its teachers."""
    members = summary.get("members", [summary])
    return (
        is_list(members)
        and len(members) == len(config.members())
        and all(
            is_mapping(one)
            and isinstance(one.get("name"), str)
            and isinstance(one.get(headline(one)), float)
            and is_mapping(one.get("training", {}))
            for one in (summary, *members)
        )
    )


def _load(
    config: TeacherConfig, data: DataPair, trained: Mapping[str, Path]
) -> tuple[LoadedNet, ...]:
    nets = zip(config.members(), load_teacher(config, data), strict=True)
    return tuple(filled(net, trained[key]) if key in trained else net for key, net in nets)


def _named(config: TeacherConfig) -> Path:
    return Path(os.path.expanduser(str(config.cache)))


def _folder(recipe: Recipe, identity: Identity, root: Path) -> Path:
    """The folder that the recipe names, or one of its own for all that its answers follow from."""
    config = recipe.teacher
    assert config is not None
    if config.cache != "auto":
        return _named(config)
    asked = _asked(recipe)
    wanted = {view: sorted({"logits", *taps}) for view, taps in asked.items()}
    takes_head = any(term.uses_head for term in build_terms(recipe.losses))
    facts = [identity.of_views(asked), wanted, takes_head]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return root / "teachers" / f"{config.name.replace(':', '-')}-answers-{digest[:8]}"


def _asked(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What the losses ask the teacher for, by view."""
    return needed_taps(build_terms(recipe.losses), "teacher")


def _identity(
    recipe: Recipe, data: DataPair, placement: Placement, trained: Mapping[str, Path]
) -> Identity:
    """What decides the answers of the recipe's teachers to its views."""
    views: dict[str, dict[str, Any]] = {"x": {}}
    augment = recipe.augment
    if augment.xprime != "none":
        views["xprime"] = {
            "augment.xprime": augment.xprime,
            "augment.pick.pool": augment.pick.pool if augment.pick else 1,
        }
        if augment.xprime in MIXES:
            views["xprime"]["batch_size"] = recipe.batch_size
    shared = _of_teachers(recipe, trained) | _of_images(recipe, data)
    shared |= {
        "precision": placement.precision.name,
        # A student from outside the zoo takes images in fp32, and the teacher sees the same.
        "images": str(placement.dtype),
    }
    return Identity(shared=shared, views=views)


def _of_images(recipe: Recipe, data: DataPair) -> dict[str, Any]:
    """What decides how x looks, by key."""
    augment, facts = recipe.augment, data.remembered
    files, kept = not isinstance(data.sources[0], ImageSet), facts.train
    found: dict[str, Any] = {
        "data.seed": data.seed,
        "data.name": facts.name,
        "data.image_size": facts.image_size,
        "data.mean and data.std": facts.normalization,
        "classes": facts.classes and f"{len(facts.classes)}, {_digest(facts.classes)}",
        "training images": kept and f"{kept.images}, {_digest((kept.files, kept.contents))}",
        "data.backend": f"{data.backend} ({_decoder(data.backend)})" if files else data.backend,
        "data.on_bad": recipe.data.on_bad,
    }
    if recipe.data.on_bad == "skip":
        found["data.max_pixels"] = recipe.data.max_pixels
    found |= {f"data.{name}": getattr(recipe.data, name) for name in ("exif", "alpha", "white")}
    if facts.name in LABEL_MAPS:
        found |= {f"data.{key}": getattr(recipe.data, key) for key in ("multiple", "label_stride")}
    appearance = augment.model_dump(mode="json", include=set(AppearanceConfig.model_fields))
    # Newer than the first caches, which do not say them.
    newer = [key for key in ("scale", "window") if appearance[key] is None]
    appearance = {key: value for key, value in appearance.items() if key not in newer}
    if augment.crop != "pad":
        appearance = {k: v for k, v in appearance.items() if k not in ("padding", "pad_mode")}
    found |= {f"augment.{name}": value for name, value in appearance.items()}
    for name in ("mixup", "cutmix", "mix_share"):
        found[f"augment.{name}"] = getattr(augment, name)
    if augment.mixing:
        found["batch_size"] = recipe.batch_size
    if augment.sizes:
        found |= {"augment.sizes": list(augment.sizes), "epochs": recipe.total_epochs}
    return found


def _of_teachers(recipe: Recipe, trained: Mapping[str, Path]) -> dict[str, Any]:
    """What decides how each teacher answers, and how that is kept, by key."""
    assert recipe.teacher is not None
    found: dict[str, Any] = {"teacher.cache_format": recipe.teacher.cache_format}
    if recipe.teacher.cache_format.startswith("top"):
        found["teacher.cache_top"] = recipe.teacher.cache_top
    for key, one in recipe.teacher.members().items():
        keys = one.model_dump(mode="json", exclude=_ASIDE, exclude_none=True)
        found |= {f"{key}.{name}": value for name, value in keys.items()}
        found[f"{key}.weights"] = _weights_of(one, trained.get(key))
    return found


def _weights_of(config: MemberConfig, trained: Path | None) -> str | None:
    """A digest of its weights; None if they have yet to be trained."""
    if trained is not None:
        return _digest_of(WeightFile.open(trained))
    if config.trains:
        return None
    if config.weights is not None:
        return _digest_of(WeightFile.open(config.weights, config.weights_key))
    source = config.name.partition(":")[0]
    return f"published, {source} {version_of(source)}"


def _digest_of(file: WeightFile) -> str:
    """Of all tensors, wherever the network lies, and of the metadata by which it is loaded."""
    digest = hashlib.sha256()
    for place, tensors in sorted(file.groups.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{place}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    for key in ("architecture", "options", "normalization", "classes"):
        digest.update(f"{key}={file.facts.get(key)}".encode())
    return digest.hexdigest()[:16]


def _digest(values: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(values).encode()).hexdigest()[:8]


def _decoder(backend: str) -> str:
    """What decodes image files, and its version."""
    names = ["pillow"]
    if backend == "dali":
        names = ["nvidia-dali-cuda130", "nvidia-dali-cuda120"]
    found = {name: version_of(name) for name in names}
    return next((f"{name} {version}" for name, version in found.items() if version), names[0])
