"""One command that proves and times the kernels on a GPU machine with torch and triton.

    python -m benchmarks.gpu_suite --out DIR [--quick]

    correctness    every backend against the reference; what is red is not timed, and the exit status is 1
    ceilings       what the device copies and multiplies at best
    sparse         per length: the dense baselines, then every green backend, index and permutation included
    ring           one rank after another over the pieces of C ranks: balance of the work, no transport
    model          the prefill of a decoder of 7B shape, dense and sparse
    decode         one row over C parts of the keys, merged, in a CUDA graph

Every job, a step at one length, has a process of its own: what breaks the device or hangs is red, and the job is
repeated without it. Results go to DIR as YYYY-MM-DD-<gpu>, .json with every measurement and .md with tables, first that
of the targets; they are written after every finding, so that a run may be cut off. Where machine time comes in slices,
--steps and --seconds make several runs of it; correctness is part of each. --rehearse
runs every step at toy sizes on a CPU with the reference, to check the suite itself; its report says that it measures
nothing.
"""

from benchmarks.gpu_suite.stand_in import import_catalog

import_catalog()  # before anything here imports patterns
