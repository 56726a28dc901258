"""A profile as text in the terminal and as sections of a page. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from byol_fast.report.charts import Series, bar_chart, scatter, timeline
from byol_fast.report.page import Section, chart_grid, details, facts, paragraph, table
from byol_fast.utils.errors import reason
from byol_fast.utils.output import PlainConsole
from byol_fast.utils.records import read_json

_LEVELS = {
    "A": "one kernel per operation",
    "B": "fused by inductor",
    "D": "batch norm fused with convolutions",
    "E": "lower bound",
}


def sections(profile: dict[str, Any]) -> list[Section]:
    """Sections of a page about a profile.

    Args:
        profile: content of `profile.json`.
    """
    sections = [
        Section("Profile: findings", _key_figures(profile) + _findings(profile)),
        Section("Profile: time", _time(profile)),
    ]
    if profile["roofline"] is not None:
        sections.append(Section("Profile: roofline", _limit(profile)))
    return [*sections, Section("Profile: machine and kernels", _machine(profile))]


def run_sections(run_dir: Path) -> list[Section]:
    """Sections about the profile in a run folder; none if the run was not profiled."""
    path = run_dir / "profile" / "profile.json"
    if not path.exists():
        return []
    try:
        return sections(read_json(path))
    except Exception as error:  # any part of a damaged file, or of another version's, may be of another type
        return [Section("Profile", paragraph(f"Left out: {path} could not be shown ({reason(error)})."))]


def show(profile: dict[str, Any]) -> None:
    """Print a profile: phases, families, limits and findings."""
    console = PlainConsole()
    step, limit = profile["step"], profile["roofline"]
    console.print(_headline(profile), soft_wrap=True)

    phases = Table(title="phases of a step", title_justify="left")
    for column in ("phase", "ms", "share", "floor, ms", _memory_title(profile)):
        phases.add_column(column, justify="left" if column == "phase" else "right")
    for row in profile["phases"]:
        phases.add_row(*_phase_cells(row))
    console.print(phases)

    families = Table(title=_families_title(profile), title_justify="left")
    for column in ("family", "ms", "calls"):
        families.add_column(column, justify="left" if column == "family" else "right")
    for row in profile["families"]:
        families.add_row(row["family"], f"{1e3 * row['seconds']:.3g}", f"{row['calls']:.4g}")
    console.print(families)

    if limit is not None:
        floor = 1e3 * limit["floor_seconds"][limit["level"]]
        console.print(
            f"MFU {limit['mfu']:.1%}, bandwidth {limit['bandwidth_use']:.1%} of the ceilings of "
            f"{limit['ceilings']['name']}; floor {floor:.3g} ms per step (measured: "
            f"{1e3 * step['seconds']:.4g})",
            soft_wrap=True,
        )
    for number, finding in enumerate(profile["findings"], 1):
        console.print(f"{number}. {_sentence(finding)}", soft_wrap=True, style="bold")
    if not profile["findings"]:
        console.print("No findings.", style="green")
    for note in profile["notes"]:
        console.print(note, soft_wrap=True, style="dim")


def roofline_chart(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ceilings: Mapping[str, Any],
    *,
    title: str,
    measured: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str:
    """Roofline chart as SVG: the throughput of blocks of layers below the ceilings of a device.

    Args:
        points: FLOP/byte and TFLOP/s of each block, by group.
        ceilings: fields of a `Ceilings`.
        title: of the chart.
        measured: FLOP/byte and TFLOP/s of a profiled step by phase, as a separate group.
    """
    groups = [Series(name, list(x), list(y)) for name, (x, y) in points.items()]
    if measured is not None and measured[0]:
        groups.append(Series("measured, by phase", list(measured[0]), list(measured[1])))
    bandwidth, ridge = ceilings["bytes_per_s"], ceilings["flops_per_s"] / ceilings["bytes_per_s"]
    intensities = [ridge, *(x for group in groups for x in group.x if x is not None)]
    roof = [min(intensities) / 2, ridge, max(intensities) * 2]
    line = Series(ceilings["name"], roof, [min(x, ridge) * bandwidth / 1e12 for x in roof])
    return scatter(groups, title=title, x_label="FLOP / byte", y_label="TFLOP/s", x_log=True, y_log=True, lines=[line])


# ------------------------------------------------------------------ parts of the page


def _headline(profile: dict[str, Any]) -> str:
    step = profile["step"]
    return (
        f"{profile['recipe']}: {profile['encoder']}, batch {profile['global_batch_size']}, {profile['precision']}, "
        f"{profile['mode']}, {profile['device']}: {1e3 * step['seconds']:.4g} ms per step, "
        f"{step['images_per_second']:.4g} images per second"
    )


def _sentence(finding: dict[str, Any]) -> str:
    return f"{finding['kind']}: {finding['text']}. {finding['change'][0].upper()}{finding['change'][1:]}."


def _key_figures(profile: dict[str, Any]) -> str:
    step, limit, machine = profile["step"], profile["roofline"], profile["machine"]
    figures = [
        ("Images per second", f"{step['images_per_second']:.4g}", f"batch {profile['global_batch_size']}"),
        (
            "Step time",
            f"{1e3 * step['seconds']:.4g} ms",
            f"p20 to p80: {1e3 * step['seconds_p20']:.4g} to {1e3 * step['seconds_p80']:.4g}",
        ),
        ("Waiting for data", f"{step['data_wait']:.1%}", "of a step"),
    ]
    if limit is not None:
        floor = limit["floor_seconds"][limit["level"]]
        figures += [
            ("MFU", f"{limit['mfu']:.1%}", f"of {limit['ceilings']['peak_flops_per_s'] / 1e12:.3g} TFLOP/s"),
            ("Memory bandwidth", f"{limit['bandwidth_use']:.1%}", "of a copy, for the least traffic"),
            (
                "Step / floor",
                f"{step['seconds'] / floor:.2f}",
                f"floor {1e3 * floor:.3g} ms at this level of fusion",
            ),
        ]
    if memory := profile.get("memory"):
        figures.append(("Memory, estimated", f"{memory['total'] / 2**30:.3g} GiB", "tensors of a step in eager mode"))
    gpu, telemetry = profile["gpu"], machine["gpu"]
    if gpu is not None:
        figures.append(("GPU idle", f"{gpu['idle']:.1%}", f"{gpu['launches']:.0f} launches per step"))
    if telemetry is not None:
        figures.append(
            ("Energy per image", f"{telemetry['energy_j_per_image']:.3g} J", f"{telemetry['power_w']:.0f} W")
        )
    if gpu is None:
        used = f"{machine['torch_threads']} torch threads, {machine['cores']} cores"
        figures.append(("Cores used", f"{machine['cores_used']:.2f}", used))
    return paragraph(_headline(profile), "faint") + facts(figures)


def _findings(profile: dict[str, Any]) -> str:
    rows = [
        (number, f["kind"], f["text"], f["change"], f"{f['share']:.0%}" if f["share"] else None)
        for number, f in enumerate(profile["findings"], 1)
    ]
    html = (
        table(("", "finding", "measured", "change", "share of step"), rows)
        if rows
        else paragraph("No findings.", "good")
    )
    return html + "".join(paragraph(note, "faint") for note in profile["notes"])


def _time(profile: dict[str, Any]) -> str:
    phases, start = [], 0.0
    for row in profile["phases"]:
        if row["share"] > 0:
            end = start + 1e3 * row["seconds"]
            phases.append((row["phase"], [(start, end, row["phase"])]))
            start = end
    charts = [timeline(phases, title="Phases in sequence, mean of all steps")]
    step = profile["timeline"]
    rows = [("phases", [(p["begin"], p["end"], p["phase"]) for p in step["phases"]])]
    if step["kernels"]:
        rows.append(("kernels", [(k["begin"], k["end"], k["family"]) for k in step["kernels"]]))
    charts.append(timeline(rows, title="Timeline of one step"))
    families = profile["families"][:10]
    charts.append(
        bar_chart(
            [f["family"] for f in families],
            [1e3 * f["seconds"] for f in families],
            title=_families_title(profile),
            x_label="ms",
        )
    )
    table_rows = [
        (
            row["phase"],
            1e3 * row["seconds"],
            100 * row["share"],
            None if row["floor_seconds"] is None else 1e3 * row["floor_seconds"],
            None if row["peak_bytes"] is None else round(row["peak_bytes"] / 2**20),
        )
        for row in profile["phases"]
    ]
    headers = ("phase", "ms", "% of the step", "floor, ms", _memory_title(profile))
    return chart_grid(charts) + table(headers, table_rows)


def _limit(profile: dict[str, Any]) -> str:
    limit = profile["roofline"]
    seconds = {row["phase"]: row["seconds"] for row in profile["phases"]}
    work = {phase: w for phase, w in limit["phases"].items() if w["flops"] and seconds.get(phase)}
    measured = (
        [w["flops"] / w["bytes"] for w in work.values()],
        [w["flops"] / seconds[phase] / 1e12 for phase, w in work.items()],
    )
    points = {name: (p["x"], p["y"]) for name, p in limit["points"].items()}
    chart = roofline_chart(
        points, limit["ceilings"], title="Roofline of each block of layers, and measured phases", measured=measured
    )
    c = limit["ceilings"]
    text = (
        f"A step needs {limit['flops'] / 1e12:.4g} TFLOP and moves at least {limit['bytes'] / 1e9:.4g} GB at "
        f"fusion level {limit['level']}. {c['name']} ({c['source']}): {c['bytes_per_s'] / 1e9:.4g} GB/s copied, "
        f"{c['flops_per_s'] / 1e12:.4g} TFLOP/s in {c['dtype']} products; MFU is relative to "
        f"{c['peak_flops_per_s'] / 1e12:.4g}."
    )
    rows = [
        (level, _LEVELS[level], 1e3 * floor, profile["global_batch_size"] / floor)
        for level, floor in limit["floor_seconds"].items()
    ]
    return paragraph(text) + chart_grid([chart]) + table(("level", "fusion", "floor, ms", "maximum images/s"), rows)


def _machine(profile: dict[str, Any]) -> str:
    machine, gpu = profile["machine"], profile["gpu"]
    rows: list[tuple[str, object]] = [
        ("cores used", machine["cores_used"]),
        ("cores", machine["cores"]),
        ("torch threads", machine["torch_threads"]),
        ("cores used by other processes", machine["others"]),
    ]
    for group in (machine["gpu"] or {}, {k: v for k, v in (gpu or {}).items() if k != "gaps"}):
        rows += [(name.replace("_", " "), value) for name, value in group.items()]
    html = table(("machine", "value"), rows)
    if gpu is not None and gpu["gaps"]:
        html += "<h3>Longest gaps between kernels</h3>"
        html += table(("ms", "before"), [(gap["milliseconds"], gap["before"]) for gap in gpu["gaps"]])
    kernels = [(k["name"][:90], k["family"], 1e3 * k["seconds"], k["calls"]) for k in profile["kernels"]]
    listed = table(("kernel" if gpu is not None else "operation", "family", "ms per step", "calls per step"), kernels)
    files = paragraph(
        f"Beside this page: {', '.join(profile['files'])}. trace.json.gz opens at https://ui.perfetto.dev.", "faint"
    )
    return html + details("Longest kernels" if gpu is not None else "Longest operations", listed) + files


def _families_title(profile: dict[str, Any]) -> str:
    return "CPU operations, slowed down by the profiler" if profile["on_cpu"] else "GPU kernels by family"


def _memory_title(profile: dict[str, Any]) -> str:
    return "process, MiB" if profile["on_cpu"] else "peak, MiB"


def _phase_cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    floor, peak = row["floor_seconds"], row["peak_bytes"]
    return (
        row["phase"],
        f"{1e3 * row['seconds']:.3g}",
        f"{row['share']:.1%}",
        "" if floor is None else f"{1e3 * floor:.3g}",
        "" if peak is None else f"{peak / 2**20:.0f}",
    )
