"""Names of blocks: what is accepted, how it is printed, what is said of anything else."""

import pytest

from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.blocks.grammar import Block, parse_block
from fastkd.models.card import card_of

CANONICAL = {
    "S": Block(kind="S"),
    "S-2x2": Block(kind="S-2x2"),
    "G(4)": Block(kind="G", groups=4),
    "G(N/8)": Block(kind="G", group_width=8),
    "G(N)": Block(kind="G", group_width=1),
    "B(2)": Block(kind="B", squeeze=2),
    "BG(2,4)": Block(kind="BG", squeeze=2, groups=4),
    "BG(2,M/16)": Block(kind="BG", squeeze=2, group_width=16),
    "BG(4,M)": Block(kind="BG", squeeze=4, group_width=1),
}
OTHER = {
    "G:4": "G(4)",
    "G:N:8": "G(N/8)",
    "G:N": "G(N)",
    "B:2": "B(2)",
    "BG:2:4": "BG(2,4)",
    "BG:2:M:16": "BG(2,M/16)",
    "BG:4:M": "BG(4,M)",
    " BG( 2, M / 16 ) ": "BG(2,M/16)",
    "G(N/1)": "G(N)",
    "BG(4,M/1)": "BG(4,M)",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_the_papers_spelling_comes_back(text):
    assert parse_block(text) == CANONICAL[text]
    assert str(CANONICAL[text]) == text


@pytest.mark.parametrize("text", OTHER)
def test_other_spellings_mean_the_same(text):
    assert str(parse_block(text)) == OTHER[text]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("g4", "G[(]4[)], 4 groups in every layer"),
        ("G4", "G[(]N/4[)], 4 channels in every group"),
        ("G1", "G[(]N[)], 1 channels in every group"),
    ],
)
def test_columns_of_demystification_are_read_and_it_is_said_how(text, meaning):
    with pytest.warns(UserWarning, match=f"'{text}' is read as a column .*: {meaning}"):
        parse_block(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("g(4)", "G(4)"),
        ("G(M/8)", "G(N/8)"),
        ("G(N,8)", "G(N/8)"),
        ("BG(2,N/8)", "BG(2,M/8)"),
        ("BG(2/8)", "BG(2,M/8)"),
        ("s", "S"),
        ("S2x2", "S-2x2"),
        ("B2", "B(2)"),
        ("G(0)", "G(4)"),
        ("G(-4)", "G(4)"),
        ("G(N/08)", "G(N/8)"),
        ("G8B2", "BG(2,M/8)"),
        ("A8B2", "BG(2,8)"),
        ("", "S"),
    ],
)
def test_anything_else_shows_the_grammar_and_the_nearest_name(text, near):
    with pytest.raises(UserError) as error:
        parse_block(text)
    assert f"there is no block {text!r}; expected S, S-2x2, G(g), G(N/d), G(N)" in str(error.value)
    assert str(error.value).endswith(f"Nearest: {near}")


@pytest.mark.parametrize("wrong", [None, 4, ["G(4)"]])
def test_only_text_is_a_block(wrong):
    with pytest.raises(UserError, match="expected text: S, S-2x2"):
        parse_block(wrong)


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("resnet8", "G(3)", r"G\(3\): 16 channels cannot be split into 3 groups"),
        ("resnet8", "G(N/6)", r"G\(N/6\): 16 channels cannot be split into groups of 6"),
        ("resnet8", "G(N/32)", r"G\(N/32\): 16 channels cannot be split into groups of 32"),
        ("wrn_10_1", "B(3)", r"B\(3\): 16 channels cannot be divided by 3"),
        ("wrn_10_1", "BG(2,16)", r"BG\(2,16\): 8 channels cannot be split into 16 groups"),
        ("wrn_10_1", "BG(4,M/8)", r"BG\(4,M/8\): 4 channels cannot be split into groups of 8"),
    ],
)
def test_what_does_not_divide_is_said_with_both_numbers(name, block, message):
    with pytest.raises(UserError, match=message):
        create_model(name, 10, block=block)


def test_a_network_keeps_the_canonical_name():
    assert card_of(create_model("resnet8", 10, block="BG:2:M:2")).options == {"block": "BG(2,M/2)"}
