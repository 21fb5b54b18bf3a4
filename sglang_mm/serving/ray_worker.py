"""A rank as a Ray actor: what its process must do before SGLang's actor is made in it.

SGLang's actors load no plugins; without ours they would serve wrong values.
"""

import os
import sys

NODE = "SGLANG_MM_NODE"  # in the environment of a rank: its node's name, for messages
KEEP_DEVICES = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def set_up() -> None:
    """Ray calls it in every new worker process of the job. It does something in those of ranks alone, which have NODE
    in their environment. What it raises is the reason that Ray gives for the actor's end.
    """
    if NODE not in os.environ:
        return
    if os.environ.get(KEEP_DEVICES) == "1":
        # SGLang takes Ray's GPU numbers for numbers among all GPUs of the machine
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    from sglang.srt.plugins import load_plugins

    from sglang_mm.serving.platform import has_accelerator, without_cuda_devices
    from sglang_mm.serving.selfcheck import check_plugin

    if not has_accelerator():
        without_cuda_devices()
    load_plugins()
    check_plugin()


def ray_node() -> str:
    """Ray's id of the node this process runs on; empty in a process that Ray did not start."""
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else ""
