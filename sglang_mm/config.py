"""What the user chose, validated once, carried to every worker process in one environment variable."""

import json
import os
from dataclasses import asdict, dataclass, fields

from sglang_mm.errors import ConfigError

ENV = "SGLANG_MM_CONFIG"
SCHEDULES = ("auto", "ring", "gather")
VISIONS = ("frames", "stock")
KV = ("sharded", "replicated")
BACKENDS = ("auto", "triton", "flashinfer", "fa4", "cpu", "reference")


@dataclass(frozen=True)
class Config:
    """tp: tensor-parallel width T. cp: context-parallel width C; the world has T * C ranks.

    schedule: how K/V travel during prefill. kv: `sharded` keeps 1/C of every page of K/V on each replica, `replicated`
    all of it. cp_min_tokens: new tokens of a batch's longest request, or tokens of the largest medium they touch, from
    which its prefill is sharded. vision: `frames` attends inside each frame and keeps the video's timing (as Qwen2.5-VL
    was trained), `stock` keeps SGLang 0.5.23's values.
    deadline_s: seconds any rank waits for another before it raises.
    allow_local_media: directories below which requests may name local files; empty leaves the default, which is
    any file for an Engine and for a server on loopback, and none for a server that others can reach.
    sparse: `off` for dense attention, `auto` for the plan in the checkpoint's folder or else the online rule, or the
    path of a plan. kernel_backend: what runs its tile programs. sparse_min_tokens: new tokens from which a request is
    sparse. keep_selections: a directory for what each sparse request selected; empty: not kept.
    media_dir: where the server makes the directory for pixels of requests; empty: in the system's temporary one.
    nodes: over how many nodes of a Ray cluster the ranks are spread, equally; whole replicas on each. ray_address: of
    the cluster; empty: for one node none is used, for more the one that is found, or nodes simulated on this machine.
    nodes_deadline_s: seconds that a start waits for room on the cluster.
    """

    tp: int = 1
    cp: int = 1
    schedule: str = "auto"
    kv: str = "sharded"
    cp_min_tokens: int = 512
    vision: str = "frames"
    deadline_s: float = 600.0
    allow_local_media: tuple[str, ...] = ()
    media_dir: str = ""
    sparse: str = "off"
    kernel_backend: str = "auto"
    sparse_min_tokens: int = 4096
    keep_selections: str = ""
    nodes: int = 1
    ray_address: str = ""
    nodes_deadline_s: float = 600.0

    def __post_init__(self):
        for name in ("tp", "cp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}", "a whole number >= 1", f"pass --{name} 1 or more")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"--schedule {self.schedule}", " | ".join(SCHEDULES), "pass --schedule auto")
        if self.kv not in KV:
            raise ConfigError(f"--kv {self.kv}", " | ".join(KV), "pass --kv sharded")
        if self.vision not in VISIONS:
            raise ConfigError(f"--vision {self.vision}", " | ".join(VISIONS), "pass --vision frames")
        if self.cp_min_tokens < 1:
            raise ConfigError(f"--cp-min-tokens {self.cp_min_tokens}", ">= 1", "pass --cp-min-tokens 1 to shard all")
        if not self.deadline_s > 0:
            raise ConfigError(f"--deadline {self.deadline_s}", "seconds > 0", "pass --deadline 600")
        self._check_sparse()
        self._check_nodes()
        given = self.allow_local_media
        object.__setattr__(self, "allow_local_media", (given,) if isinstance(given, str) else tuple(given))
        for directory in self.allow_local_media:
            if not os.path.isdir(directory):
                raise ConfigError(f"--allow-local-media {directory}", "a directory", "make it, or check the path")
        if self.media_dir and not os.access(self.media_dir, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--media-dir {self.media_dir}", "a directory that this user can write to", "make it, or pass another"
            )

    def _check_sparse(self) -> None:
        for name in ("sparse", "keep_selections"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike):
                raise ConfigError(f"{name}={value!r}", "text or a path", f"see --{name.replace('_', '-')} in the help")
            object.__setattr__(self, name, os.fspath(value))
        if self.sparse not in ("off", "auto") and not os.path.isfile(self.sparse):
            allowed = "off | auto | a plan file"
            raise ConfigError(f"--sparse {self.sparse}", allowed, "check the path, or pass --sparse auto")
        if self.kernel_backend not in BACKENDS:
            allowed = " | ".join(BACKENDS)
            raise ConfigError(f"--kernel-backend {self.kernel_backend}", allowed, "pass --kernel-backend auto")
        if self.sparse_min_tokens < 1:
            remedy = "pass --sparse-min-tokens 1 to make all prompts sparse"
            raise ConfigError(f"--sparse-min-tokens {self.sparse_min_tokens}", ">= 1", remedy)
        if self.keep_selections and not os.access(self.keep_selections, os.W_OK | os.X_OK):
            allowed = "a directory that this user can write to"
            raise ConfigError(f"--keep-selections {self.keep_selections}", allowed, "make it, or pass another")

    def _check_nodes(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"--nodes {self.nodes}", "a whole number >= 1", "pass --nodes 1 or more")
        if self.cp % self.nodes:
            widths = ", ".join(str(n) for n in range(1, self.cp + 1) if not self.cp % n)
            allowed = f"--nodes {widths}: each node takes as many whole replicas of {self.tp} ranks"
            raise ConfigError(f"--nodes {self.nodes} with --cp {self.cp}", allowed, "raise --cp, or lower --nodes")
        if not self.nodes_deadline_s > 0:
            remedy = "pass --nodes-deadline 600"
            raise ConfigError(f"--nodes-deadline {self.nodes_deadline_s}", "seconds > 0", remedy)

    @property
    def uses_ray(self) -> bool:
        """Whether ranks are actors on a Ray cluster, and not processes of this machine."""
        return self.nodes > 1 or bool(self.ray_address)

    @property
    def is_sparse(self) -> bool:
        """Whether prompts may be computed sparsely."""
        return self.sparse != "off"

    @property
    def computes_prefill(self) -> bool:
        """Whether prefills are ours, and not SGLang's own."""
        return self.cp > 1 or self.is_sparse

    @property
    def world_size(self) -> int:
        return self.tp * self.cp

    @property
    def keepers(self) -> int:
        """How many replicas share a page of K/V; 1 where each keeps all."""
        return self.cp if self.kv == "sharded" else 1

    def to_env(self) -> None:
        """Publish to this process's environment; forked and spawned workers inherit it."""
        os.environ[ENV] = json.dumps(asdict(self))

    @classmethod
    def from_env(cls) -> "Config | None":
        """The launcher's choice, or None in a process that our launcher did not start."""
        text = os.environ.get(ENV)
        if not text:
            return None
        known = {f.name for f in fields(cls)}
        values = json.loads(text)
        if unknown := set(values) - known:
            raise ConfigError(f"{ENV} has {sorted(unknown)}", f"{sorted(known)}", "start with sglang_mm.launch")
        return cls(**values)
