"""Ranks and their nodes on a cluster that is there: order, room, what is missing, versions."""

import time

import pytest

from sglang_mm.cluster import check_nodes, connected, place
from sglang_mm.cluster.connection import HOOK
from sglang_mm.cluster.facts import compare, facts
from sglang_mm.errors import ConfigError


@pytest.fixture(scope="module")
def joined(cluster):
    with connected(cluster.address, 2, 1, may_simulate=False) as found:
        yield found


def test_ranks_of_a_node_are_neighbours_and_rank_0_is_here(joined, checkpoint):
    import ray

    placement = place(joined, 2, 1, 30, print)
    try:
        assert placement.names == ["local-0", "local-1"]
        assert [node.name for node in placement.nodes] == ["local-0", "local-1"]
        assert placement.nodes[0].node_id == joined.node_id != placement.nodes[1].node_id
        assert placement.group.bundle_count == 2
        check_nodes(placement, checkpoint, 60)
        assert ray.available_resources().get("GPU", 0) == 0
    finally:
        placement.release()
    assert_free(ray, 2)


@pytest.mark.parametrize(
    ("nodes", "each", "told"),
    [
        (3, 1, ["--nodes 3 with 1 ranks a node", "local-1 (127.0.0.1) with 1 GPUs", "--nodes-deadline"]),
        (1, 2, ["local-0 (127.0.0.1) with 1 GPUs, where this runs", "rank 0 serves from there"]),
    ],
)
def test_what_is_missing_is_told_within_the_deadline(joined, nodes, each, told):
    import ray

    said, began = [], time.monotonic()
    with pytest.raises(ConfigError) as caught:
        place(joined, nodes, each, 1.5, said.append)
    assert time.monotonic() - began < 15
    assert [text for text in told if text not in str(caught.value)] == []
    assert_free(ray, 2)


def test_progress_is_told_while_it_waits(joined, monkeypatch):
    monkeypatch.setattr("sglang_mm.cluster.placement.TELL_EVERY_S", 0.5)
    said = []
    with pytest.raises(ConfigError):
        place(joined, 3, 1, 2.5, said.append)
    assert said and all("waiting for room" in line and "local-0" in line and "of 2 s" in line for line in said)


def test_a_checkpoint_that_only_one_node_has(joined, tmp_path):
    mine = facts(str(tmp_path))
    assert mine["checkpoint"] == "missing" and mine["sglang"] == "0.5.23"
    with pytest.raises(ConfigError, match=r"missing on node far.*same path"):
        compare("far", mine | {"checkpoint": "there"}, mine, str(tmp_path))
    with pytest.raises(ConfigError, match=r"node far has sglang 0.5.22 instead of 0.5.23.*same versions"):
        compare("far", mine, mine | {"sglang": "0.5.22"}, str(tmp_path))
    compare("far", mine, dict(mine), str(tmp_path))


def test_a_second_connection_uses_the_first(joined):
    with connected("", 2, 1, may_simulate=False) as again:
        assert again.address == "" and again.node_id == joined.node_id
    with pytest.raises(ConfigError, match="connected to a Ray cluster"), connected("local", 2, 1, may_simulate=True):
        pass
    import ray

    assert ray.is_initialized()  # whoever connected first lets go
    assert ray.get_runtime_context().runtime_env["worker_process_setup_hook"] == HOOK


def assert_free(ray, gpus: int) -> None:
    until = time.monotonic() + 10
    while ray.available_resources().get("GPU", 0) != gpus and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources().get("GPU", 0) == gpus
