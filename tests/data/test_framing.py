"""How pictures are shown in evaluation: by the data set or by keys, never by the augmentation."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import InterpolationMode, v2

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import DataPair, open_data
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.sources.cuts import framing_cut
from fastkd.data.sources.decode import open_rgb
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.card import card_of
from fastkd.models.hub import convention
from fastkd.storage.facts import Framing

PLACEMENT = Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu"))
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SIZES = ((61, 47), (40, 90), (33, 33))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ROOT/train and ROOT/val, two classes of three pictures each, none of them square but one."""
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(3)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number, (width, height) in enumerate(SIZES):
                pixels = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
                picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                picture.save(tmp_path / "photos" / split / name / f"{number}.png")
    return tmp_path / "photos"


def opened(**keys: object) -> DataPair:
    crop = keys.pop("crop", "none")
    return open_data(
        DataConfig.model_validate(PLAIN | keys),
        AppearanceConfig.model_validate({"crop": crop, "flip": False}),
        batch_size=2,
        seed=0,
        placement=PLACEMENT,
    )


def shown(data: DataPair) -> np.ndarray:
    """The validation images as uint8 [N, H, W, 3]."""
    images = torch.cat([batch.images_NCHW for batch in data.val.epoch(0)])
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def by_torchvision(root: Path, *steps: torch.nn.Module) -> np.ndarray:
    files = sorted((root / "val").rglob("*.png"))
    return np.stack([np.asarray(v2.Compose(steps)(open_rgb(file))) for file in files])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("crop", ["pad", "none", "resized"])
def test_photographs_are_shown_alike_whatever_the_crop(photos, crop, backend):
    data = opened(name="folder", root=str(photos), image_size=28, crop=crop, backend=backend)
    # 28 * 256 / 224 = 32
    expected = by_torchvision(photos, v2.Resize(32), v2.CenterCrop(28))
    np.testing.assert_array_equal(shown(data), expected)
    assert data.facts.evaluation == Framing(resize=32, crop=28)


@pytest.mark.parametrize("crop", ["pad", "none", "resized"])
@pytest.mark.parametrize(
    ("name", "size"), [("digits", 16), ("synthetic", 32), ("synthetic", 8), ("folder", 33)]
)
def test_small_images_are_shown_whole(photos, name, size, crop):
    root = None
    if name == "folder":
        # Pictures that already have the size of the images.
        for file in photos.rglob("*.png"):
            Image.open(file).resize((33, 33)).save(file)
        root = str(photos)
    data = opened(name=name, root=root, image_size=size, crop=crop)
    plain = opened(name=name, root=root, image_size=size)
    assert data.facts.evaluation == Framing.whole(size)
    np.testing.assert_array_equal(shown(data), shown(plain))
    if name == "folder":
        np.testing.assert_array_equal(shown(data), by_torchvision(photos, v2.Identity()))


@pytest.mark.parametrize("backend", ["resident", "torch"])
@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"eval_resize": 28}, (v2.Resize(28), v2.CenterCrop(28))),
        ({"eval_crop": 35}, (v2.Resize(40), v2.CenterCrop(35))),
        (
            {"eval_resize": 30, "eval_crop": 20, "eval_interpolation": "bicubic"},
            (v2.Resize(30, InterpolationMode.BICUBIC), v2.CenterCrop(20)),
        ),
        (
            {"eval_mode": "squash", "eval_interpolation": "lanczos"},
            (v2.Resize((32, 32), InterpolationMode.LANCZOS), v2.CenterCrop(28)),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_keys_decide_where_they_are_set(photos, keys, steps, backend):
    data = opened(name="folder", root=str(photos), image_size=28, backend=backend, **keys)
    np.testing.assert_array_equal(shown(data), by_torchvision(photos, *steps))
    # The training images are as before.
    assert data.facts.image_shape == (3, 28, 28)
    assert next(data.train.epoch(0)).images_NCHW.shape == (2, 3, 28, 28)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_resize": 20}, r"eval_resize=20 is smaller than the images, .* 28 pixels: set data"),
        ({"eval_crop": 40, "eval_resize": 30}, r"eval_crop=40 does not fit .*eval_resize=30"),
    ],
)
def test_a_crop_fits_into_its_picture(photos, keys, message):
    with pytest.raises(UserError, match=message):
        opened(name="folder", root=str(photos), image_size=28, **keys)
    with pytest.raises(ValidationError, match="eval_interpolation"):
        opened(name="digits", eval_interpolation="cubic")


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "resnet50.a1_in1k", "vit_tiny_patch16_224", "test_vit", "tf_efficientnet_b4"],
)
def test_timms_convention_shows_what_timms_own_transform_shows(photos, name):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    facts = convention(f"timm:{name}")
    assert facts is not None and facts.image_size == config["input_size"][1]
    _compare(photos, config, facts.evaluation)


def test_a_convention_that_keeps_no_aspect_ratio_and_one_at_another_size(photos):
    squashed = "coat_lite_medium_384.in1k"
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(squashed).to_dict())
    facts = convention(f"timm:{squashed}")
    assert facts is not None and facts.evaluation.mode == config["crop_mode"] == "squash"
    _compare(photos, config, facts.evaluation)
    other = convention("timm:resnet50.a1_in1k", 96)
    config = resolve_data_config(
        {"img_size": 96}, timm.get_pretrained_cfg("resnet50.a1_in1k").to_dict()
    )
    _compare(photos, config, other.evaluation)


def _compare(photos: Path, config: dict, framing: Framing) -> None:
    transform = create_transform(**config | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    for file in sorted((photos / "val" / "cat").iterdir()):
        picture = open_rgb(file)
        expected = (transform(picture) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(
            np.asarray(framing_cut(picture.size, framing).of(picture)), expected
        )


def test_a_network_of_timm_carries_its_convention_and_others_do_not():
    card = card_of(create_model("timm:test_resnet", 3))
    assert card is not None and card.data == convention("timm:test_resnet")
    assert card_of(create_model("resnet8", 3)).data is None
    assert card_of(create_model("torchvision:resnet18", 3)).data is None
    for unknown in ("torchvision:resnet18", "resnet8", "timm:hf-hub:some/where", "timm:nothing"):
        assert convention(unknown) is None
