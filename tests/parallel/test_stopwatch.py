"""Seconds per stage, bytes per kind, and that attention and waiting for K/V are told apart."""

import time

import pytest
import torch

from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.stopwatch import Stopwatch, unwatched
from sglang_mm.parallel.vision import plan_exchange
from sglang_mm.types import Frame, Run
from tests.parallel.prompts import SCHEDULES, SHORT, make_prompts, mixed

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
SLEEP_S = 0.05


def sleep(watch, stage: str) -> None:
    with watch(stage):
        time.sleep(SLEEP_S)


def test_a_stage_inside_another_one_stops_it():
    watch, began = Stopwatch("cpu"), time.perf_counter()
    with watch("outer"):
        sleep(watch, "inner")
        time.sleep(SLEEP_S)
        sleep(watch, "inner")
    elapsed_s = time.perf_counter() - began
    seconds = watch.seconds()
    assert seconds["inner"] >= 2 * SLEEP_S and seconds["outer"] >= SLEEP_S
    assert sum(seconds.values()) <= elapsed_s


def test_a_stage_adds_up_over_its_uses_and_readings():
    watch = Stopwatch("cpu")
    assert watch.seconds() == {}
    sleep(watch, "vision")
    first = watch.seconds()
    assert watch.seconds() == first
    sleep(watch, "vision")
    assert watch.seconds()["vision"] >= first["vision"] + SLEEP_S


def test_a_stage_within_itself_and_an_error_are_counted_once():
    watch, began = Stopwatch("cpu"), time.perf_counter()
    with pytest.raises(ValueError), watch("a"), watch("a"):
        time.sleep(SLEEP_S)
        raise ValueError
    inside_s = time.perf_counter() - began
    time.sleep(SLEEP_S)
    sleep(watch, "b")
    assert SLEEP_S <= watch.seconds()["a"] <= inside_s
    with unwatched("a"):
        pass


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_waiting_for_keys_and_values_is_told_from_attention(schedule):
    """Rank 1 is late: rank 0 waits for it, and rank 1 for nobody."""
    prompts = make_prompts([mixed(2)], 2, torch.float32)

    def attend(transport):
        transport.check_equal(0, "start")
        watch, began = Stopwatch("cpu"), time.perf_counter()
        if transport.rank == 1:
            time.sleep(6 * SLEEP_S)
        SCHEDULES[schedule](prompts, transport, watch=watch)
        return watch.seconds(), time.perf_counter() - began, transport.meter.take()["kv"]

    (waits, elapsed_s, traffic), (late, _, _) = run_ranks(attend, 2)
    assert waits["transport"] > 2 * SLEEP_S and waits["transport"] > late["transport"]
    assert 0 < waits["attention"] < elapsed_s - waits["transport"]
    assert 2 * SLEEP_S < traffic.host_waited_s <= waits["transport"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_meter_counts_what_a_schedule_sends(schedule):
    """4 ranks, 2 requests, rows of 2 x 3 heads of 8 in fp32. Rank 2 and 3 have no row of the short request."""
    prompts = make_prompts([SHORT, [Run(0, 7)]], 4, torch.float32, heads=(3, 3, 8))
    rows = [prompts.layout.rows(rank) for rank in range(4)]
    assert len(set(rows)) > 1

    def attend(transport):
        SCHEDULES[schedule](prompts, transport)
        return transport.meter.take(), transport.meter.take()

    for rank, (taken, again) in enumerate(run_ranks(attend, 4)):
        sent = {"gather": [rows[rank]] * 3, "ring": [rows[rank], rows[rank - 1], rows[rank - 2]]}[schedule]
        assert list(taken) == ["kv"] and taken["kv"].bytes_sent == sum(sent) * 2 * 3 * 8 * 4
        assert taken["kv"].messages == {"gather": 3 * 3, "ring": 3}[schedule]
        assert again == {}


def test_kinds_of_messages_are_counted_apart_and_empty_ones_not_at_all():
    layout = make_prompts([[Run(0, 6)]], 2, torch.float32).layout
    exchange = plan_exchange([[Frame(0, 0, 0, 6)]], layout)
    encoder = next(rank for rank, pairs in enumerate(exchange.encode) if pairs)

    def send(transport):
        exchange.run(torch.zeros(6 if transport.rank == encoder else 0, 5), transport)
        transport.check_equal(3, "plan")
        return transport.meter.take()

    for rank, taken in enumerate(run_ranks(send, 2)):
        counts = {kind: (traffic.bytes_sent, traffic.messages) for kind, traffic in taken.items()}
        embeddings = (3 * 5 * 4, 1) if rank == encoder else (0, 0)
        assert counts == {"embeddings": embeddings, "checks": (8, 1)}
