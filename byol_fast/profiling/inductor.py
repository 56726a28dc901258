"""Analysis of inductor's output code and of ncu's tables: kernels, tensors saved for the backward pass, memory traffic.

Three questions decide if fusing convolutions and batch norms by hand is worthwhile: have 1x1 convolutions become matrix
products whose prologue applies the norm and the ReLU; does the backward pass read the outputs of ReLUs, so that they
had to be written; and which kernels move the most bytes.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from byol_fast.profiling.kernels import family_of

NCU_METRICS = (
    "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)  # fmt: skip

_KERNEL = re.compile(r"(?:^def |async_compile\.(?:triton|cpp_pybinding)\(')(\w+)", re.MULTILINE)
_DEFINITION = re.compile(r"^(\w+) = async_compile\.triton\('(\w+)', '''(.*?)'''", re.MULTILINE | re.DOTALL)
_RUN = re.compile(r"^\s+(\w+)\.run\(", re.MULTILINE)
_EXTERN = re.compile(r"(extern_kernels\.\w+|torch\.ops\.aten\.\w+|aten\.\w+)(?:\.default)?\(")
_ARGUMENTS = re.compile(r"^\s+((?:\w+, )*\w+),? = args$", re.MULTILINE)
_SIZES = re.compile(r"assert_size_stride\((\w+), \(([\d, ]*)\)")


def analyze(codes: Sequence[str]) -> dict[str, Any]:
    """Summarize inductor's output code.

    Args:
        codes: sources as `torch._inductor.utils.run_and_get_code` returns them: a forward and a backward graph.

    Returns:
        `graphs`, one per source: `is_backward`, `kernels` (calls by name), `extern` (calls by operator), `templates`,
        `templates_with_prologue` (generated matrix products and convolutions, and those that compute before their
        product), `saved` (of a backward graph: number and elements of the tensors saved by the forward pass, by
        producer); and `answers` as text.
    """
    graphs = [_graph(code) for code in codes]
    return {"graphs": graphs, "answers": _answers(graphs)}


def _graph(code: str) -> dict[str, Any]:
    arguments = next((match[1].split(", ") for match in _ARGUMENTS.finditer(code)), [])
    sizes = {name: math.prod(int(n) for n in shape.split(",") if n.strip()) for name, shape in _SIZES.findall(code)}
    backward = any(name.startswith("tangents") for name in arguments)
    sources = {name: body for name, _, body in _DEFINITION.findall(code)}
    templates = [name for name in sources if name.startswith("triton_tem")]
    saved: dict[str, dict[str, int]] = {}
    if backward:
        for name in arguments:
            kind = re.sub(r"_\d+$", "", name)
            if kind not in {"tangents", "primals"}:
                entry = saved.setdefault(kind, {"tensors": 0, "elements": 0})
                entry["tensors"] += 1
                entry["elements"] += sizes.get(name, 0)
    return {
        "is_backward": backward,
        "kernels": dict(Counter(_RUN.findall(code)).most_common()),
        "defined": len(sources) or len(set(_KERNEL.findall(code))),
        "extern": dict(Counter(_EXTERN.findall(code)).most_common()),
        "templates": templates,
        "templates_with_prologue": [name for name in templates if computes_before_product(sources[name])],
        "saved": saved,
    }


def computes_before_product(source: str) -> bool:
    """True if a generated matrix product computes on its loaded operands before it multiplies.

    Args:
        source: of the kernel of a Triton template.
    """
    before, product, _ = source.partition("tl.dot(")
    if not product:
        return False
    # Fused operations are named tmp0, tmp1 ...; the operands of the template are a and b, or matrix_x and matrix_w.
    return any(
        re.search(r"^\s*tmp\d+ = ", line) and not re.search(r"= (tl\.load|tl\.full|tl\.broadcast_to)\(", line)
        for line in before.splitlines()
    )


def _answers(graphs: Iterable[dict[str, Any]]) -> list[str]:
    graphs = list(graphs)
    convolutions = sum(
        n for g in graphs for name, n in g["extern"].items() if "convolution" in name and "backward" not in name
    )
    backward = sum(n for g in graphs for name, n in g["extern"].items() if "convolution_backward" in name)
    products = sum(n for g in graphs for name, n in g["extern"].items() if re.search(r"\.(add)?mm$|\.bmm$", name))
    templates = [name for g in graphs for name in g["templates"]]
    prologues = [name for g in graphs for name in g["templates_with_prologue"]]
    calls = Counter(name for g in graphs for name, n in g["kernels"].items() for _ in range(n))
    generated = f"{len(templates)} kernels, {sum(calls[t] for t in templates)} calls"
    some = f" ({', '.join(prologues[:4])})" if prologues else ""
    answers = [
        f"library calls: {convolutions} convolutions forward, {backward} backward, {products} matrix products",
        f"generated products and convolutions: {generated}",
        f"prologues: {len(prologues)} of {len(templates)} generated products compute before they multiply{some}",
    ]
    saved: Counter[str] = Counter()
    for g in graphs:
        for kind, entry in g["saved"].items():
            saved[kind] += entry["elements"]
    relu, whole = sum(n for kind, n in saved.items() if "relu" in kind), saved.total()
    listed = ", ".join(f"{kind} {n / 1e6:.1f}" for kind, n in saved.most_common(6))
    answers.append(
        f"backward: reads {relu / 1e6:.1f} M elements of ReLU outputs, of {whole / 1e6:.1f} M saved elements "
        f"(M: {listed})"
    )
    return answers


def read_ncu(text: str) -> list[dict[str, Any]]:
    """Kernels by name from `ncu --csv --page raw --print-units base`, those with the most traffic first.

    Args:
        text: output of ncu, including its messages.

    Returns:
        `kernel`, `family`, `launches`, `read_bytes`, `written_bytes`, `seconds`, `gb_per_s`, `occupancy_percent`
        (mean over launches of active over maximum warps); empty if there is no table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = row.get("Kernel Name") or ""
        if not name:  # the row of units
            continue
        read, written, nanoseconds, occupancy = (_number(row.get(metric)) for metric in NCU_METRICS)
        entry = rows.setdefault(
            name,
            {
                "kernel": name,
                "family": family_of(name, on_gpu=True),
                "launches": 0,
                "read_bytes": 0.0,
                "written_bytes": 0.0,
                "seconds": 0.0,
                "occupancy_percent": 0.0,
            },
        )
        entry["launches"] += 1
        entry["read_bytes"] += read
        entry["written_bytes"] += written
        entry["seconds"] += nanoseconds * 1e-9
        entry["occupancy_percent"] += occupancy
    for entry in rows.values():
        moved = entry["read_bytes"] + entry["written_bytes"]
        entry["gb_per_s"] = moved / entry["seconds"] / 1e9 if entry["seconds"] else 0.0
        entry["occupancy_percent"] /= entry["launches"]
    return sorted(rows.values(), key=lambda e: -(e["read_bytes"] + e["written_bytes"]))


def _number(text: str | None) -> float:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return math.nan


def by_family(kernels: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums of kernels by family.

    Args:
        kernels: result of `read_ncu`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        entry = rows.setdefault(kernel["family"], {"family": kernel["family"], "launches": 0, "gb": 0.0, "ms": 0.0})
        entry["launches"] += kernel["launches"]
        entry["gb"] += (kernel["read_bytes"] + kernel["written_bytes"]) / 1e9
        entry["ms"] += kernel["seconds"] * 1e3
    return sorted(rows.values(), key=lambda e: -e["gb"])
