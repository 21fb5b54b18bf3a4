"""The call of FA4 compiles for sm_90, without a GPU, to wgmma and TMA and no spills. Through our own call of it.

A child process compiles, since the library reads its target from the environment when it is imported.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.kernels.compiled import why_not

ROOT = Path(__file__).parents[2]
UNABLE = "flash-attn-4 is not installed" if find_spec("flash_attn") is None else why_not()
pytestmark = pytest.mark.skipif(UNABLE is not None, reason=UNABLE or "")

COMMON = ["128 28 4 bfloat16", "64 14 2 bfloat16"]
OTHERS = [
    "128 32 8 bfloat16", "128 16 2 bfloat16", "128 40 8 bfloat16", "128 16 16 bfloat16", "128 28 4 float16",
    "64 16 16 float16", "80 8 8 bfloat16", "96 32 32 bfloat16", "8 4 1 bfloat16",
]  # fmt: skip
"""Head dim, query heads, K/V heads, dtype. Seven, four, eight, five and one query heads per K/V head are those of the
Qwen and InternVL language models; 8 is the smallest head dim that is let through."""
REGISTERS = 65536 // 384 // 8 * 8
"""Of an SM, shared by the 384 threads of a block, in steps of 8: more, and no block would fit."""


def compile_variants(variants: list[str], arch: str, folder: Path) -> dict[str, dict]:
    """What each became, or {"error": ...}."""
    environment = os.environ | {
        "FLASH_ATTENTION_ARCH": arch, "CUTE_DSL_ARCH": f"{arch}a", "FLASH_ATTENTION_NUM_SMS": "132",
        "CUTE_DSL_KEEP": "ptx,cubin", "CUTE_DSL_DUMP_DIR": str(folder), "CUTE_DSL_DISABLE_FILE_CACHING": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.kernels.test_fa4_compile", str(folder), *variants]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def faults(found: dict) -> list[str]:
    if "error" in found:
        return [found["error"]]
    lacking = [name for name in ("wgmma", "tma_loads", "tma_stores") if not found[name]]
    spills = [name for name in ("stack", "local", "local_accesses") if found[name]]
    return lacking + spills + (["registers"] if found["registers"] > REGISTERS else [])


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> dict[str, dict]:
    """All that this run selected, in one process."""
    here = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    variants = [item.callspec.params["variant"] for item in here if "variant" in item.callspec.params]
    return compile_variants(variants, "sm_90", tmp_path_factory.mktemp("sm_90"))


@pytest.mark.parametrize("variant", [*COMMON, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_it_compiles_to_wgmma_and_tma_without_spills(variant, compiled):
    assert not faults(compiled[variant]), compiled[variant]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"wgmma": 0}, "wgmma"),
        ({"tma_loads": 0}, "tma_loads"),
        ({"local_accesses": 3}, "local_accesses"),
        ({"stack": 8}, "stack"),
        ({"registers": 176}, "registers"),
        ({"error": "ValueError"}, "ValueError"),
    ],
)
def test_faults_are_noticed(change, fault):
    good = {"wgmma": 1, "tma_loads": 1, "tma_stores": 1, "stack": 0, "local": 0, "local_accesses": 0, "registers": 168}
    assert not faults(good) and faults(good | change) == [fault]


@pytest.mark.slow
def test_sm_100_refuses_lists_for_128_rows(tmp_path):
    """What `unfit` says of it. Once this fails, FA4 can be let through there."""
    found = compile_variants(COMMON[:1], "sm_100", tmp_path)[COMMON[0]]
    assert re.search(r"block size 128, which must be a multiple of 256", found["error"]), found


def compile_one(folder: Path, dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> dict:
    """In this process, for tensors that have no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sglang_mm.kernels.fa4_backend import block_sparse_attention

    slots, key_tiles, longest = 16, 32, 9
    with FakeTensorMode():
        q = torch.empty(1, 128 * slots, heads, dim, dtype=dtype, device="cuda")
        k, v = (torch.empty(1, 128 * key_tiles, kv_heads, dim, dtype=dtype, device="cuda") for _ in range(2))
        count = torch.empty(1, heads, slots, dtype=torch.int32, device="cuda")
        index = torch.empty(1, heads, slots, longest, dtype=torch.int32, device="cuda")
        try:
            out, lse = block_sparse_attention(q, k, v, count, index, dim**-0.5)
        except Exception as error:  # of the library or of the compiler
            return {"error": f"{type(error).__name__}: {error}"}
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == (1, heads, 128 * slots) and lse.dtype == torch.float32
    return read_code(folder)


def read_code(folder: Path) -> dict:
    """Of the one kernel in the folder, which is emptied."""
    import triton

    (ptx_file,), (cubin,) = folder.glob("*.ptx"), folder.glob("*.cubin")
    ptx, dump = ptx_file.read_text(), triton.knobs.nvidia.cuobjdump.path
    usage, sass = (
        subprocess.run([dump, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    ptx_file.unlink()
    cubin.unlink()
    used = {name: max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "local_accesses": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", sass)),
        "tma_stores": len(re.findall(r"\bUTMASTG\b", sass)),
        "ptx_wgmma": ptx.count("wgmma.mma_async"),
    }


def main(folder: str, *variants: str) -> None:
    from sglang_mm.kernels import fa4_backend
    from sglang_mm.kernels.problem import Problem

    assert not {"flash_attn", "cutlass"} & set(sys.modules), "loaded with our modules"
    found = {}
    for variant in variants:
        *sizes, dtype = variant.split()
        dim, heads, kv_heads = map(int, sizes)
        dtype = getattr(torch, dtype)
        problem = Problem(torch.device("cuda"), 90, dtype, heads, kv_heads, dim, 128, 128, items=1, entries=1)
        why = None if "10" in os.environ["FLASH_ATTENTION_ARCH"] else fa4_backend.unfit(problem)
        found[variant] = {"error": why} if why else compile_one(Path(folder), dim, heads, kv_heads, dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
