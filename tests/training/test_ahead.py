"""Items are made one ahead on a GPU, in order, and memory is reused only after its use."""

from contextlib import nullcontext

import pytest
import torch

from fastkd.training.ahead import run_ahead

CPU = torch.device("cpu")


def test_on_a_cpu_items_come_in_order_and_none_is_made_early():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number

    for number in run_ahead(items(), CPU):
        assert made == list(range(number + 1))
    assert made == [0, 1, 2]


def test_memory_of_an_item_is_taken_back_only_after_its_use(monkeypatch):
    """On streams that only write down who waits for whom: item 2 is made after the use of 0."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return log[-1].removeprefix("made ")

        def wait_event(self, event):
            log.append(f"{self.name} waits for item {event}")

    side, main = Stream("side"), Stream("main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def items():
        for number in range(3):
            log.append(f"made {number}")
            yield number

    made = run_ahead(items(), torch.device("cuda"), lambda device: side)
    log.extend(f"used {number}" for number in made)
    assert log == [
        "side waits for main",
        "made 0",
        "made 1",
        "main waits for item 0",
        "used 0",
        "side waits for main",
        "made 2",
        "main waits for item 1",
        "used 1",
        "side waits for main",
        "main waits for item 2",
        "used 2",
        "side waits for main",
    ]


@pytest.mark.gpu
def test_on_a_gpu_one_item_is_made_ahead():
    device = torch.device("cuda")
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield torch.full((1000,), float(number), device=device)

    for number, item in enumerate(run_ahead(items(), device)):
        assert made == list(range(min(number + 2, 4)))
        assert (item == number).all()
