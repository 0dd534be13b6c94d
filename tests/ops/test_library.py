"""How Python hands arguments to the C++ core."""

import pytest

from fastkd.kernels._library import Arguments, entry_point


def test_fields_are_packed_by_name_in_the_order_of_the_struct() -> None:
    arguments = Arguments(rows="q", stride="2q", scale="d")
    assert arguments.num_bytes == 32
    packed = arguments.pack(scale=0.0, rows=True, stride=[2, 3])
    assert packed == b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 0))
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'scale'"):
        arguments.pack(rows=1, stride=[2, 3])


@pytest.mark.usefixtures("needs_cpp")
def test_a_struct_of_another_size_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match=r"hardness: the C\+\+ core takes 104 bytes .* packs 8; "
    ):
        entry_point("hardness", Arguments(logits="Q"))
