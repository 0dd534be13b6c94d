"""The planner: the rule, one answer for each case, what is kept on disk, the committed costs.

No clock is read here except by the tests that ask what a measurement leaves behind.
"""

import itertools
import json
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastkd.errors import UserError
from fastkd.models.planner import BlockSpec, Case, Choice, Chooser
from fastkd.models.planner import store as store_module
from fastkd.models.planner.costs import choose_from, committed, cost_of, replace_costs
from fastkd.models.planner.decide import LEAST_GAIN, beats, sure_winner
from fastkd.models.planner.spec import KINDS
from fastkd.models.planner.store import Store, environment

CPU = torch.device("cpu")
SPEC = BlockSpec(12, 20, groups=3)
CASE = Case(SPEC, (2, 12, 5, 7), torch.float32, CPU, training=True, batch_statistics=True)
OTHERS = [
    replace(CASE, spec=replace(SPEC, groups=12)),
    replace(CASE, spec=replace(SPEC, out_channels=8)),
    replace(CASE, spec=replace(SPEC, stride=2)),
    replace(CASE, spec=replace(SPEC, dilation=2, padding=2)),
    replace(CASE, spec=replace(SPEC, activation="relu6")),
    replace(CASE, spec=replace(SPEC, before="relu")),
    replace(CASE, spec=replace(SPEC, expand=24)),
    replace(CASE, spec=replace(SPEC, after="none")),
    replace(CASE, spec=replace(SPEC, after="relu", residual=True)),
    replace(CASE, spec=replace(SPEC, after="relu", residual=True, activate_sum=True)),
    replace(CASE, shape=(4, 12, 5, 7)),
    replace(CASE, dtype=torch.bfloat16),
    replace(CASE, training=False),
    replace(CASE, batch_statistics=False),
    replace(CASE, spec=replace(SPEC, biases=True)),
    replace(CASE, channels_last=False),
]


def samples(noise: float = 0.0, **ms: float) -> dict:
    """20 turns of each kind in seconds; one factor of noise for a whole turn, one for a sample."""
    drawn = random.Random(0)
    slow = [math.exp(drawn.gauss(0, 5 * noise)) for _ in range(20)]
    return {
        kind: [1e-3 * base * turn * math.exp(drawn.gauss(0, noise)) for turn in slow]
        for kind, base in ms.items()
    }


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTKD_PLANNER", raising=False)
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path / "cache"))
    store_module._say.cache_clear()


class Clock:
    """Counts how often it is asked; `fused` takes `ms` milliseconds, `plain` 2."""

    def __init__(self, ms: float = 1.0) -> None:
        self.ms, self.asked = ms, 0

    def __call__(self, case):
        self.asked += 1
        return samples(fused=self.ms, plain=2)


@pytest.mark.parametrize(
    ("fused", "kind"),
    # A tie changes nothing, and neither does a gain that is not worth it.
    [(1, "fused"), (1.9, "fused"), (1.99, "plain"), (2, "plain"), (3, "plain")],
)
def test_the_fused_kind_must_beat_the_plain_one(fused, kind):
    assert sure_winner(samples(plain=2, fused=fused)) == kind


def test_a_gain_within_the_noise_does_not_count():
    gain = 1 + 3 * LEAST_GAIN
    quiet, loud = (samples(noise, a=1, b=gain) for noise in (0.001, 0.3))
    assert beats(quiet["a"], quiet["b"])
    assert not beats(loud["a"], loud["b"])


def test_slow_moments_of_the_machine_do_not_decide():
    times = samples(0.004, a=1, b=1.1)
    assert max(times["a"]) > 1.01 * min(times["a"])
    assert beats(times["a"], times["b"]) and not beats(times["b"], times["a"])
    times["a"][3] *= 50
    assert beats(times["a"], times["b"])


def test_a_case_is_measured_once_and_its_choice_stays():
    clock = Clock()
    chooser = Chooser(clock, lambda device: Store(device))
    first = chooser.choose(CASE)
    assert (first.kind, first.source, clock.asked) == ("fused", "measured", 1)
    assert dict(first.ms) == pytest.approx({"fused": 1, "plain": 2})
    assert first.gain == pytest.approx(2)
    clock.ms = 9
    assert chooser.choose(replace(CASE)) is first
    # Another process finds it on the disk, whatever its own clock would say.
    again = Chooser(clock, lambda device: Store(device)).choose(CASE)
    assert (again.kind, again.source, dict(again.ms)) == ("fused", "disk", dict(first.ms))
    assert clock.asked == 1


def test_a_resumed_run_repeats_what_a_clock_has_chosen():
    clock = Clock()
    first = Chooser(clock)
    assert [first.choose(case).kind for case in (CASE, OTHERS[0])] == ["fused", "fused"]
    clock.ms = 9
    assert first.choose(OTHERS[1]).kind == "plain"
    text = first.export()
    flipped = text.replace("fused", "melted").replace("plain", "fused").replace("melted", "plain")
    resumed = Chooser(clock)
    resumed.repeat(flipped)
    found = [resumed.choose(case) for case in (CASE, *OTHERS[:2])]
    assert [one.kind for one in found] == ["plain", "plain", "fused"]
    assert {one.source for one in found} == {"run"} and clock.asked == 3
    assert json.loads(resumed.export()) == json.loads(flipped)
    resumed.repeat("{}")
    key = next(iter(json.loads(text)))
    for wrong in ("[]", "nonsense", '{"a": "fused"}', json.dumps({key: "fast"}), '{"cpu {}": "x"}'):
        with pytest.raises(UserError, match=r"kernel choices .* whose values are fused or plain"):
            resumed.repeat(wrong)


def test_only_the_choices_of_a_clock_go_into_a_checkpoint(monkeypatch):
    def clock(case):
        raise torch.OutOfMemoryError("too large")

    chooser = Chooser(clock, costs=lambda: [cost_of(CASE, {"fused": 1.0, "plain": 2.0})])
    assert chooser.choose(CASE).source == "table"
    assert chooser.export() == "{}"
    assert not Store(CPU).path.exists()
    Chooser(Clock()).choose(CASE)
    kept = Chooser(clock)
    assert kept.choose(CASE).source == "disk"
    monkeypatch.setenv("FASTKD_PLANNER", "table")
    kept.choose(OTHERS[0])
    assert list(json.loads(kept.export()).values()) == ["fused"]


def test_so_many_sizes_are_measured_and_others_take_the_nearest():
    clock = Clock()
    chooser = Chooser(clock)
    sizes = [2**power for power in range(1, 9)]
    for num in sizes:
        clock.ms = 1 if num < 100 else 3
        chooser.choose(replace(CASE, shape=(num, 12, 5, 7)))
    assert clock.asked == len(sizes) == 8
    saved = chooser.export()
    resumed = Chooser(clock)
    resumed.repeat(saved)
    for one in (chooser, resumed):
        for num, kind in ((3, "fused"), (80, "fused"), (120, "plain"), (5000, "plain")):
            near = one.choose(replace(CASE, shape=(num, 12, 5, 7)))
            assert (near.kind, near.source) == (kind, "near")
        # Images that are larger by as much count alike.
        assert one.choose(replace(CASE, shape=(1, 12, 500, 700))).kind == "plain"
        assert one.export() == saved
    assert clock.asked == 8
    assert chooser.choose(OTHERS[0]).source == "measured"


def test_every_part_of_a_case_is_part_of_the_key(tmp_path):
    cases = [CASE, *OTHERS]
    assert len({case.key for case in cases}) == len(cases)
    store = Store(CPU, tmp_path)
    store.put(CASE, Choice("fused", dict.fromkeys(KINDS, 1.0)))
    assert store.get(replace(CASE)) is not None
    assert [store.get(case) for case in OTHERS] == [None] * len(OTHERS)


FACTS = ["device", "instructions", "threads", "torch", "kernels", "deterministic"]
FACTS += ["mkldnn", "fp32"]


@pytest.mark.parametrize("fact", FACTS)
def test_another_machine_or_installation_has_another_file(fact, monkeypatch, tmp_path):
    facts = environment(CPU)
    assert set(facts) == set(FACTS)
    before = Store(CPU, tmp_path).path
    assert Store(CPU, tmp_path).path == before
    monkeypatch.setattr(store_module, "environment", lambda device: facts | {fact: "other"})
    assert Store(CPU, tmp_path).path != before


def test_the_environment_follows_threads_and_kernels(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    before = environment(CPU)
    try:
        torch.set_num_threads(threads + 1)
        assert environment(CPU)["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert environment(CPU) == before
    (tmp_path / "grouped_pointwise").mkdir()
    monkeypatch.setattr(store_module.fastkd.kernels, "__file__", str(tmp_path / "__init__.py"))
    digests = []
    for text in ("one", "two"):
        (tmp_path / "grouped_pointwise" / "op.py").write_text(text)
        store_module._kernels_digest.cache_clear()
        digests.append(environment(CPU)["kernels"])
    store_module._kernels_digest.cache_clear()
    assert len({before["kernels"], *digests}) == 3


def test_the_environment_follows_the_settings_of_torch():
    before = environment(CPU)
    torch.use_deterministic_algorithms(True)
    try:
        changed = environment(CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert {name for name in FACTS if changed[name] != before[name]} == {"deterministic"}
    with torch.backends.mkldnn.flags(enabled=False):
        changed = environment(CPU)
    assert {name for name in FACTS if changed[name] != before[name]} == {"mkldnn"}
    gpu = store_module._gpu_settings()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True):
        changed = store_module._gpu_settings()
    names = {name for name in gpu if changed[name] != gpu[name]}
    assert {"cudnn benchmark", "cudnn deterministic"} <= names
    assert {"cudnn", "fp32", "triton"} <= set(gpu)


def test_entries_of_other_processes_are_kept(tmp_path):
    one, other = Store(CPU, tmp_path), Store(CPU, tmp_path)
    one.put(CASE, Choice("fused", dict.fromkeys(KINDS, 1.0)))
    other.put(OTHERS[0], Choice("plain", dict.fromkeys(KINDS, 2.0)))
    assert [one.get(case).kind for case in (CASE, OTHERS[0])] == ["fused", "plain"]
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "list": lambda text: "[]",
    "format": lambda text: text.replace('"format": 1', '"format": 0'),
    "kind": lambda text: text.replace('"fused",', '"melted",'),
    "negative": lambda text: text.replace("1.0", "-1.0"),
    "words": lambda text: text.replace("1.0", '"1.0"'),
    "nan": lambda text: text.replace("1.0", "NaN"),
    "other machine": lambda text: text.replace('"threads": ', '"threads": 9'),
    "not text": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_again_and_said_once(damage, tmp_path):
    store, clock = Store(CPU, tmp_path), Clock()
    store.put(CASE, Choice("fused", dict.fromkeys(KINDS, 1.0)))
    text = store.path.read_text()
    damaged = DAMAGE[damage](text)
    assert damaged != text
    store.path.write_bytes(damaged.encode(errors="surrogateescape"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chooser = Chooser(clock, lambda device: Store(device, tmp_path))
        assert chooser.choose(CASE).source == "measured"
        chooser.choose(OTHERS[0])
    assert [str(one.message) for one in said] == [
        f"{store.path} is damaged; its times of blocks are measured again"
    ]
    assert clock.asked == 2
    assert Store(CPU, tmp_path).get(CASE) is not None


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    clock = Clock()
    chooser = Chooser(clock, lambda device: Store(device, tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="not kept, every run measures them: .*FASTKD_CACHE") as w:
        assert chooser.choose(CASE).kind == chooser.choose(OTHERS[0]).kind == "fused"
    assert len(w) == 1
    assert chooser.choose(CASE).source == "measured"
    assert clock.asked == 2


def test_where_measuring_is_off_every_block_without_costs_stays_plain(monkeypatch):
    """README.md says of which machines there are some."""
    monkeypatch.setenv("FASTKD_PLANNER", "table")
    assert {cost.device for cost in committed()} == {"avx2"}
    choices = [Chooser(Clock(), costs=lambda: ()).choose(case) for case in (CASE, *OTHERS)]
    assert {(choice.kind, choice.source) for choice in choices} == {("plain", "default")}


def test_where_measuring_is_off_the_committed_costs_decide(monkeypatch):
    monkeypatch.setenv("FASTKD_PLANNER", "table")
    clock = Clock()
    costs = [cost_of(CASE, {"fused": 1.0, "plain": 2.0})]
    choice = Chooser(clock, costs=lambda: costs).choose(CASE)
    assert (choice.kind, choice.source, choice.gain) == ("fused", "table", 1.0)
    assert clock.asked == 0
    monkeypatch.setenv("FASTKD_PLANNER", "guess")
    with pytest.raises(UserError, match="FASTKD_PLANNER=guess: expected measure or table"):
        Chooser(clock).choose(CASE)


def test_the_nearest_costs_decide_and_far_ones_say_nothing():
    near = replace(CASE, shape=(4, 12, 5, 7))
    rows = [
        cost_of(CASE, {"fused": 1.0, "plain": 2.0}),
        cost_of(
            replace(CASE, shape=(64, 12, 5, 7)),
            {"fused": 2.0, "plain": 1.0},
        ),
    ]
    assert choose_from(rows, near).kind == "fused"
    assert choose_from(rows, replace(CASE, shape=(32, 12, 5, 7))).kind == "plain"
    for other in (
        replace(CASE, dtype=torch.bfloat16),
        replace(CASE, training=False),
        replace(CASE, batch_statistics=False),
        replace(CASE, spec=replace(SPEC, stride=2)),
        replace(CASE, spec=replace(SPEC, groups=12)),
    ):
        found = choose_from(rows, other)
        assert (found.kind, found.source) == ("plain", "default")
    assert choose_from([], replace(CASE, channels_last=False)).kind == "plain"


def test_a_small_gain_of_another_case_is_no_reason_to_change():
    ms = {"fused": 0.95, "plain": 1.0}
    assert choose_from([cost_of(CASE, ms)], CASE).kind == "plain"


def test_costs_are_written_one_a_line_and_replaced(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text("[]\n")
    ms = {"fused": 1.0, "plain": 2.0}
    replace_costs([cost_of(CASE, ms), cost_of(OTHERS[0], ms)], file)
    replace_costs([cost_of(CASE, ms | {"fused": 5.00004})], file)
    rows = json.loads(file.read_text())
    assert sorted(row["ms"]["fused"] for row in rows) == [1.0, 5.0]
    assert len(file.read_text().splitlines()) == 4
    assert all(set(row.ms) == set(KINDS) for row in committed())


def test_nothing_is_measured_while_torch_only_traces_or_counts():
    from torch.utils.flop_counter import FlopCounterMode

    clock = Clock()
    chooser = Chooser(clock, costs=lambda: [])
    with FlopCounterMode(display=False):
        assert chooser.choose(CASE).source == "default"
    meta = replace(CASE, device=torch.device("meta"))
    assert chooser.choose(meta).kind == "plain"
    assert clock.asked == 0
    # That was no choice for good.
    assert chooser.choose(CASE).source == "measured"


def test_memory_that_does_not_suffice_leaves_it_to_the_costs():
    def clock(case):
        raise torch.OutOfMemoryError("too large")

    assert Chooser(clock, costs=lambda: []).choose(CASE).kind == "plain"


def test_names_of_blocks_are_readable():
    assert str(SPEC) == "12 -> 4 a group -> 20"
    wide = replace(SPEC, expand=24, groups=24, stride=2, after="none", residual=True)
    assert str(wide) == "12 -> 1x1 -> 24 -> 1 a group -> 20, stride 2, residual"
    assert SPEC.geometry.out_size(7) == 7 and wide.geometry.out_size(7) == 4
    assert all(str(one.spec) for one in itertools.chain([CASE], OTHERS))
    assert Path(Store(CPU).path).name.startswith("block-times-")
