"""Several nodes as one: a Ray cluster, found or started here, and the places on it where ranks run.

    connected(address) -> Cluster -> place(nodes x ranks) -> Placement -> watch(actors)

The only room, with `launch`, that imports ray. It knows no models, no SGLang and no tensors.
"""

from sglang_mm.cluster.connection import Cluster, connected
from sglang_mm.cluster.facts import check_nodes
from sglang_mm.cluster.placement import Placement, place
from sglang_mm.cluster.watching import end_actors, reason_of, watch

__all__ = ["Cluster", "Placement", "check_nodes", "connected", "end_actors", "place", "reason_of", "watch"]
