"""Genotypes: a block for each layer, fewer blocks in a stage; names, numbers, weights, errors."""

import warnings

import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import (
    Tapped,
    cheapen,
    count,
    create_model,
    kernels_report,
    model_from_file,
    remove_shortcuts,
    shorten,
)
from fastkd.models.blocks.genotype import genotype_in_words
from fastkd.models.blocks.layers import Bottleneck, GroupedPointwise
from fastkd.models.card import card_of
from fastkd.models.registry import without_memory
from fastkd.storage.description import NetworkFacts, describe, keys_in_words, options_in_words
from fastkd.storage.weights import save_weights

GENOTYPE = {"blocks": {"layer1": "G(4)", "stage3.1": "BG(2,M)"}, "depth": [2, 1, 2]}

UNIFORM = {
    "wrn_16_2": ("G(4)", "BG(2,M)", "B(2)", "S-2x2"),
    "resnet20": ("G(4)", "BG(2,M/8)"),
    "resnet8x4": ("G(N/8)", "B(4)"),
    "resnet18": ("G(N)", "BG(2,4)"),
    "plain18": ("G(4)", "B(2)"),
    "resnet50": ("G(4)",),
    "vgg8": ("G(N)", "B(2)"),
    "mobilenetv2": ("S", "G(4)", "G(N)"),
    "mobilenetv2_half": ("G(N/4)",),
    "erfnet": ("G(N)", "BG(2,4)"),
    "timm:resnet18": ("G(4)", "BG(2,M)"),
    "torchvision:resnet50": ("G(N)",),
    "timm:vgg11_bn": ("G(4)",),
}


def size_of(name, shape=(3, 64, 64), **options):
    counted = count(without_memory(name, 10, **options), shape)
    return counted.params, counted.macs


def what(sentence):
    return pytest.raises(UserError, match=sentence)


@pytest.mark.parametrize("name", UNIFORM)
def test_the_same_block_everywhere_is_the_uniform_network_to_the_digit(name):
    for block in UNIFORM[name]:
        whole, mapped = (
            without_memory(name, 10, **one) for one in ({"block": block}, {"blocks": {"*": block}})
        )
        sizes = [{k: v.shape for k, v in each.state_dict().items()} for each in (whole, mapped)]
        assert sizes[0] == sizes[1]
        counted = [count(each, (3, 64, 64)) for each in (whole, mapped)]
        assert counted[0] == counted[1]


def test_every_layer_has_the_block_of_its_own():
    """The sizes of Moonshine's table 1, written out, for a block of each kind in each stage."""

    def conv(kind, cin, cout):
        if kind == "S":
            return 9 * cin * cout
        if kind == "G(4)":
            return 9 * cin * cin // 4 + 2 * cin + cin * cout
        return 9 * cin + 2 * cin + cin * cout  # G(N)

    def block(kind, cin, cout):
        norms = 2 * cin + (0 if kind == "B(2)" else 2 * cout)
        shortcut = cin * cout if cin != cout else 0
        if kind == "B(2)":
            half = cout // 2
            return norms + shortcut + cin * half + 2 * half + 9 * half**2 + 2 * half + half * cout
        return norms + shortcut + conv(kind, cin, cout) + conv(kind, cout, cout)

    stages = ((16, 32), (32, 64), (64, 128))
    kinds = (("G(4)", "S"), ("B(2)", "B(2)"), ("G(N)", "G(4)"))
    expected = 27 * 16 + 2 * 128 + 128 * 10 + 10
    for (cin, cout), (first, second) in zip(stages, kinds, strict=True):
        expected += block(first, cin, cout) + block(second, cout, cout)
    blocks = {
        "layer1": "G:4",
        "layer1.1": "S",
        "stage2": "B:2",
        "layer3.*": "G:4",
        "stage3.0": "G:N",
    }
    assert size_of("wrn_16_2", blocks=blocks)[0] == expected


@pytest.mark.parametrize(
    ("long", "depth", "short"),
    [
        ("wrn_40_2", [1, 1, 1], "wrn_10_2"),
        ("wrn_40_2", {"stage1": 2, "layer2": 2, "stage3": 2}, "wrn_16_2"),
        ("resnet56", [3, 3, 3], "resnet20"),
        ("resnet32x4", [1, 1, 1], "resnet8x4"),
        ("resnet34", [2, 2, 2, 2], "resnet18"),
        ("plain34", [2, 2, 2, 2], "plain18"),
        ("timm:resnet34", [2, 2, 2, 2], "timm:resnet18"),
        ("torchvision:resnet101", {"layer3": 6}, "torchvision:resnet50"),
    ],
)
@pytest.mark.parametrize("block", [None, "G(4)"])
def test_a_shortened_network_is_the_shallow_one_of_the_paper(long, depth, short, block):
    options = {"block": block} if block else {}
    made = without_memory(long, 10, depth=depth, **options)
    other = without_memory(short, 10, **options)
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (made, other)]
    assert shapes[0] == shapes[1]
    assert count(made, (3, 64, 64)) == count(other, (3, 64, 64))


BYPASSED = {
    "resnet20": [1, 2, 3],
    "wrn_16_2": {"stage2": 1},
    "mobilenetv2_half": {"blocks.3": 2, "stage2": 1},
    "shufflenetv1": [2, 1, 4],
    "shufflenetv2": [1, 3, 2],
    "erfnet": [2, 1, 3, 1, 1],
    "timm:resnet18": {"layer2": 1, "layer4": 1},
    "timm:resnet26": [1, 2, 1, 2],
    "timm:mobilenetv2_100": {"blocks.2": 1, "blocks.5": 2},
    "timm:regnety_002": {"s4": 3},
    "timm:vit_tiny_patch16_224": [4],
    "timm:convnext_atto": [1, 2, 1, 1],
    "timm:swin_tiny_patch4_window7_224": {"layers.2.blocks": 2},
    "timm:efficientnet_b0": {"blocks.3": 2},
    "torchvision:resnet18": [1, 1, 2, 1],
    "torchvision:mobilenet_v2": {"features": 17},
    "torchvision:regnet_y_400mf": {"trunk_output.block4": 2},
    "torchvision:convnext_tiny": {"features.5": 2},
    "torchvision:vit_b_32": {"encoder.layers": 3},
}


@pytest.mark.parametrize("name", BYPASSED)
def test_it_computes_what_the_network_computes_around_the_blocks_that_are_left_out(name):
    torch.manual_seed(0)
    whole = create_model(name, 10)
    short = shorten(whole, BYPASSED[name])
    gone = short.rewrite_report.changed
    assert bool(gone) is not name.endswith("mobilenet_v2")
    side = 224 if "vit" in name or "swin" in name else 64
    images_NCHW = torch.randn(2, 3, side, side)
    for path in gone:
        # The zoo runs the last block of a stage by another method, or by its parts.
        block = whole.get_submodule(path)
        block.forward = lambda x, *_: x
        block.preact = block.forward
        block.after_bn1 = block.forward
    whole.eval(), short.eval()
    with torch.no_grad():
        ours, truth = short(images_NCHW), whole(images_NCHW)
    assert ours.shape == truth.shape
    if name != "shufflenetv2":  # which interleaves the channels behind the last block of a stage
        assert torch.equal(ours, truth)
    assert short.state_dict().keys() <= whole.state_dict().keys()
    assert card_of(short).options == {"depth": BYPASSED[name]}


@pytest.mark.parametrize("name", ["wrn_16_2", "resnet20", "mobilenetv2_half", "erfnet", "resnet18"])
def test_a_short_network_keeps_all_taps(name):
    whole = create_model(name, 10).eval()
    stages = whole.stage_paths()
    least = {"mobilenetv2_half": [2, 1, 5, 4]}.get(name, [1] * len(stages))
    short = create_model(name, 10, depth=least).eval()
    images_NCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = [Tapped(one, one.tap_names)(images_NCHW) for one in (whole, short)]
    assert [(tap, value.shape) for tap, value in found[0].items()] == [
        (tap, value.shape) for tap, value in found[1].items()
    ]
    for tap in short.tap_names[:-1]:
        if ":" not in tap:
            after = short.forward_between(found[1][tap], tap, "logits")
            assert torch.allclose(after, found[1]["logits"], atol=1e-5)


def test_patterns_name_stages_modules_and_single_convolutions():
    def kinds(name="wrn_16_2", **blocks):
        model = without_memory(name, 10, blocks=dict(blocks.get("of") or blocks))
        return {
            path: type(one).__name__
            for path, one in model.named_modules()
            if isinstance(one, GroupedPointwise | Bottleneck)
        }

    assert list(kinds(stage2="G:4")) == [f"layer2.{n}.conv{k}" for n in "01" for k in "12"]
    assert list(kinds(of={"*.conv2": "G:4"})) == [
        f"layer{n}.{k}.conv2" for n in "123" for k in "01"
    ]
    assert list(kinds(of={"layer?.1": "B:2"})) == [f"layer{n}.1.conv1" for n in "123"]
    # A block of which a part gets something else: each convolution alone.
    mixed = kinds(of={"layer1.0": "B:2", "layer1.0.conv2": "G:4"})
    assert mixed == {"layer1.0.conv1": "Bottleneck", "layer1.0.conv2": "GroupedPointwise"}
    assert kinds(of={"conv1": "B:2"}) == {"conv1": "Bottleneck"}  # the stem, by its name
    assert list(kinds("erfnet", of={"stage2.1": "G:4"})) == ["layers.9.pair1", "layers.9.pair2"]
    assert list(kinds("timm:resnet18", of={"layer2.*": "G:4"})) == [
        f"layer2.{n}.conv{k}" for n in "01" for k in "12"
    ]
    assert len(kinds("timm:mobilenetv2_100", of={"blocks.1.0.conv_dw": "G:N"})) == 1


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "wrn_16_2",
            {"blocks": {"layer9": "G:4"}},
            "layer9 names nothing in wrn_16_2: it has stage1",
        ),
        ("wrn_16_2", {"blocks": {"layr1": "G:4"}}, "nearest: layer1"),
        ("wrn_16_2", {"blocks": {"layer1.0.bn1": "G:4"}}, "layer1.0.bn1 names no convolution"),
        ("wrn_16_2", {"blocks": {"layer1": "G:4", "stage1": "G:2"}}, "layer1 and stage1 both name"),
        ("wrn_16_2", {"blocks": {"layer1": "G:4", "*.conv2": "S"}}, "give layer1.0.conv2 an entry"),
        ("wrn_16_2", {"blocks": {"layer1": "G:5"}}, "layer1.0: block G.5.: 16 channels cannot be"),
        ("wrn_16_2", {"blocks": {"layer1": "Q"}}, "blocks: layer1: there is no block 'Q'"),
        ("wrn_16_2", {"blocks": {}}, "expected a block for each path or stage"),
        ("wrn_16_2", {"blocks": "G:4"}, "expected a block for each path or stage"),
        ("wrn_16_2", {"blocks": {3: "G:4"}}, "3 is not the path of a module"),
        ("wrn_16_2", {"block": "G:4", "blocks": {"layer1": "S"}}, "block and blocks exclude each"),
        ("wrn_16_2", {"depth": [1, 2, 1], "blocks": {"layer3.1": "G:4"}}, "of depth 1-2-1"),
        (
            "shufflenetv2",
            {"blocks": {"layer1": "G:4"}},
            "nothing that layer1 names .* depthwise alr",
        ),
        (
            "timm:resnet18",
            {"blocks": {"layer1": "G:5"}},
            "nothing that layer1 .* become G.5.: 4 x bl",
        ),
        (
            "timm:resnet18",
            {"blocks": {"layer2.0.conv1": "G:7"}},
            "layer2.0.conv1: block G.7.: 64 ch",
        ),
        ("wrn_16_2", {"depth": [1, 2]}, r"has 3 stages .stage1: 2, stage2: 2, stage3: 2.; give a"),
        (
            "wrn_16_2",
            {"depth": {"layer2": 3}},
            "layer2 of wrn_16_2 has 2 residual blocks, 3 cannot",
        ),
        ("wrn_16_2", {"depth": {"layer4": 1}}, "layer4 names no stage of wrn_16_2"),
        ("wrn_16_2", {"depth": {"layer2.1": 1}}, "layer2.1 names no stage of wrn_16_2"),
        ("wrn_16_2", {"depth": {"layer2": 1, "stage2": 1}}, "both name layer2.0"),
        ("wrn_16_2", {"depth": [0, 1, 1]}, "at least 1"),
        ("wrn_16_2", {"depth": {"layer2": True}}, "at least 1"),
        ("wrn_16_2", {"depth": 3}, "expected how many residual blocks a stage keeps"),
        ("mobilenetv2", {"depth": {"stage3": 4}}, "blocks.4.0 of mobilenetv2 changes the shape"),
        ("vgg8", {"depth": [1]}, "vgg8 has no residual blocks"),
        ("timm:vgg11", {"depth": {"features": 1}}, "timm:vgg11 has no residual blocks"),
        ("timm:resnet18", {"depth": {"layer1.0": 1}}, "it has layer1: 2, layer2: 2"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(name, options, sentence):
    with what(sentence):
        without_memory(name, 10, **options)


def test_what_no_pattern_names_keeps_its_block():
    # The groups of mobilenetv2 are its own, depthwise.
    mixed = without_memory("mobilenetv2", 10, blocks={"stage1": "S"})
    assert mixed.blocks[0][0].conv[3].groups == 1
    assert mixed.blocks[2][0].conv[3].groups == mixed.blocks[2][0].conv[3].in_channels


def test_the_weights_of_what_stays_are_those_of_the_network():
    whole = create_model("resnet20", 10)
    cheap = cheapen(whole, blocks={"layer1.0": "G:4"})
    changed = [k for k in cheap.state_dict() if k not in whole.state_dict()]
    assert changed
    assert all(key.startswith("layer1.0.conv") for key in changed)
    for key, value in whole.state_dict().items():
        if key in cheap.state_dict():
            assert torch.equal(value, cheap.state_dict()[key]), key
    assert card_of(whole).options == {}
    assert card_of(cheap).options == {"blocks": {"layer1.0": "G(4)"}}


@pytest.mark.parametrize("options", [{"width": 0.5}, {}, {"shortcuts": False}])
def test_a_file_rebuilds_the_genotype(options, tmp_path):
    name = "resnet20"
    blocks = {"layer1.*": "G(2)", "stage2.1": "BG(2,M)"}
    model = create_model(name, 7, blocks=blocks, depth={"stage3": 2}, **options).eval()
    save_weights(tmp_path / "a.safetensors", model)
    images_NCHW = torch.randn(2, 3, 32, 32)
    for again in (
        model_from_file(tmp_path / "a.safetensors"),
        create_model(name, weights=tmp_path / "a.safetensors"),
        create_model(name, 7, weights=tmp_path / "a.safetensors", depth={"stage3": 2}),
    ):
        assert torch.equal(again.eval()(images_NCHW), model(images_NCHW))
        assert card_of(again).options == card_of(model).options
        assert card_of(again).unlearned == ()
    facts = NetworkFacts.from_metadata(describe(model))
    assert facts.options["blocks"] == blocks
    assert facts.options["depth"] == {"stage3": 2}


def test_a_file_of_a_network_of_timm_rebuilds_its_genotype(tmp_path):
    options = {"blocks": {"layer1": "G(4)"}, "depth": {"layer2": 1}, "shortcuts": "projection"}
    model = create_model("timm:resnet18", 10, **options).eval()
    save_weights(tmp_path / "a.safetensors", model)
    again = model_from_file(tmp_path / "a.safetensors").eval()
    images_NCHW = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images_NCHW), model(images_NCHW))


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("form", [{"depth": [2, 1, 2]}, {"blocks": GENOTYPE["blocks"]}, GENOTYPE])
def test_weights_of_the_whole_network_fill_what_is_left_of_it(described, form, tmp_path):
    torch.manual_seed(0)
    whole = create_model("wrn_16_2", 10)
    file = tmp_path / ("a.safetensors" if described else "a.pt")
    save_weights(file, whole) if described else torch.save(whole.state_dict(), file)
    keys = " and ".join(key for key in ("depth", "blocks") if key in form)
    said = (
        f"holds the whole wrn_16_2: .* with {keys} it is another network, which has to be trained"
    )
    with pytest.warns(UserWarning, match=said):
        made = create_model("wrn_16_2", 10, weights=file, **form)
    assert card_of(made).unlearned == tuple(key for key in ("depth", "blocks") if key in form)
    given, own = whole.state_dict(), made.state_dict()
    same = [k for k in own if k in given and torch.equal(own[k], given[k])]
    missing = [k for k in own if k not in same and "num_batches" not in k]
    assert all(k.startswith(("layer1.", "layer3.1.")) for k in missing)
    assert bool(missing) is ("blocks" in form)
    assert "fc.weight" in same
    with pytest.warns(UserWarning, match="holds the whole"):
        other = create_model("wrn_16_2", 3, weights=file, new_head=True, **form)
    assert other.fc.out_features == 3
    assert torch.equal(other.conv1.weight, whole.conv1.weight)


def test_weights_of_another_genotype_are_refused_with_the_keys_to_set(tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "a.safetensors", create_model("wrn_16_2", 10, **GENOTYPE))
    save_weights(tmp_path / "b.safetensors", create_model("wrn_16_2", 10, block="G:4"))
    with what(r"set blocks='\{layer1: G:4, stage3.1: BG:2:M\}'"):
        create_model("wrn_16_2", 10, weights=tmp_path / "a.safetensors", blocks={"layer1": "G:2"})
    with what("holds wrn_16_2 with block=G.4., this one has blocks="):
        create_model("wrn_16_2", 10, weights=tmp_path / "b.safetensors", blocks={"layer1": "G:2"})
    with pytest.warns(UserWarning, match="holds the whole wrn_16_2: 107 of 107"):
        short = create_model("wrn_16_2", 10, weights=tmp_path / "b.safetensors", depth=[2, 1, 1])
    assert card_of(short).options == {"block": "G(4)", "depth": [2, 1, 1]}
    save_weights(tmp_path / "c.safetensors", create_model("wrn_16_2", 10, depth=[2, 1, 1]))
    with pytest.warns(UserWarning, match="holds the whole wrn_16_2 depth 2-1-1: .* with blocks it"):
        create_model("wrn_16_2", 10, weights=tmp_path / "c.safetensors", blocks={"layer1": "G:2"})


def test_pretrained_weights_stay_in_what_is_not_changed(monkeypatch):
    import timm

    torch.manual_seed(0)
    state = timm.create_model("resnet18", num_classes=10).state_dict()

    def build(name, pretrained, **options):
        model = real(name, False, **options)
        model.load_state_dict(state)
        return model

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", build)
    made = create_model(
        "timm:resnet18.tv_in1k", 10, pretrained=True, blocks={"layer1": "G:4"}, depth={"layer4": 1}
    )
    assert torch.equal(made.layer2[1].conv2.weight, state["layer2.1.conv2.weight"])
    assert card_of(made).unlearned == ("depth", "blocks")


def test_rewrites_of_a_genotype_keep_a_name_only_where_it_can_be_built_again():
    blocks = {"layer1": "G(4)"}
    cheap = cheapen(create_model("resnet20", 10), blocks=blocks)
    for made in (cheapen(cheap, "G:2"), cheapen(cheap, blocks=blocks), shorten(cheap, [1, 1, 1])):
        assert card_of(made).name is None
    bare = remove_shortcuts(cheap)
    assert card_of(bare).options == {"blocks": blocks, "shortcuts": False}
    again = create_model("resnet20", 10, **card_of(bare).options)
    assert again.state_dict().keys() == bare.state_dict().keys()
    both = cheapen(shorten(create_model("resnet20", 10), [1, 2, 3]), blocks=blocks)
    assert card_of(both).options == {"depth": [1, 2, 3], "blocks": blocks}


@pytest.mark.parametrize("wrong", [{}, {"block": "S", "blocks": {}}, {"where": "a", "blocks": {}}])
def test_cheapen_takes_a_block_or_a_map(wrong):
    with what("give block='G.4.', perhaps with where=PATTERN, or blocks="):
        cheapen(create_model("resnet20", 10), **wrong)


def test_each_layer_has_its_fused_op():
    blocks = {"layer1": "G(4)", "layer3": "BG(2,M)"}
    model = create_model("wrn_16_2", 10, blocks=blocks, kernels="fused").eval()
    found = kernels_report(model).changed
    assert {path.partition(".")[0] for path in found} == {"layer1", "layer3"}
    images_NCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = model(images_NCHW)
        plain = create_model("wrn_16_2", 10, blocks=blocks).eval()
        plain.load_state_dict(model.state_dict())
        assert torch.allclose(fused, plain(images_NCHW), atol=1e-4)


def test_a_genotype_in_words():
    blocks = {f"layer{n}": "G(4)" for n in range(1, 6)}
    assert genotype_in_words(None, None) == ""
    assert genotype_in_words({"layer1": "G(4)"}, [5, 3, 5]) == "{layer1: G(4)} depth 5-3-5"
    assert genotype_in_words(None, {"stage2": 3}) == "depth {stage2: 3}"
    long = genotype_in_words(blocks, None)
    assert long.startswith("{layer1: G(4), layer2: G(4), .. 3 more, ")
    assert len(long) < 60
    assert long != genotype_in_words(blocks | {"layer5": "G(2)"}, None)
    options = {"blocks": {"*.conv1": "BG(2,M/8)"}, "depth": [1, 2]}
    assert options_in_words(options) == "blocks={*.conv1: BG(2,M/8)}, depth=1,2"
    assert keys_in_words(options) == "blocks='{\"*.conv1\": BG:2:M:8}' depth=1,2"


def test_a_map_of_many_layers_fits_into_a_file(tmp_path):
    model = create_model("wrn_40_2", 10)
    convs = [p for p, one in model.named_modules() if isinstance(one, nn.Conv2d) and ".conv" in p]
    blocks = {path: "G(4)" for path in convs} | {f"layer{n}": "S" for n in "123"}
    blocks |= {f"layer{n}.{k}": "S" for n in "123" for k in range(6)}
    blocks |= {f"layer{n}.{k}.*": "S" for n in "123" for k in range(6)}
    assert len(blocks) > 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = create_model("wrn_40_2", 10, blocks=blocks)
        save_weights(tmp_path / "a.safetensors", made)
        again = model_from_file(tmp_path / "a.safetensors")
    assert card_of(again).options == {"blocks": blocks}
    assert count(again, (3, 32, 32)).params == size_of("wrn_40_2", block="G(4)")[0]
