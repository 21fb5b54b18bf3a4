"""What one rank has sent to others, and how long its host was held, by kind of message."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Traffic:
    """bytes_sent, messages: to other ranks, empty tensors left out. bytes_across: those of them to other nodes.

    host_waited_s: seconds the host was held until messages had come. With gloo that is the wait itself; with NCCL the
    device waits instead and this is the cost of the calls alone: there a stopwatch's stage tells the wait.
    """

    bytes_sent: int = 0
    bytes_across: int = 0
    messages: int = 0
    host_waited_s: float = 0.0


class Meter:
    """Counts since it was made, or since `take`. Kinds are free words: kv, embeddings, rows, checks."""

    def __init__(self):
        self._traffic: defaultdict[str, Traffic] = defaultdict(Traffic)

    def count(self, kind: str, sent: Iterable[Tensor]) -> Traffic:
        """Add messages; the returned account takes the waits for them."""
        account = self._traffic[kind]
        for tensor in sent:
            account.bytes_sent += tensor.nbytes
            account.messages += 1
        return account

    def take(self) -> dict[str, Traffic]:
        """The counts by kind; counting starts anew."""
        taken, self._traffic = dict(self._traffic), defaultdict(Traffic)
        return taken
