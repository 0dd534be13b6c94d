"""Policies: torchvision's and timm's pixels for the drawn magnitudes, and their chances."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastkd.data.config import AppearanceConfig
from fastkd.data.draws import POLICY, sample_words
from fastkd.data.policies.config import RandAugmentConfig
from fastkd.data.policies.operations import OPERATIONS, Resampling
from fastkd.data.policies.policy import Policy, Turn, make_policy

NAMES = list(OPERATIONS)
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "randaugment": ("randaugment", {}),
    "strong": ("randaugment", {"operations": 3, "magnitude": 27}),
    "timm": ("randaugment", {"space": "timm", "magnitude": 7, "spread": 0.5}),
    "timm increasing": (
        "randaugment",
        {"space": "timm_increasing", "magnitude": 7, "spread": 0.5},
    ),
    "trivial": ("trivial", {}),
    "autoaugment": ("autoaugment", {}),
    "3augment": ("3augment", {}),
}


def policy(name: str) -> Policy:
    kind, keys = SETTINGS[name]
    made = make_policy(kind, RandAugmentConfig(**keys))
    assert made is not None
    return made


def words(of: Policy, num: int, epoch: int = 0, appearance: int = 0) -> np.ndarray:
    return sample_words(3, epoch, POLICY, num, np.arange(num), of.words, appearance)


def pictures(num: int, side: int) -> torch.Tensor:
    """Smooth ones, so that a shift by a fraction of a pixel is small."""
    noise = torch.rand(num, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic")
    return (smooth * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def by_torchvision(
    image: torch.Tensor, name: str, size: float, resampling: Resampling
) -> torch.Tensor:
    """What torchvision makes of one image [3, H, W]."""
    if name.startswith(("shear", "translate", "rotate")):
        # Its `fill` darkens the pixels at the edge (it weighs them twice), so the image gets a
        # border of the colour instead.
        side = image.shape[-1]
        wide = F.pad(image, [side], fill=list(resampling.fill))
        moved: dict[str, Any] = {"interpolation": F.InterpolationMode(resampling.mode)}
        along = [size * one for one in ([0, 1] if name.endswith("y") else [1, 0])]
        if name == "rotate":
            wide = F.rotate(wide, size, **moved)
        elif name.startswith("translate"):
            wide = F.affine(wide, 0.0, along, 1.0, [0.0, 0.0], **moved)
        else:
            shear = np.degrees(np.arctan(along)).tolist()
            wide = F.affine(wide, 0.0, [0, 0], 1.0, shear, center=[side, side], **moved)
        return F.center_crop(wide, [side, side])
    if name == "solarize_add":
        return torch.where(image < 128, (image.int() + int(size)).clamp(0, 255).byte(), image)
    known = {
        "brightness": lambda: F.adjust_brightness(image, size),
        "color": lambda: F.adjust_saturation(image, size),
        "contrast": lambda: F.adjust_contrast(image, size),
        "sharpness": lambda: F.adjust_sharpness(image, size),
        "posterize": lambda: F.posterize(image, round(size)),
        "solarize": lambda: F.solarize(image, min(size, 255)) if size <= 255 else image,
        "auto_contrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
        "invert": lambda: F.invert(image),
        "grayscale": lambda: F.rgb_to_grayscale(image, 3),
    }
    return known[name]()


@pytest.mark.parametrize("side", [7, 32, 65])
@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_are_torchvisions_for_the_same_magnitudes(name: str, side: int) -> None:
    own, num = policy(name), 40
    images = pictures(num, side)
    now = images
    for turn in own.turns(words(own, num), side):
        single = type("Single", (Policy,), {"words": 0, "turns": lambda *_, t=turn: [t]})()
        single.resampling = own.resampling
        after = single.of(now, words(own, num))
        for n, (operation, size) in enumerate(zip(*turn, strict=True)):
            before = now[n].permute(2, 0, 1)
            if operation < 0:
                assert torch.equal(after[n], now[n])
            elif NAMES[operation] != "blur":
                wanted = by_torchvision(before, NAMES[operation], float(size), own.resampling)
                difference = (after[n].permute(2, 0, 1).int() - wanted.int()).abs()
                # Where torchvision fuses a product and a sum, the level below may come out.
                levels = 1 if NAMES[operation] in ("color", "contrast") else 0
                if NAMES[operation] in ("rotate", "shear_x", "shear_y"):
                    # A place exactly between two pixels may show either of them.
                    assert (difference > 1).float().mean() <= 0.02, (NAMES[operation], size)
                else:
                    assert difference.max() <= levels, (NAMES[operation], size)
        now = after
    assert torch.equal(own.of(images, words(own, num)), now)
    assert now.dtype == torch.uint8 and now.is_contiguous()


def test_a_blur_is_a_gaussian_in_float64() -> None:
    image = pictures(3, 33)
    sigma = np.array([0.1, 0.7, 2.0])
    turn = Turn(np.full(3, NAMES.index("blur")), sigma)
    blurred = type("Single", (Policy,), {"words": 0, "turns": lambda *_: [turn]})().of(
        image, np.zeros((3, 0), np.uint64)
    )
    for n, s in enumerate(sigma):
        offsets = np.arange(-6, 7)
        weights = np.exp(-0.5 * (offsets / s) ** 2)
        weights /= weights.sum()
        padded = np.pad(image[n].numpy().astype(float), ((6, 6), (6, 6), (0, 0)), "reflect")
        down = sum(w * padded[k : k + 33] for k, w in enumerate(weights))
        wanted = sum(w * down[:, k : k + 33] for k, w in enumerate(weights))
        assert np.abs(blurred[n].numpy() - wanted).max() <= 0.501


def drawn(name: str, num: int, side: int) -> list[list[tuple[str, float]]]:
    """For every turn, (operation, magnitude) of each image."""
    own = policy(name)
    return [
        [
            ("identity" if operation < 0 else NAMES[operation], float(size))
            for operation, size in zip(*turn, strict=True)
        ]
        for turn in own.turns(words(own, num), side)
    ]


OF_TORCHVISION = {
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "AutoContrast": "auto_contrast",
    "Color": "color",
}


def ours(name: str) -> str:
    return OF_TORCHVISION.get(name, name.lower())


def in_our_units(name: str, size: float) -> float:
    """A magnitude of torchvision's tables."""
    if name in ("brightness", "color", "contrast", "sharpness"):
        return size + 1.0
    return {"solarize": size * 255, "posterize": round(size)}.get(name, size)


@pytest.mark.parametrize(("name", "levels"), [("randaugment", [9]), ("trivial", range(31))])
def test_operations_and_magnitudes_are_those_of_torchvisions_tables(
    name: str, levels: list[int]
) -> None:
    theirs = {"randaugment": v2.RandAugment, "trivial": v2.TrivialAugmentWide}[name]
    side, num = 40, 30_000
    wanted: dict[str, set[float]] = {}
    for key, (sizes, signed) in theirs._AUGMENTATION_SPACE.items():
        table = sizes(31, side, side)
        values = [0.0] if table is None else [table.tolist()[k] for k in levels]
        if key.startswith("Translate"):
            # Its 15.999999 in single precision is 16.
            values = [float(int(one + 1e-5)) for one in values]
        signs = (1, -1) if signed else (1,)
        wanted[ours(key)] = {
            round(in_our_units(ours(key), sign * one), 3) for one in values for sign in signs
        }
    for turn in drawn(name, num, side):
        found: dict[str, set[float]] = {}
        for operation, size in turn:
            found.setdefault(operation, set()).add(
                round(size) if operation == "posterize" else round(size, 3)
            )
        assert found == wanted
        counts = Counter(operation for operation, _ in turn)
        share = num / len(wanted)
        assert all(abs(count - share) < 5 * share**0.5 for count in counts.values())


@pytest.mark.parametrize(("side", "dataset"), [(32, "CIFAR10"), (64, "IMAGENET")])
def test_autoaugment_has_the_learned_chances(side: int, dataset: str) -> None:
    pairs = v2.AutoAugment(v2.AutoAugmentPolicy[dataset])._policies
    num = 50_000
    for place, turn in enumerate(drawn("autoaugment", num, side)):
        wanted: Counter[str] = Counter()
        for pair in pairs:
            wanted[ours(pair[place][0])] += num * pair[place][1] / len(pairs)
        found = Counter(operation for operation, _ in turn)
        del found["identity"]
        wanted = Counter({key: value for key, value in wanted.items() if value})
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert abs(found[key] - value) < 5 * value**0.5
    every = [one for turn in drawn("autoaugment", num, side) for one in turn]
    sizes = {round(size, 3) for operation, size in every if operation == "rotate"}
    levels = {level for pair in pairs for name, _, level in pair if name == "Rotate"}
    assert sizes == {round(sign * 30 * level / 9, 3) for level in levels for sign in (1, -1)}


TIMM = {
    "AutoContrast": "auto_contrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "SolarizeAdd": "solarize_add",
    "Color": "color",
    "Contrast": "contrast",
    "Brightness": "brightness",
    "Sharpness": "sharpness",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}


@pytest.mark.parametrize(
    ("name", "string"), [("timm", "rand-m7-mstd0"), ("timm increasing", "rand-m7-mstd0-inc1")]
)
def test_timms_magnitudes(name: str, string: str) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    kind, keys = SETTINGS[name]
    own = make_policy(kind, RandAugmentConfig(**keys | {"spread": 0.0}))
    assert own is not None
    side = 200
    theirs = timm.rand_augment_transform(string, {"translate_const": 100}).ops
    names = {op.name.removesuffix("Increasing"): op for op in theirs}
    assert {TIMM[key] for key in names} == {TIMM[key] for key in TIMM}
    for turn in own.turns(words(own, 20_000), side):
        for key, op in names.items():
            values = set()
            random.seed(0)
            for _ in range(50):
                level = op.level_fn(7, {"translate_pct": 0.45}) if op.level_fn else (0.0,)
                factor = side if key.startswith("Translate") else 1
                values |= {round(factor * one, 3) for one in level[:1]}
            chosen = turn.operation_B == NAMES.index(TIMM[key])
            found = {round(size, 3) for size in turn.magnitude_B[chosen].tolist()}
            assert found == values, key
            assert abs(chosen.mean() - 0.5 / 15) < 0.006
    noisy = make_policy(kind, RandAugmentConfig(**keys | {"spread": 0.5}))
    assert noisy is not None
    (turn, _) = noisy.turns(words(noisy, 20_000), side)
    degrees = np.abs(turn.magnitude_B[turn.operation_B == NAMES.index("rotate")]) / 3
    assert abs(degrees.mean() - 7) < 0.1 and abs(degrees.std() - 0.5) < 0.06


@pytest.mark.parametrize("key", TIMM)
def test_timms_pixels_within_rounding(key: str) -> None:
    """timm works on Pillow images, whose arithmetic is in whole numbers."""
    timm = pytest.importorskip("timm.data.auto_augment")
    side, fill = 48, (124, 116, 104)
    images = pictures(6, side)
    size = {"rotate": 20.0, "shear_x": 0.2, "shear_y": -0.2, "translate_x": 9.0}.get(TIMM[key], 0.6)
    size = {"posterize": 3, "solarize": 90, "solarize_add": 60, "translate_y": -9.0}.get(
        TIMM[key], size
    )
    operation = OPERATIONS[TIMM[key]]
    sizes = torch.full((6,), float(size), dtype=torch.float64)
    found = operation(images.permute(0, 3, 1, 2), sizes, Resampling("bilinear", fill))
    of = {"TranslateXRel": "TranslateX", "TranslateYRel": "TranslateY"}.get(key, key)
    call = {"TranslateX": timm.translate_x_abs, "TranslateY": timm.translate_y_abs}.get(of) or (
        timm.NAME_TO_OP[of]
    )
    arguments = () if key in ("AutoContrast", "Equalize", "Invert") else (size,)
    for n in range(6):
        picture = Image.fromarray(images[n].numpy())
        # Pillow's matrix leads from the outcome to the picture; the sign of a draw is symmetric.
        signed = tuple(-one for one in arguments) if key.startswith("Translate") else arguments
        wanted = call(picture, *signed, fillcolor=fill, resample=Image.Resampling.BILINEAR)
        difference = np.abs(found[n].permute(1, 2, 0).int().numpy() - np.asarray(wanted, np.int32))
        assert np.quantile(difference, 0.9) <= 2, key
        assert difference.mean() < 3, key


def test_an_image_looks_the_same_in_every_batch_and_in_no_other_epoch() -> None:
    own = policy("trivial")
    images = pictures(20, 32)
    whole = own.of(images, words(own, 20))
    part = own.of(images[7:9], words(own, 20)[7:9])
    assert torch.equal(part, whole[7:9])
    again = own.of(images, words(own, 20, epoch=1))
    another = own.of(images, words(own, 20, appearance=1))
    for other in (again, another):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.6


def test_the_default_strength_is_the_same_run() -> None:
    plain = AppearanceConfig(policy="randaugment")
    stated = AppearanceConfig(policy="randaugment", randaugment=RandAugmentConfig())
    assert stated == plain


def test_words_are_spread_evenly_and_not_correlated() -> None:
    found = sample_words(0, 0, POLICY, 20_000, np.arange(20_000), 6)
    numbers = (found >> np.uint64(11)) * 2.0**-53
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(6)).max() < 0.03
    neighbours = np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"policy": "trivial", "randaugment": {"magnitude": 5}}, "for augment.policy=randaugment"),
        ({"policy": "randaugment", "randaugment": {"magnitude": 31}}, "above 30, the highest"),
        (
            {"policy": "randaugment", "randaugment": {"space": "timm", "magnitude": 11}},
            "above 10, the highest",
        ),
        ({"policy": "randaugment", "randaugment": {"spread": 0.5}}, "is for timm's operations"),
        ({"interpolation": "bicubic"}, "is for augment.crop=resized"),
        ({"erasing": 1.5}, "less than or equal to 1"),
        ({"policy": "augmix"}, "none"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppearanceConfig.model_validate(keys)
