"""What the shipped configurations of Triton kernels become in machine code, found without a GPU.

`compile_all` compiles them in two processes and remembers what it found under build/; `faults` judges a result. The
assembler and disassembler are those of the triton wheel. An arch is 90 for sm_90.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

PROCESSES = 2
FOLDER = Path(__file__).parents[2] / "build" / "compiled"
KIB = 1024
SHARED_PER_BLOCK = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""The most that one block may ask for; an SM has 1 KiB more, and keeps 1 KiB of it for each block.
CUDA C++ Programming Guide, technical specifications per compute capability, as are the warps and registers below."""
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
REGISTERS_PER_SM, REGISTERS_PER_WARP_STEP, REGISTERS_PER_THREAD = 64 * KIB, 256, 255
HEAD_DIMS, DTYPES = {"64", "80", "96"}, {"fp16", "fp32"}
"""In names of variants: what is rarer than head dim 128 and bf16."""


class Job(NamedTuple):
    """A variant is named, not carried: a process that compiles it imports `module` and asks its `variants()`."""

    module: str
    variant: str
    arch: int

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}:{self.variant}:sm_{self.arch}"

    @property
    def is_rare(self) -> bool:
        """Left to `make test-all`. Compiled every time: bf16, with head dim 128 for all archs, with all for sm_90."""
        words = set(self.variant.split("-"))
        return bool(words & DTYPES) or (self.arch != 90 and bool(words & HEAD_DIMS))


class Compiled(NamedTuple):
    """registers: per thread. local: bytes of local memory per thread. shared: bytes per block.

    spilled: bytes of the spilling loads and stores. local_accesses: STL and LDL, 0 where there is no local memory.
    wgmma, mma, tcgen05, cp_async, tma (loads): instructions in the PTX. serialized: ptxas could not overlap wgmma
    instructions. error: why there is nothing of the above.
    """

    seconds: float
    registers: int = 0
    local: int = 0
    spilled: int = 0
    local_accesses: int = 0
    shared: int = 0
    warps: int = 0
    wgmma: int = 0
    mma: int = 0
    tcgen05: int = 0
    cp_async: int = 0
    tma: int = 0
    serialized: bool = False
    error: str = ""

    def blocks_per_sm(self, arch: int) -> int:
        """How many blocks an SM can hold at a time."""
        warp_registers = -(-self.registers * 32 // REGISTERS_PER_WARP_STEP) * REGISTERS_PER_WARP_STEP
        by_registers = REGISTERS_PER_SM // (warp_registers * self.warps)
        by_shared = (SHARED_PER_BLOCK[arch] + KIB) // (self.shared + KIB)
        return min(by_registers, by_shared, WARPS_PER_SM[arch] // self.warps)


def why_not() -> str | None:
    """None where this process can compile, else the reason."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: kernels of this process are interpreted"
    import triton

    try:
        nvidia = triton.knobs.nvidia
        tools = [tool.path for tool in (nvidia.ptxas, nvidia.ptxas_blackwell, nvidia.cuobjdump, nvidia.nvdisasm)]
    except RuntimeError as error:
        return f"triton without its NVIDIA tools: {error}"
    missing = [tool for tool in tools if not Path(tool).is_file()]
    return f"{', '.join(missing)}: not there" if missing else None


def shipped_modules() -> list[str]:
    """Those of the Triton backend."""
    from sglang_mm.kernels import triton_backend

    return [f"{triton_backend.__name__}.{found.name}" for found in pkgutil.iter_modules(triton_backend.__path__)]


def jobs_of(module: str) -> list[Job]:
    """All variants of a module for all their archs; none if it exports no `variants`."""
    variants = getattr(importlib.import_module(module), "variants", list)()
    assert len({variant.name for variant in variants}) == len(variants), f"{module}: two variants of one name"
    return [Job(module, variant.name, arch) for variant in variants for arch in variant.archs]


def variant_of(job: Job):
    return next(v for v in importlib.import_module(job.module).variants() if v.name == job.variant)


def compile_all(jobs: list[Job]) -> dict[Job, Compiled]:
    """Compile what is not remembered. What did not compile is not, and is tried again."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = {job: FOLDER / f"{_key(job)}.json" for job in jobs}
    results = {job: Compiled(**json.loads(file.read_text())) for job, file in files.items() if file.exists()}
    missing = [job for job in jobs if job not in results]
    if missing:
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            for job, found in zip(missing, pool.map(compile_job, missing)):
                results[job] = found
                if not found.error:
                    _write(files[job], json.dumps(found._asdict()))
    return results


def compile_job(job: Job) -> Compiled:
    return compile_variant(variant_of(job), job.arch)


def compile_variant(variant, arch: int) -> Compiled:
    """Compile in this process. What is raised becomes `error`."""
    began = time.monotonic()
    try:
        kernel, log = _compile(variant, arch)
        return _inspect(kernel, log, time.monotonic() - began)
    except Exception as error:  # of many classes, some of which could not be sent to another process
        return Compiled(time.monotonic() - began, error=f"{type(error).__name__}: {error}")


def _compile(variant, arch: int) -> tuple:
    """(compiled kernel, what ptxas says); nothing is kept in Triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.signature)
    if names != variant.fn.arg_names:
        raise ValueError(f"signature of {names}, not {variant.fn.arg_names}")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(variant.fn, variant.signature, variant.constexprs, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    log, knobs = StringIO(), triton.knobs
    with ExitStack() as stack:
        for scope in (knobs.cache, knobs.compilation, knobs.nvidia):
            stack.enter_context(scope.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        stack.enter_context(redirect_stdout(log))  # triton prints the log, and all of the PTX that ptxas refuses
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), log.getvalue()


def faults(variant, arch: int, compiled: Compiled) -> list[str]:
    """What is wrong with the machine code, one line each; empty for good code."""
    if compiled.error:
        return [compiled.error]
    limit = SHARED_PER_BLOCK[arch]
    found = {
        f"{compiled.spilled} bytes spilled": compiled.spilled > 0,
        f"{compiled.local} bytes of local memory, {compiled.local_accesses} STL/LDL": compiled.local > 0,
        f"{compiled.registers} registers > {REGISTERS_PER_THREAD}": compiled.registers > REGISTERS_PER_THREAD,
        f"{compiled.shared} bytes of shared memory > {limit}": compiled.shared > limit,
        "not one block fits an SM": compiled.blocks_per_sm(arch) < 1,
        "no wgmma": variant.wgmma and arch == 90 and not compiled.wgmma,
        "wgmma serialized": compiled.serialized,
        "no TMA": variant.tma and arch >= 90 and not compiled.tma,
        "no cp.async": variant.cp_async and not compiled.cp_async,
    }
    return [line for line, is_so in found.items() if is_so]


def _inspect(kernel, log: str, seconds: float) -> Compiled:
    import triton

    ptx, tools = kernel.asm["ptx"], triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools.cuobjdump.path, "-res-usage", file.name)
        local = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
        sass = _output(tools.nvdisasm.path, "-c", file.name) if local else ""  # some 0.3 s, so only where it tells
    return Compiled(
        seconds=round(seconds, 3),
        registers=_number(r"REG:(\d+)", usage),
        local=local,
        spilled=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        local_accesses=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global", ptx)),
        serialized="serialized" in log,
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _number(pattern: str, text: str) -> int:
    """The one number; a log of another form is an error, never a zero."""
    (found,) = re.findall(pattern, text)
    return int(found)


def _key(job: Job) -> str:
    """Of all that decides the result: versions, this file, the kernel with all it calls, the variant, the arch."""
    import triton

    variant = variant_of(job)
    parts = triton.__version__, Path(__file__).read_text(), variant.fn.cache_key, variant._replace(fn=None), job.arch
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    """All at once: two test runs may share the folder."""
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)
