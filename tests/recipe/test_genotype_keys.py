"""`student.blocks` and `student.depth` from text to a recipe, and what they do not go with."""

import pytest

from fastkd.errors import UserError
from fastkd.recipe.printing import recipe_to_yaml
from fastkd.recipes.loading import load_recipe

BLOCKS = {"layer1": "G(4)", "layer3.*": "BG(2,M/8)"}


def quickstart(*overrides):
    return load_recipe("quickstart", overrides=overrides)


@pytest.mark.parametrize(
    "given",
    [
        ["student.blocks={layer1: G:4, layer3.*: BG:2:M:8}"],
        ["student.blocks.layer1=G:4", "student.blocks.layer3.*=BG:2:M:8"],
        [
            "student.blocks={layer1: G:2}",
            "student.blocks.layer1=G(4)",
            "student.blocks.layer3.*=BG(2,M/8)",
        ],
    ],
)
def test_a_map_of_blocks_is_one_value_or_an_entry_each(given):
    recipe = quickstart(*given)
    assert recipe.student.blocks == BLOCKS
    assert recipe.student.options() == {"width": 0.25, "blocks": BLOCKS}
    assert recipe.student.label == "resnet8 {layer1: G(4), layer3.*: BG(2,M/8)}"
    assert recipe.dotted()["student.blocks.layer3.*"] == "BG(2,M/8)"


def test_a_path_with_numbers_is_one_key():
    recipe = quickstart("student.blocks.layer3.0=G:4", "student.depth.layer2=1")
    assert recipe.student.blocks == {"layer3.0": "G(4)"}
    assert recipe.student.depth == {"layer2": 1}
    pairs = quickstart("losses.at.weight=1", "losses.at.pairs.layer1.0=layer1.1").losses["at"].pairs
    assert pairs == {"layer1.0": "layer1.1"}


def test_null_removes_an_entry():
    given = ["student.blocks={layer1: G:4, layer2: G:2}", "student.depth={stage1: 1, stage2: 1}"]
    student = quickstart(*given, "student.blocks.layer1=null", "student.depth.stage1=null").student
    assert (student.blocks, student.depth) == ({"layer2": "G(2)"}, {"stage2": 1})
    assert quickstart("student.blocks.a=G:4", "student.blocks.a=null").student.blocks is None


def test_a_depth_is_a_list_or_a_map():
    assert quickstart("student.depth=1,1,1").student.options()["depth"] == [1, 1, 1]
    assert quickstart("student.depth={stage2: 1}").student.depth == {"stage2": 1}
    assert quickstart("student.depth=1").student.depth == (1,)
    assert quickstart("student.depth=1,1,1").student.label == "resnet8 depth 1-1-1"
    assert quickstart("student.depth=null", "student.blocks=null").student.label == "resnet8"


def test_the_file_of_a_run_says_the_same(tmp_path):
    keys = ("student.blocks={layer1: G:4}", "student.depth=1,1,1", "teacher.blocks.stage1=B:2")
    recipe = quickstart(*keys, "teacher.depth={stage1: 1}")
    (tmp_path / "config.yaml").write_text(recipe_to_yaml(recipe))
    again = load_recipe(None, config=tmp_path / "config.yaml")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert recipe.as_teacher().student.blocks == {"stage1": "B(2)"}


def test_the_digest_follows_the_genotype_and_stays_without_one():
    digests = {
        quickstart(*keys).digest()
        for keys in (
            [],
            ["student.blocks={layer1: G:4}"],
            ["student.blocks={layer1: G:2}"],
            ["student.depth=1,1,1"],
            ["student.depth={stage1: 1}"],
            ["teacher.depth={stage1: 1}"],
        )
    }
    assert len(digests) == 6
    plain = quickstart().digest()
    assert quickstart("student.blocks=null", "student.depth=null").digest() == plain
    one, other = (
        quickstart(f"student.blocks={{{text}}}").digest()
        for text in ("layer1: G:4, layer2: G:2", "layer2: G(2), layer1: G(4)")
    )
    assert one == other


FROZEN = ("student.name=timm:resnet18", "student.pretrained=true", "student.frozen=backbone")
FINISHED = ("teacher.train=false", "teacher.name=timm:resnet18", "teacher.pretrained=true")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["student.blocks=G:4"], "student.blocks=G:4: expected a mapping such as {name: value}"),
        (["student.blocks={}"], "expected a block for each path or stage"),
        (["student.blocks={layer1: Q}"], "blocks: layer1: there is no block 'Q'"),
        (["student.blocks={a b: G:4}"], "blocks: a b is not the path of a module or stage"),
        (["student.block=G:4", "student.blocks={a: G:4}"], "block=G(4) gives every layer the same"),
        (["student.depth=0,1,1"], "student.depth=0,1,1: expected a mapping such as"),
        (["student.depth={a: x}"], "student.depth={a: x}: expected a mapping such as"),
        (["student.blocks={*: G:4}"], "a name that begins with a star needs quotes"),
        (["student.depth={layer1: 100000000000000000000}"], "at least 1"),
        (["student.depth=true"], "student.depth=true: expected a mapping such as"),
        (
            [*FROZEN, "student.width=null", "student.depth={layer1: 1}"],
            "frozen=backbone keeps the layers as they are, and depth changes them",
        ),
        (
            [*FINISHED, "teacher.width=null", "teacher.blocks={layer1: G:4}"],
            "teacher.blocks changes the published timm:resnet18, which then knows nothing: set "
            "teacher.weights",
        ),
    ],
)
def test_what_does_not_go_together_is_said(overrides, sentence):
    with pytest.raises(UserError) as refused:
        quickstart(*overrides)
    assert str(refused.value).startswith(sentence) or sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_encoder_trained_first_knows_no_stage_of_the_decoder():
    keys = ("data.root=x", "encoder.epochs=2", "student.depth={stage4: 1}")
    with pytest.raises(UserError, match=r"student\.depth speaks of the whole network"):
        load_recipe("camvid/erfnet-G:N", overrides=keys)
