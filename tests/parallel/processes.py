"""Real ranks for tests: processes joined in one torch.distributed world. torch only.

They are forks of a server that has torch loaded and has started no thread and no CUDA: spawning each would import torch
as many times. `tests/faults/pool.py` has processes that are used again.
"""

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def run_processes(fn: Callable, ranks: int, rendezvous: str, *, backend="gloo", timeout_s=90.0) -> list:
    """fn(rank) in `ranks` processes; what it returned, by rank, or None where the process died without a word.

    fn and its results are pickled: module-level functions, plain values and numpy arrays. An exception in fn fails the
    caller with its traceback. rendezvous: a path that does not exist yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    answers = context.Queue()
    arguments = (fn, ranks, rendezvous, backend, answers)
    processes = [context.Process(target=_main, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        results = _collect(processes, answers, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank, (_, failure) in results.items():
        assert failure is None, f"rank {rank}:\n{failure}"
    return [results.get(rank, (None, None))[0] for rank in range(ranks)]


def _collect(processes, answers, deadline) -> dict[int, tuple]:
    results = {}
    while len(results) < len(processes):
        try:
            rank, *results[rank] = answers.get(timeout=0.2)
        except queue.Empty:
            silent = [rank for rank, process in enumerate(processes) if rank not in results and process.is_alive()]
            if not silent and answers.empty():
                break
            assert time.monotonic() < deadline, f"ranks {silent} are still running"
    return results


def _main(rank, fn, ranks, rendezvous, backend, answers) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend, init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
        )
        answers.put((rank, fn(rank), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    finally:
        answers.close()
        answers.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
