"""Items of the queue, in the order in which they run; predictions are for one H100 or H200 with 16 CPU cores."""

from __future__ import annotations

from benchmarks.gpu.item import START_SECONDS, Item

HERE = "benchmarks.gpu.items"
FOLDER = "benchmarks/gpu/items"
KERNELS, PACKAGE = "kernels/byol_kernels", "byol_fast"
SHARED = (KERNELS, PACKAGE, f"{FOLDER}/common.py", f"{FOLDER}/timing.py")

REFERENCES = (
    "tests/networks.py",
    "tests/oracle.py",
    "tests/kernels/numerics.py",
    "tests/kernels/torchvision_reference.py",
)

ITEMS: tuple[Item, ...] = (
    Item(
        name="ceilings",
        question="How fast does the GPU copy memory and multiply matrices?",
        run=f"{HERE}.ceilings:run",
        # Six sizes in three dtypes, 0.15 s each, and making the operands: 16 s on an H200.
        seconds=START_SECONDS + 16,
        depends_on=(f"{PACKAGE}/profiling/ceilings.py", f"{FOLDER}/ceilings.py"),
        memory_gib=6,
    ),
    Item(
        name="smoke",
        question="Are the kernels right, and the step in all modes?",
        run=f"{HERE}.smoke:run",
        # About 25 Triton kernels of 1 s, and a small network compiled four times: 42 s on an H200.
        seconds=START_SECONDS + 45,
        depends_on=(*SHARED, f"{FOLDER}/smoke.py", f"{FOLDER}/smoke_step.py", *REFERENCES),
        memory_gib=2,
    ),
    Item(
        name="resnet50_eager",
        question="How fast is an eager step of ResNet-50 beside the baseline and lightly, also with cudnn.benchmark?",
        run=f"{HERE}.resnet50:eager",
        # About 150 steps of 0.1 s and 150 of 0.2 s, and cuDNN trying its algorithms twice: 46 s on an H200.
        seconds=START_SECONDS + 50,
        depends_on=(*SHARED, f"{FOLDER}/resnet50.py"),
        memory_gib=40,
    ),
    Item(
        name="kernels",
        question="How close to the bandwidth of a copy are the kernels, and how do other libraries compare?",
        run=f"{HERE}.kernels:run",
        # Timing takes 3 s; parameters and images on the CPU and torch.compile of the baseline's loss: 24 s on an H200.
        seconds=START_SECONDS + 25,
        depends_on=(*SHARED, f"{FOLDER}/kernels.py"),
        memory_gib=8,
    ),
    Item(
        name="resnet50_compiled",
        question="How fast is a compiled and captured step of ResNet-50, and where does its time go?",
        run=f"{HERE}.resnet50:compiled",
        # 215 generated kernels, compiled by 16 processes: 70 s on an H200 (from inductor's cache 42 s); steps and a
        # trace: 14 s.
        seconds=START_SECONDS + 90,
        first_figure=START_SECONDS + 80,
        depends_on=(*SHARED, f"{FOLDER}/resnet50.py"),
        memory_gib=60,
    ),
    Item(
        name="layers",
        question="Which forms of a ResNet's first convolution, max pooling and batch statistics are fastest?",
        run=f"{HERE}.layers:run",
        # 57 s on an H200, most of it four generated kernels. cuDNN's own trials (cudnn.benchmark) take over 40 s more.
        seconds=START_SECONDS + 60,
        depends_on=(*SHARED, f"{FOLDER}/kernels.py", f"{FOLDER}/layers.py"),
        memory_gib=20,
    ),
    Item(
        name="gpu_tests",
        question="Do the tests marked gpu pass?",
        run=f"{HERE}.gpu_tests:run",
        # 25 processes, eight at a time, each with 10 s of imports and collecting: 115 s on an H200.
        seconds=START_SECONDS + 115,
        first_figure=START_SECONDS + 40,
        depends_on=(KERNELS, PACKAGE, "tests", f"{FOLDER}/gpu_tests.py", f"{FOLDER}/pytest_records.py"),
        memory_gib=30,
        own_process=True,
    ),
    Item(
        name="resnet18_cifar",
        question="How fast is a step of ResNet-18 on 32 px, on a fixed batch and through the device cache?",
        run=f"{HERE}.cifar:speed",
        # Two networks compiled, 20 to 35 s each; 7 rounds of 0.3 s for each of ten cases.
        seconds=START_SECONDS + 95,
        first_figure=START_SECONDS + 15,
        depends_on=(*SHARED, f"{FOLDER}/cifar.py"),
        memory_gib=10,
    ),
    Item(
        name="cifar10_recipe",
        question="Which kNN accuracy does `byol-fast bench cifar10` with cifar10_fast reach in the time that is left?",
        run=f"{HERE}.cifar:recipe",
        # 10 s to unpack, 5 s to decode, 30 s to compile for the measurement of a step, 10 to 30 s again for the run
        # (inductor's cache), 2 s an epoch, 1 s an evaluation, 10 s at the end. The rest of the time is trained.
        seconds=START_SECONDS + 150,
        first_figure=START_SECONDS + 100,
        depends_on=(*SHARED, f"{FOLDER}/cifar.py"),
        files=(".gpu/cifar10_jpeg.tar.xz",),
        memory_gib=10,
    ),
    Item(
        name="dali",
        question="Are the views of DALI correct, also under load, and does loading keep up with the step?",
        run=f"{HERE}.dali:run",
        # Parity (torchvision on the CPU), loaders, the step from inductor's cache: 129 s on an H200.
        seconds=START_SECONDS + 130,
        first_figure=START_SECONDS + 30,
        depends_on=(*SHARED, f"{FOLDER}/dali.py"),
        modules=("nvidia.dali",),
        memory_gib=60,
        own_process=True,
        not_rehearsed="DALI's decoder and operators need a GPU",
    ),
    Item(
        name="baseline_compiled",
        question="How fast is the baseline under torch.compile?",
        run=f"{HERE}.resnet50:baseline_compiled",
        # The baseline passes the encoder four times, twice the graph of byol_fast's: 130 s on an H200.
        seconds=START_SECONDS + 175,
        first_figure=START_SECONDS + 165,
        depends_on=(*SHARED, f"{FOLDER}/resnet50.py"),
        memory_gib=60,
    ),
    Item(
        name="profile",
        question="Where does the time of a run from JPEG files go?",
        run=f"{HERE}.observe:profile",
        # About 60 steps of 0.1 s, ceilings, experiments and a page.
        seconds=START_SECONDS + 50,
        depends_on=(*SHARED, f"{FOLDER}/observe.py"),
        memory_gib=40,
    ),
    Item(
        name="ncu",
        question="How much memory do the heaviest kernels move, and at which bandwidth?",
        run=f"{HERE}.observe:ncu",
        # The step from inductor's cache in a new process 40 s; 300 launches of 0.15 s.
        seconds=START_SECONDS + 90,
        depends_on=(*SHARED, f"{FOLDER}/observe.py"),
        programs=("ncu",),
        memory_gib=40,
        not_rehearsed="ncu needs a GPU",
    ),
    Item(
        name="power",
        question="Which power and clocks does the GPU reach while captured steps run without a pause?",
        run=f"{HERE}.observe:power",
        # The step from inductor's cache 45 s, 10 s of steps.
        seconds=START_SECONDS + 60,
        depends_on=(*SHARED, f"{FOLDER}/observe.py"),
        memory_gib=60,
        not_rehearsed="power and clocks are those of a GPU",
    ),
)
