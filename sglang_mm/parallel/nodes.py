"""Which ranks of a ring share a node, and the order of a ring over two links: inside the nodes, and across them.

    hop            0             1             2             3           4 ranks on 2 nodes: ranks 0 and 1, 2 and 3
    rank 0 meets   own piece     of rank 1     of rank 2     of rank 3
    inside         own to 1                    2's to 1                  G - 1 hops of a round go to the next rank
    across         own to 2 ------------->                               one of a round goes to the next node

G ranks of each of N nodes. In every round the pieces of one node go around inside each node, and every rank sends the
one that it met first on to its counterpart, the rank with the same place in the next node. So all links across nodes
carry a piece at a time, and each has G computations to hide behind. On one node, and with one rank on each, this is
the ring that sends every piece to rank + 1.
"""

from dataclasses import dataclass

from sglang_mm.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """`ranks` of a ring, C, on `count` nodes, N, equally many on each, in the order of the ring.

    Raises ConfigError when they cannot be dealt out so.
    """

    ranks: int
    count: int = 1

    def __post_init__(self):
        if self.count < 1 or self.ranks % self.count:
            given = f"a ring of {self.ranks} ranks on {self.count} nodes"
            remedy = "take a number of nodes that divides the context-parallel width, or another width (--cp)"
            raise ConfigError(given, "equally many ranks on each node, one or more", remedy)

    @property
    def each(self) -> int:
        """G, the ranks of a node."""
        return self.ranks // self.count

    @property
    def two_links(self) -> bool:
        """Whether a rank has others both on its own node and elsewhere."""
        return 1 < self.count < self.ranks

    def neighbours(self, rank: int) -> list[int]:
        """The other ranks of its node."""
        first = rank - rank % self.each
        return [other for other in range(first, first + self.each) if other != rank]

    def counterparts(self, rank: int) -> list[int]:
        """The ranks with the same place in the other nodes."""
        return [other for other in range(rank % self.each, self.ranks, self.each) if other != rank]

    def are_apart(self, rank: int, other: int) -> bool:
        """Whether a message between them crosses from node to node."""
        return rank // self.each != other // self.each

    def next_inside(self, rank: int, steps: int = 1) -> int:
        """The rank `steps` places on in the same node, around."""
        place = rank % self.each
        return rank - place + (place + steps) % self.each

    def next_across(self, rank: int, steps: int = 1) -> int:
        """The rank with the same place `steps` nodes on, around."""
        return (rank + steps * self.each) % self.ranks


@dataclass(frozen=True)
class Send:
    """The piece that is met in a hop goes to rank `to`; what rank `by` sends meanwhile is met in hop `due`."""

    to: int
    by: int
    due: int
    across: bool


@dataclass(frozen=True)
class Hop:
    """A rank meets the piece of rank `source`; `sends` are posted before, in this order."""

    source: int
    sends: tuple[Send, ...]


def ring_hops(rank: int, nodes: Nodes) -> list[Hop]:
    """The C hops of a rank. Send and receive of hop h belong together on all ranks."""
    return [_hop(rank, nodes, *divmod(hop, nodes.each)) for hop in range(nodes.ranks)]


def _hop(rank: int, nodes: Nodes, round_: int, step: int) -> Hop:
    first, sends = round_ * nodes.each, []
    if step == 0 and round_ + 1 < nodes.count:
        sends.append(Send(nodes.next_across(rank), nodes.next_across(rank, -1), first + nodes.each, True))
    if step + 1 < nodes.each:
        sends.append(Send(nodes.next_inside(rank), nodes.next_inside(rank, -1), first + step + 1, False))
    return Hop(nodes.next_inside(nodes.next_across(rank, -round_), -step), tuple(sends))


def pieces_at_once(nodes: Nodes) -> int:
    """The most pieces that a rank of the ring holds: the one it computes, those that come, and one that still goes.

    2 on one link; on two 3, or 4 from three ranks of a node on: a piece that goes across stays until its round is over.
    """
    if not nodes.two_links:
        return min(2, nodes.ranks)
    return 3 if nodes.each == 2 else 4
