"""Both schedules between real processes over gloo: 2, 3 and 2 x 2 ranks, and ranks that hang or die."""

import os
import time
from dataclasses import astuple

import pytest
import torch
import torch.distributed as dist

from sglang_mm.errors import ConfigError, RankMismatch, RingBroken
from sglang_mm.parallel.calibration import calibrate
from sglang_mm.parallel.cost import ModelShape
from sglang_mm.parallel.distributed import DistributedTransport, second_group
from tests.parallel.processes import run_processes
from tests.parallel.prompts import SCHEDULES, assert_ring_equals_dense, batch, make_prompts

PROCESSES = 4
RINGS = {"three of them": (0, 1, 2), "two ranks, turned around": (2, 0)}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
FAULT_DEADLINE_S = 2.0


def prompts_of(ranks: int, dtype: str):
    return make_prompts(batch(ranks), ranks, DTYPES[dtype], seed=ranks)


def rows_sent(source: int, destination: int) -> int:
    return (3 * source + 5 * destination) % 4


def message(source: int, destination: int) -> torch.Tensor:
    return torch.full((rows_sent(source, destination), 2), 10.0 * source + destination)


def healthy(world_rank: int) -> dict:
    """Everything a ring does, once per ring this process belongs to."""
    report = {}
    for name, members in RINGS.items():
        group = dist.new_group(sorted(members))
        if world_rank in members:
            transport = DistributedTransport(group, members, "cpu", deadline_s=30)
            report[name] = {"rank": transport.rank, "checks": checks(transport)} | {
                (schedule, dtype): attend(prompts_of(len(members), dtype), transport).double().numpy()
                for schedule, attend in SCHEDULES.items()
                for dtype in DTYPES
            }
            report[name]["constants"] = astuple(calibrate(transport, ModelShape(1, 4, 2, 16, torch.float32)))
    with pytest.raises(ConfigError, match="the group's ranks"):
        DistributedTransport(dist.group.WORLD, [0, 1], "cpu", deadline_s=1)
    return report | {"two nodes": two_nodes(), "second group": over_second_groups(world_rank)}


def two_nodes() -> dict:
    """All processes, as if two and two shared a node."""
    transport = DistributedTransport(dist.group.WORLD, range(PROCESSES), "cpu", deadline_s=30, nodes=2)
    prompts = prompts_of(PROCESSES, "fp64")
    report = {schedule: attend(prompts, transport).numpy() for schedule, attend in SCHEDULES.items()}
    report["bytes_across"] = transport.meter.take()["kv"].bytes_across
    report["constants"] = calibrate(transport, ModelShape(1, 4, 2, 16, torch.float32))
    return report


def over_second_groups(world_rank: int) -> list[float]:
    """Two rings side by side make a group more each, and add up numbers over it."""
    rings = [[0, 2], [3, 1]]
    groups = [dist.new_group(sorted(members)) for members in rings]
    (mine,) = [place for place, members in enumerate(rings) if world_rank in members]
    transport = DistributedTransport(second_group(groups[mine], rings[mine]), rings[mine], "cpu", deadline_s=30)
    return transport.sum_(torch.tensor([2.0**world_rank])).tolist()


def checks(transport) -> dict:
    size, rank = transport.size, transport.rank
    got = transport.all_to_all(
        [message(rank, other) for other in range(size)], [rows_sent(other, rank) for other in range(size)]
    )
    transport.check_equal(2**64 - 3, "something equal")
    try:
        transport.check_equal(2**63 + rank, "layout digest")
        mismatch = ""
    except RankMismatch as error:
        mismatch = str(error)
    return {
        "all_to_all": all(torch.equal(tensor, message(other, rank)) for other, tensor in enumerate(got)),
        "sum": transport.sum_(torch.full((2, 3), 2.0**rank)).tolist(),
        "mismatch": mismatch,
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return run_processes(healthy, PROCESSES, str(tmp_path_factory.mktemp("gloo") / "store"))


@pytest.fixture(params=RINGS)
def ring(request, reports):
    """(members, report of each in ring order)"""
    members = RINGS[request.param]
    found = [reports[world_rank][request.param] for world_rank in members]
    assert [report["rank"] for report in found] == list(range(len(members)))
    return members, found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedule_equals_dense(ring, schedule, dtype):
    members, found = ring
    outputs = [torch.from_numpy(report[schedule, dtype]).to(DTYPES[dtype]) for report in found]
    assert_ring_equals_dense(prompts_of(len(members), dtype), outputs)


def test_all_to_all_is_uneven(ring):
    assert all(report["checks"]["all_to_all"] for report in ring[1])


def test_sum_over_the_ring(ring):
    members, found = ring
    assert all(report["checks"]["sum"] == [[2.0 ** len(members) - 1] * 3] * 2 for report in found)


def test_a_mismatch_is_raised_on_every_rank_and_names_world_ranks(ring):
    members, found = ring
    for report in found:
        assert "layout digest" in report["checks"]["mismatch"]
        for place, world_rank in enumerate(members):
            assert f"rank {world_rank}: {2**63 + place:#018x}" in report["checks"]["mismatch"]


def test_calibration_agrees_on_one_set_of_constants(ring):
    constants = {report["constants"] for report in ring[1]}
    assert len(constants) == 1
    *measured, across = constants.pop()
    assert across is None and all(0 < value < float("inf") for value in measured)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_on_two_nodes_equals_dense(schedule, reports):
    outputs = [torch.from_numpy(report["two nodes"][schedule]) for report in reports]
    assert_ring_equals_dense(prompts_of(PROCESSES, "fp64"), outputs)


def test_rows_cross_once_to_the_other_node(reports):
    """2 ranks on each: a rank's own rows to its counterpart, under either schedule. 1 head of 20 in fp64."""
    rows = [prompts_of(PROCESSES, "fp64").layout.rows(rank) for rank in range(PROCESSES)]
    assert [report["two nodes"]["bytes_across"] for report in reports] == [2 * own * 2 * 20 * 8 for own in rows]


def test_calibration_finds_one_set_of_constants_for_both_links(reports):
    first, *others = [report["two nodes"]["constants"] for report in reports]
    assert all(other == first for other in others) and 0 < first.across.bytes_per_s < float("inf")


def test_rings_make_second_groups_side_by_side(reports):
    assert [report["second group"] for report in reports] == [[5.0], [10.0], [5.0], [10.0]]


def hang() -> None:
    time.sleep(FAULT_DEADLINE_S + 1)


def die() -> None:
    os._exit(3)


FAULTS = {2: [("ring", hang), ("ring", die)], 3: [("ring", hang), ("gather", hang), ("gather", die)]}


def faulty(world_rank: int) -> list[dict]:
    """Rank 1 hangs in a ring of its own per fault, and dies in the last one; the others report what they saw."""
    size = dist.get_world_size()
    rings = [dist.new_group(list(range(size))) for _ in FAULTS[size]]
    return [broken_ring(world_rank, group, *fault) for group, fault in zip(rings, FAULTS[size])]


def broken_ring(world_rank: int, group, schedule: str, fault) -> dict:
    dist.barrier()  # over connections of its own: whoever hung is back
    size = dist.get_world_size()
    transport = DistributedTransport(group, range(size), "cpu", FAULT_DEADLINE_S)
    prompts = prompts_of(size, "fp32")
    SCHEDULES[schedule](prompts, transport)  # a ring that has worked before
    if world_rank == 1:
        fault()
        return {}
    began = time.monotonic()
    try:
        SCHEDULES[schedule](prompts, transport)
    except RingBroken as error:
        return {"rank": error.rank, "stage": error.stage, "elapsed_s": time.monotonic() - began, "text": str(error)}
    return {}


@pytest.mark.parametrize("ranks", FAULTS)
def test_a_rank_that_hangs_or_dies_breaks_the_ring_for_all_others(ranks, tmp_path):
    results = run_processes(faulty, ranks, str(tmp_path / "store"))
    assert results[1] is None, "rank 1 was to die"
    for rank in set(range(ranks)) - {1}:
        for (schedule, fault), report in zip(FAULTS[ranks], results[rank], strict=True):
            assert report["stage"].startswith({"ring": "ring hop", "gather": "gather stage"}[schedule])
            assert report["elapsed_s"] < FAULT_DEADLINE_S + 1
            assert fault == hang or "onnection" in report["text"], "a closed connection is noticed at once, as such"
            if fault == hang and (schedule == "gather" or rank == (1 + 1) % ranks):
                assert report["rank"] == 1, "in a ring the neighbour names the culprit, in a gather everyone does"
    if ranks == 2:
        assert [report["rank"] for report in results[0]] == [1, 1]
