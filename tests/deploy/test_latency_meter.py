"""The steady rule, the percentiles and the facts of the machine, without a real clock."""

import gc
import itertools
import json

import numpy as np
import pytest

from fastkd.deploy.latency.host import Neighbours, caveats, machine
from fastkd.deploy.latency.meter import MOST_SAMPLES, Rule, Timing, percentiles, time_calls


class Fake:
    """A clock that a call moves; its calls take what a list says, the last one forever."""

    def __init__(self, seconds):
        self.now, self.calls, self.seconds = 100.0, 0, list(seconds)

    def clock(self):
        return self.now

    def call(self):
        self.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


def timed(durations, **rule):
    fake = Fake(durations)
    found = time_calls(fake.call, Rule(**rule), fake.clock)
    assert fake.calls == found.warm_up_calls + len(found.seconds)
    return found


def test_two_windows_that_agree_end_the_warm_up():
    found = timed([1.0], window_calls=4, window_s=0, calls=10, seconds=0, warm_up_s=100)
    assert (found.warm_up_calls, found.warm_up_s, found.steady) == (8, 8.0, True)
    assert found.seconds == [1.0] * 10


def test_the_warm_up_lasts_while_calls_get_faster():
    # Medians of windows of two: 9, 5, 3, 2.99, of which the last two agree within 2 %.
    seconds = [9, 9, 5, 5, 3, 3, 2.99, 2.99]
    found = timed(seconds, window_calls=2, window_s=0, calls=3, seconds=0, warm_up_s=1000)
    assert (found.warm_up_calls, found.steady) == (8, True)
    assert found.seconds == pytest.approx([2.99] * 3)


@pytest.mark.parametrize(("second", "windows"), [(1.0199, 2), (0.9801, 2), (1.021, 3)])
def test_the_tolerance_is_a_share_of_the_window_before(second, windows):
    seconds = [1.0, second]
    found = timed(seconds, window_calls=1, window_s=0, calls=1, seconds=0, warm_up_s=1000)
    assert found.warm_up_calls == windows


def test_one_slow_call_does_not_make_a_window_unsteady():
    seconds = [1, 1, 50, 1, 1, 1, 1, 1, 1, 1]
    found = timed(seconds, window_calls=5, window_s=0, calls=1, seconds=0, warm_up_s=1000)
    assert (found.warm_up_calls, found.steady) == (10, True)


def test_short_calls_fill_a_window_of_time():
    found = timed([1e-3], window_calls=5, window_s=0.1, calls=50, seconds=1.0)
    assert found.warm_up_calls == pytest.approx(200, abs=2)
    assert len(found.seconds) == pytest.approx(1000, abs=2)


def test_what_never_gets_steady_is_timed_and_says_so():
    seconds = itertools.islice(itertools.cycle([1.0, 2.0]), 1000)
    found = timed(seconds, window_calls=1, window_s=0, calls=4, seconds=0, warm_up_s=30)
    assert found.steady is False
    assert found.warm_up_s == pytest.approx(30, abs=2)
    assert len(found.seconds) == 4


def test_a_call_longer_than_the_limit_is_warmed_up_once():
    found = timed([40.0], window_calls=2, window_s=0, calls=2, seconds=0, warm_up_s=10)
    assert (found.warm_up_calls, found.steady, len(found.seconds)) == (2, False, 2)


def test_a_clock_that_stands_still_ends(monkeypatch):
    monkeypatch.setattr("fastkd.deploy.latency.meter.MOST_SAMPLES", 7)
    assert MOST_SAMPLES > 10**5
    found = timed([0.0], window_calls=2, window_s=1.0, calls=3, seconds=1.0)
    assert found.steady and len(found.seconds) == 7


def test_the_collector_rests_and_works_again():
    seen = []
    time_calls(lambda: seen.append(gc.isenabled()), Rule(2, 0.0, calls=2, seconds=0, warm_up_s=1))
    assert seen and not any(seen)
    assert gc.isenabled()
    with pytest.raises(KeyError):
        time_calls(lambda: {}["none"], Rule())
    assert gc.isenabled()


@pytest.mark.parametrize("number", [1, 2, 3, 10, 11, 57])
def test_percentiles_are_numpys(number):
    seconds = np.random.default_rng(number).gamma(2.0, size=number)
    expected = np.percentile(seconds, [10, 50, 90])
    np.testing.assert_allclose(percentiles(list(seconds)), expected, rtol=1e-12)
    plain = Timing(list(seconds), 3, 0.5, True).plain()
    np.testing.assert_allclose([plain[f"p{p}_ms"] for p in (10, 50, 90)], 1e3 * expected)
    assert (plain["calls"], plain["warm_up_calls"], plain["steady"]) == (number, 3, True)


CPU = "sys/devices/system/cpu/"


def machine_with(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return machine(root)


def test_a_laptop_with_all_its_files(tmp_path):
    found = machine_with(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: fpu vme\n",
            f"{CPU}cpu0/cpufreq/scaling_governor": "powersave\n",
            f"{CPU}cpu0/cpufreq/cpuinfo_max_freq": "4200000\n",
            f"{CPU}intel_pstate/no_turbo": "0\n",
            f"{CPU}cpu0/thermal_throttle/core_throttle_count": "3\n",
            f"{CPU}cpu1/thermal_throttle/core_throttle_count": "4\n",
            "sys/class/power_supply/BAT0/type": "Battery\n",
            "sys/class/power_supply/AC/type": "Mains\n",
            "sys/class/power_supply/AC/online": "0\n",
        },
    )
    assert found["cpu"] == "Fast 9000" and found["virtual"] is False
    assert (found["governor"], found["max_mhz"], found["turbo"]) == ("powersave", 4200, True)
    assert (found["mains"], found["throttled"]) == (False, 7)
    said = "\n".join(caveats(found, {**found, "throttled": 9}, 0.7))
    for part in ("is powersave", "Turbo is on", "battery", "throttled", "used 0.7 cores"):
        assert part in said
    json.dumps(found)


def test_a_server_at_its_best_has_no_caveat(tmp_path):
    files = {f"{CPU}cpu0/cpufreq/scaling_governor": "performance", f"{CPU}cpufreq/boost": "0"}
    found = machine_with(tmp_path, files)
    assert (found["turbo"], found["mains"], found["throttled"]) == (False, None, None)
    assert caveats(found, found, 0.0) == []


def test_a_guest_and_a_board(tmp_path):
    found = machine_with(tmp_path / "guest", {"proc/cpuinfo": "flags : fpu hypervisor lm\n"})
    (said,) = caveats(found, found, None)
    assert "(a virtual machine)" in said
    board = {"proc/cpuinfo": "BogoMIPS : 38\n", "sys/firmware/devicetree/base/model": "Pi 5\0"}
    assert machine_with(tmp_path / "board", board)["cpu"] == "Pi 5"


def test_work_of_other_programs_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr("os.times", lambda: type("T", (), {"user": 1.0, "system": 0.0})())
    stat, times = tmp_path / "proc" / "stat", iter([0.0, 2.0])
    stat.parent.mkdir()
    stat.write_text("cpu 100 0 0 900 5 0 0 0 0 0\n")
    with Neighbours(tmp_path, lambda: next(times)) as neighbours:
        # 3 s of users and 1 s of other guests within 2 s.
        stat.write_text("cpu 400 0 0 900 5 0 0 100 0 0\n")
    assert neighbours.cores == pytest.approx(2.0)


def test_without_proc_nothing_is_known_of_others(tmp_path):
    times = iter([0.0, 2.0])
    with Neighbours(tmp_path, lambda: next(times)) as neighbours:
        pass
    assert neighbours.cores is None
