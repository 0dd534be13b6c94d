"""Signals that ask a run to stop: none is lost in a vote, and an echo is no second wish."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastkd.training.interrupt
from fastkd.compute.ranks import World
from fastkd.training.interrupt import StopSignal

ALONE = World(0, 0, 1, torch.device("cpu"), None)
TWO = World(0, 0, 2, torch.device("cpu"), "gloo")


def test_a_signal_that_comes_during_the_vote_counts_in_the_next(monkeypatch):
    coming = [signal.SIGTERM]

    def vote(asked):
        votes = asked.clone()
        if coming:
            os.kill(os.getpid(), coming.pop())
        return votes

    monkeypatch.setattr(fastkd.training.interrupt, "all_reduce_sum", vote)
    with StopSignal() as stop:
        # The other rank has heard of nothing: this one must not stop by itself.
        assert not stop.agreed(TWO)
        assert stop.agreed(TWO)
        assert stop.code == 143


def test_the_other_ranks_signal_is_this_ones_too(monkeypatch):
    monkeypatch.setattr(fastkd.training.interrupt, "all_reduce_sum", torch.ones_like)
    with StopSignal() as stop:
        assert stop.agreed(TWO)
        assert stop.code == 143  # of several the most urgent
        # What torchrun passes on to this one too, while it saves.
        os.kill(os.getpid(), signal.SIGINT)


def test_an_echo_is_the_same_wish_and_a_later_signal_is_final(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(fastkd.training.interrupt.time, "monotonic", lambda: clock[0])
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(ALONE)
        assert stop.code == 130
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_closed_terminal_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed(ALONE)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopSignal():
        pass
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before


def handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [signal.getsignal(number) for number in numbers]


def test_trainings_may_end_in_any_order():
    # A training is a generator: one that nobody ends is closed when Python collects it.
    before = handlers()
    first, second = StopSignal(), StopSignal()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (first.code, second.code) == (0, 143)
    second.__exit__()
    assert handlers() == before
    second.__exit__()
    assert handlers() == before


def test_the_one_around_receives_signals_again():
    before = handlers()
    with StopSignal() as around:
        with StopSignal():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert around.code == 143
    assert handlers() == before


def test_another_thread_receives_nothing_and_changes_nothing():
    before = handlers()

    def run():
        with StopSignal() as stop:
            assert not stop.agreed(ALONE)

    with StopSignal() as stop:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.code == 143
    assert handlers() == before
