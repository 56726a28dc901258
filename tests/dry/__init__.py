"""Dry runs of the GPU code without a GPU: `make dry SHIM=FOLDER`, in at most 12 minutes on two idle CPU cores.

Torch's own CUDA operators, Triton's compiler and the trainer run on a CUDA runtime that starts no kernel. That shows
exceptions: dtypes that CUDA lacks, calls that a capture forbids, Triton kernels that do not compile. It shows no
number, and tries neither cuDNN nor the kernels that inductor generates.

FOLDER is not a part of this repository. It holds a launcher, `FOLDER/run PROGRAM ARGUMENTS`, which is called in the
repository's root and runs a program (python) of an environment with the packages of constraints-oldest.txt and a torch
that was built for CUDA. The launcher sets
1. LD_PRELOAD: a CUDA runtime and cuBLAS with one GPU, whose memory is the host's. Copies are made, kernels are counted
   and not run, and a capture refuses what a real one refuses.
2. PYTHONPATH: the repository's root, its `kernels`, and a module `fake_gpu`. Imported before anything else, it turns
   cuDNN off, lets Triton compile for sm_90 without launching, and lets torch.compile use `aot_eager`. Its
   `_shim.shim_count(0)` returns the kernel launches so far, `_shim.shim_count(1)` how often the host has waited. Beside
   it, `site/sitecustomize.py` imports it, for processes that are started from Python.

What torch's CUDA dispatch has accepted goes to `tests/cuda_operators.json`, which `tests/test_cuda_operators.py`
compares on the CPU with what a step asks for.
"""

OK, FAILED = "ok  ", "FAIL"
"""First characters of the line of a result; whatever else a section prints is its log."""
