"""Both schedules on CUDA. torch and pytest suffice: `pytest -m gpu tests/parallel`.

One GPU: ranks are threads that share it. Two or more: one NCCL rank per GPU, at most four.
"""

import time

import pytest
import torch
import torch.distributed as dist

from sglang_mm.errors import RankMismatch
from sglang_mm.parallel.distributed import DistributedTransport
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.stopwatch import Stopwatch
from tests.parallel.processes import run_processes
from tests.parallel.prompts import SCHEDULES, assert_ring_equals_dense, batch, make_prompts

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_that_share_a_gpu_equal_dense(schedule, ranks, dtype):
    prompts = make_prompts(batch(ranks), ranks, dtype, device="cuda", heads=(6, 2, 20))
    outputs = run_ranks(lambda transport: SCHEDULES[schedule](prompts, transport), ranks, device="cuda")
    assert all(out.is_cuda for out in outputs)
    assert_ring_equals_dense(prompts, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks, nodes", [(4, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_on_several_nodes_equal_dense(schedule, ranks, nodes):
    prompts = make_prompts(batch(ranks), ranks, torch.float32, device="cuda", heads=(6, 3, 20))
    outputs = run_ranks(lambda transport: SCHEDULES[schedule](prompts, transport), ranks, device="cuda", nodes=nodes)
    assert_ring_equals_dense(prompts, outputs)


@pytest.mark.gpu
def test_checks_between_threads_on_a_gpu():
    def checks(transport):
        with pytest.raises(RankMismatch, match="rank 1: 0x0000000000000001"):
            transport.check_equal(transport.rank, "layout digest")
        return transport.sum_(torch.full((3,), 2.0**transport.rank, device=transport.device)).tolist()

    assert run_ranks(checks, 3, device="cuda") == [[7.0] * 3] * 3


@pytest.mark.gpu
def test_a_stopwatch_measures_the_stream_and_does_not_wait_before_it_is_read():
    watch = Stopwatch("cuda")
    torch.cuda.synchronize()
    began = time.monotonic()
    with watch("outer"):
        with watch("inner"):
            torch.cuda._sleep(500_000_000)  # cycles: some tenths of a second
        host_s = time.monotonic() - began
    seconds = watch.seconds()
    assert host_s < seconds["inner"] / 2 and seconds["inner"] > 0.05 and seconds["outer"] < seconds["inner"] / 10


def nccl_ranks() -> int:
    return min(4, torch.cuda.device_count())


def nccl_ring(rank: int) -> dict:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    ranks = dist.get_world_size()
    transport = DistributedTransport(dist.group.WORLD, range(ranks), device, deadline_s=30)
    send = [torch.full((other, 2), float(rank), device=device) for other in range(ranks)]
    received = transport.all_to_all(send, [rank] * ranks)
    outputs = {}
    for schedule, attend in SCHEDULES.items():
        for dtype in DTYPES:
            prompts = make_prompts(batch(ranks), ranks, dtype, device=device)
            outputs[schedule, str(dtype)] = attend(prompts, transport).double().cpu().numpy()
    return {"outputs": outputs, "received": [tensor.tolist() for tensor in received]}


@pytest.mark.gpu(2)
def test_nccl_ranks_equal_dense(tmp_path):
    ranks = nccl_ranks()
    reports = run_processes(nccl_ring, ranks, str(tmp_path / "store"), backend="nccl")
    for rank, report in enumerate(reports):
        assert report["received"] == [[[float(source)] * 2] * rank for source in range(ranks)]
    for schedule in SCHEDULES:
        for dtype in DTYPES:
            found = [torch.from_numpy(report["outputs"][schedule, str(dtype)]) for report in reports]
            prompts = make_prompts(batch(ranks), ranks, dtype, device="cuda")
            assert_ring_equals_dense(prompts, [out.to("cuda", dtype) for out in found])


def nccl_two_nodes(rank: int) -> dict:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    transport = DistributedTransport(dist.group.WORLD, range(4), device, deadline_s=30, nodes=2)
    prompts = make_prompts(batch(4), 4, torch.float32, device=device, heads=(6, 3, 20))
    outputs = {name: attend(prompts, transport).cpu().numpy() for name, attend in SCHEDULES.items()}
    transport.close()
    return outputs


@pytest.mark.gpu(4)
def test_nccl_ranks_with_a_group_for_other_nodes_equal_dense(tmp_path):
    """Four GPUs that are said to lie on two nodes."""
    reports = run_processes(nccl_two_nodes, 4, str(tmp_path / "store"), backend="nccl")
    prompts = make_prompts(batch(4), 4, torch.float32, device="cuda", heads=(6, 3, 20))
    for schedule in SCHEDULES:
        assert_ring_equals_dense(prompts, [torch.from_numpy(report[schedule]).to("cuda") for report in reports])


def nccl_host_runs_ahead(rank: int) -> tuple[float, float]:
    """Seconds the host spent in a shift whose partner is still busy, and until the data was there."""
    torch.cuda.set_device(rank)
    transport = DistributedTransport(dist.group.WORLD, range(dist.get_world_size()), f"cuda:{rank}", deadline_s=30)
    mine = torch.full((4,), float(rank), device="cuda")
    torch.cuda.synchronize()
    if rank == 1:
        torch.cuda._sleep(2_000_000_000)  # cycles: about one second of device work before the send
    began = time.monotonic()
    (got,) = transport.shift([mine], [(4,)]).wait()
    host_s = time.monotonic() - began
    assert got.tolist() == [float((rank - 1) % dist.get_world_size())] * 4
    return host_s, time.monotonic() - began


@pytest.mark.gpu(2)
def test_nccl_does_not_block_the_host(tmp_path):
    for host_s, ready_s in run_processes(nccl_host_runs_ahead, 2, str(tmp_path / "store"), backend="nccl"):
        assert host_s < ready_s / 2
