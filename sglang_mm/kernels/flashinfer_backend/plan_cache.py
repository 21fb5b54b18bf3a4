"""Plans that are kept: planning waits for the device, and the layers of a prompt often share their indices.

Two ways lead to a plan: the program object, and, for one that is new, a digest of its tables. Programs are held weakly
and never kept alive. Plans outlive their program, since the next layer compiles its own; their number and memory are
bounded, and the one unused for longest goes first.
"""

import hashlib
import threading
from collections import OrderedDict
from weakref import WeakKeyDictionary

from torch import Tensor

from sglang_mm.kernels.flashinfer_backend.plan import Numbers, Plan, make_plan
from sglang_mm.types import TileProgram

PLANS = 16
HELD_BYTES = 1 << 31

_lock = threading.Lock()
_digests: WeakKeyDictionary[TileProgram, bytes] = WeakKeyDictionary()
_plans: OrderedDict[tuple[bytes, Numbers], Plan] = OrderedDict()


def plan_of(program: TileProgram, numbers: Numbers) -> Plan:
    """Never waits for the device where this program was planned before; once per table where an equal one was.

    A program must not be changed after its first use. Raises ConfigError as `make_plan` does.
    """
    with _lock:
        digest = _digests.get(program)
        if digest is None:
            digest = _digests[program] = _digest(program)
        plan = _plans.pop((digest, numbers), None)
        if plan is None:
            plan = make_plan(program, numbers)
        _plans[digest, numbers] = plan
        while len(_plans) > 1 and (len(_plans) > PLANS or held_bytes() > HELD_BYTES):
            _plans.popitem(last=False)
        return plan


def held_bytes() -> int:
    """On the devices, by plans that are kept."""
    return sum(plan.nbytes for plan in _plans.values())


def forget_plans() -> None:
    with _lock:
        _plans.clear()


def _digest(program: TileProgram) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name, value in vars(program).items():
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().numpy())
        else:
            found.update(f"{name} {value}".encode())
    return found.digest()
