"""The meter of training time and memory."""

import sys

import pytest
import torch

from zoo.memory import PeakMemory
from zoo.train import meters
from zoo.train.meters import TrainingMeter

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    now = {"t": 100.0}
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now["t"])
    return now


def test_only_open_stretches_count(clock):
    meter = TrainingMeter(CPU)
    meter.add(1_000)
    clock["t"] += 50
    meter.start()
    meter.add(30)
    clock["t"] += 2
    meter.stop()
    clock["t"] += 50
    meter.start()
    meter.add(10)
    clock["t"] += 2
    meter.stop()
    meter.stop()
    assert (meter.tokens, meter.seconds, meter.tokens_per_second) == (40, 4.0, 10.0)


def test_no_stretch_no_speed():
    assert TrainingMeter(CPU).tokens_per_second is None


def test_state_goes_on_without_the_open_stretch(clock):
    meter = TrainingMeter(CPU)
    meter.start()
    meter.add(30)
    clock["t"] += 3
    meter.stop()
    meter.start()
    meter.add(99)
    again = TrainingMeter(CPU)
    again.load_state_dict(meter.state_dict())
    assert (again.tokens, again.seconds, again.peak_bytes) == (30, 3.0, meter.peak_bytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere an earlier peak cannot be forgotten")
def test_peak_memory_sees_what_was_held_and_freed_since_the_reset():
    memory = PeakMemory(CPU)
    memory.reset()
    before = memory.bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert 60 * 2**20 < memory.bytes() - before < 100 * 2**20
    memory.reset()
    assert memory.bytes() < before + 10 * 2**20
