"""A profile as text in the terminal and as sections of a page. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from byol_fast.report.charts import Series, bar_chart, scatter, timeline
from byol_fast.report.formatting import readable
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
        families.add_row(row["family"], readable(1e3 * row["seconds"]), readable(row["calls"], 4))
    console.print(families)

    if limit is not None:
        floor = 1e3 * limit["floor_seconds"][limit["level"]]
        console.print(
            f"MFU {limit['mfu']:.1%}, bandwidth {limit['bandwidth_use']:.1%} of the ceilings of "
            f"{limit['ceilings']['name']}; floor {readable(floor)} ms per step (measured: "
            f"{readable(1e3 * step['seconds'], 4)})",
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
    flops, speeds = ceilings["flops_per_s"], {ceilings["name"]: ceilings["bytes_per_s"]}
    if ceilings.get("cache_bytes"):
        speeds["within caches"] = ceilings["cache_bytes_per_s"]
    ridges = [flops / speed for speed in speeds.values()]
    intensities = [*ridges, *(x for group in groups for x in group.x if x is not None)]
    lines = []
    for (name, speed), ridge in zip(speeds.items(), ridges, strict=True):
        roof = [min(intensities) / 2, ridge, max(intensities) * 2]
        lines.append(Series(name, roof, [min(x, ridge) * speed / 1e12 for x in roof]))
    return scatter(groups, title=title, x_label="FLOP / byte", y_label="TFLOP/s", x_log=True, y_log=True, lines=lines)


# ------------------------------------------------------------------ parts of the page


def _headline(profile: dict[str, Any]) -> str:
    step = profile["step"]
    return (
        f"{profile['recipe']}: {profile['encoder']}, batch {profile['global_batch_size']}, {profile['precision']}, "
        f"{profile['mode']}, {profile['device']}: "
        f"{readable(1e3 * step['seconds'], 4)} ms per step, {readable(step['images_per_second'], 4)} images per second"
    )


def _sentence(finding: dict[str, Any]) -> str:
    return f"{finding['kind']}: {finding['text']}. {finding['change'][0].upper()}{finding['change'][1:]}."


def _key_figures(profile: dict[str, Any]) -> str:
    step, limit, machine = profile["step"], profile["roofline"], profile["machine"]
    figures = [
        ("Images per second", readable(step["images_per_second"], 4), f"batch {profile['global_batch_size']}"),
        (
            "Step time",
            f"{readable(1e3 * step['seconds'], 4)} ms",
            f"p20 to p80: {readable(1e3 * step['seconds_p20'], 4)} to {readable(1e3 * step['seconds_p80'], 4)}",
        ),
        ("Waiting for data", f"{step['data_wait']:.1%}", "of a step"),
    ]
    if limit is not None:
        floor = limit["floor_seconds"][limit["level"]]
        figures += [
            ("MFU", f"{limit['mfu']:.1%}", f"of {readable(limit['ceilings']['peak_flops_per_s'] / 1e12)} TFLOP/s"),
            ("Memory bandwidth", f"{limit['bandwidth_use']:.1%}", "of a copy, for the least traffic"),
            (
                "Step / floor",
                f"{step['seconds'] / floor:.2f}",
                f"floor {readable(1e3 * floor)} ms at this level of fusion",
            ),
        ]
    if memory := profile.get("memory"):
        figures.append(
            ("Memory, estimated", f"{readable(memory['total'] / 2**30)} GiB", "tensors of a step in eager mode")
        )
    gpu, telemetry = profile["gpu"], machine["gpu"]
    if gpu is not None:
        figures.append(("GPU idle", f"{gpu['idle']:.1%}", f"{gpu['launches']:.0f} launches per step"))
    if telemetry is not None:
        figures.append(
            ("Energy per image", f"{readable(telemetry['energy_j_per_image'])} J", f"{telemetry['power_w']:.0f} W")
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
        table(("#", "finding", "measured", "change", "share of step"), rows)
        if rows
        else paragraph("No findings.", "good")
    )
    return html + "".join(paragraph(note, "faint") for note in profile["notes"])


def _time(profile: dict[str, Any]) -> str:
    step = profile["timeline"]
    charts = [timeline(_rows(step["phases"], "phase"), title="Timeline of one step")]
    if step["kernels"]:
        charts.append(timeline(_rows(step["kernels"], "family"), title="Kernels of one step"))
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
            f"{row['share']:.1%}",
            None if row["floor_seconds"] is None else 1e3 * row["floor_seconds"],
            None if row["peak_bytes"] is None else round(row["peak_bytes"] / 2**20),
        )
        for row in profile["phases"]
    ]
    headers = ("phase", "ms", "share of step", "floor, ms", _memory_title(profile))
    return chart_grid(charts) + table(headers, table_rows)


def _rows(spans: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, list[tuple[float, float, str]]]]:
    """Spans of time in a row for each of their names."""
    rows: dict[str, list[tuple[float, float, str]]] = {}
    for span in spans:
        rows.setdefault(span[key], []).append((span["begin"], span["end"], span[key]))
    return list(rows.items())


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
        points, limit["ceilings"], title="Roofline: blocks of layers, measured phases", measured=measured
    )
    c, cache = limit["ceilings"], ""
    if c.get("cache_bytes"):
        cache = f" ({readable(c['cache_bytes_per_s'] / 1e9)} within {c['cache_bytes'] / 2**20:,.0f} MiB of cache)"
    text = (
        f"A step needs {readable(limit['flops'] / 1e12)} TFLOP and moves at least {readable(limit['bytes'] / 1e9)} GB "
        f"at fusion level {limit['level']}. {c['name']} ({c['source']}): {readable(c['bytes_per_s'] / 1e9)} GB/s "
        f"copied{cache}, {readable(c['flops_per_s'] / 1e12)} TFLOP/s in {c['dtype']} products; MFU is relative to "
        f"{readable(c['peak_flops_per_s'] / 1e12)}."
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
        readable(1e3 * row["seconds"]),
        f"{row['share']:.1%}",
        "" if floor is None else readable(1e3 * floor),
        "" if peak is None else f"{peak / 2**20:,.0f}",
    )
