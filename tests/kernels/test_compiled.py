"""Every shipped configuration of every Triton kernel compiles for every arch to the machine code it is to be."""

from importlib import import_module

import pytest

from tests.kernels.compiled import (
    Compiled,
    Job,
    compile_all,
    compile_variant,
    faults,
    jobs_of,
    shipped_modules,
    variant_of,
    why_not,
)

UNABLE = why_not()
pytestmark = pytest.mark.skipif(UNABLE is not None, reason=UNABLE or "")
MODULES = [] if UNABLE else shipped_modules()
SHIPPED = [job for module in MODULES for job in jobs_of(module)]
CONTROLS = [] if UNABLE else jobs_of("tests.kernels.compile_controls")
FAULTS = {
    "large:sm_90": ["bytes spilled", "bytes of local memory", "wgmma serialized"],
    "deep:sm_89": ["bytes of shared memory > 101376", "not one block fits"],
    "not divisible:sm_90": ["no cp.async"],
    "half a warpgroup:sm_90": ["no wgmma"],
    "no descriptors:sm_90": ["no TMA"],
}
"""Of the controls; those that are not named have none."""


@pytest.fixture(scope="module")
def compiled(request) -> dict:
    """All that this run selected, at once, so that no process waits for another test."""
    here = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return compile_all([item.callspec.params["job"] for item in here])


def marked(job: Job):
    return pytest.param(job, id=str(job), marks=[pytest.mark.slow] if job.is_rare else [])


@pytest.mark.parametrize("job", [marked(job) for job in SHIPPED])
def test_shipped(job, compiled):
    wrong = faults(variant_of(job), job.arch, compiled[job])
    assert wrong == [], compiled[job]


@pytest.mark.parametrize("job", CONTROLS, ids=str)
def test_controls_have_the_faults_they_are_made_for(job, compiled):
    found = faults(variant_of(job), job.arch, compiled[job])
    wanted = FAULTS.get(str(job).partition(":")[2], [])
    assert len(found) == len(wanted) and all(want in line for want, line in zip(wanted, found)), compiled[job]


def test_what_does_not_compile_has_a_fault():
    from tests.kernels.compile_controls import POINTERS, REFUSED

    (fault,) = faults(REFUSED, 80, compile_variant(REFUSED, 80))
    assert "fp8e4nv not supported" in fault
    (fault,) = faults(POINTERS, 90, compile_variant(POINTERS._replace(signature={"A": "*bf16"}), 90))
    assert "signature of ['A'], not ['A', 'B'" in fault


def test_the_blocks_of_an_sm():
    """By registers, by shared memory and by warps: 256 threads with 168 registers; 96 KiB; 4 warps and nothing else."""
    assert Compiled(0, registers=168, warps=8).blocks_per_sm(90) == 1
    assert Compiled(0, registers=168, warps=4).blocks_per_sm(90) == 3  # 65536 / (4 * 32 * 168) = 3.05
    assert Compiled(0, registers=32, warps=4, shared=96 * 1024).blocks_per_sm(90) == 2  # 228 / (96 + 1)
    assert Compiled(0, registers=32, warps=4, shared=96 * 1024).blocks_per_sm(120) == 1
    assert [Compiled(0, registers=32, warps=4).blocks_per_sm(arch) for arch in (80, 89)] == [16, 12]


def test_every_module_with_a_kernel_has_variants():
    """Of its own, or of the module that launches it."""
    from triton import JITFunction

    with_kernels = {
        name
        for name in MODULES
        if any(isinstance(it, JITFunction) and it.__module__ == name for it in vars(import_module(name)).values())
    }
    assert with_kernels and with_kernels == {variant_of(job).fn.__module__ for job in SHIPPED}
