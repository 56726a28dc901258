"""The first section of a report: figures at a glance, and the health of the run in sentences."""

from __future__ import annotations

import math

from byol_fast.report.evaluation_figures import metric_of
from byol_fast.report.evaluations import weaker_than_baselines
from byol_fast.report.formatting import accuracy_interval, differ, duration, interval_text, plural
from byol_fast.report.page import Section, facts, paragraph
from byol_fast.report.reading import RunFiles
from byol_fast.training.health import HEALTHY, advice, assess, largest_std, scale


def health(run: RunFiles) -> list[tuple[str, str]]:
    """The state of a run in sentences, each with its kind: "good", "warn" or ""."""
    messages = [_collapse(run), *_knn_gain(run)]
    messages += [("warn", text) for record in run.evaluations for text in weaker_than_baselines(record)]
    skipped = sum(bool(r.get("skipped")) for r in run.steps)
    if skipped:
        steps = plural(skipped, "step was", "steps were")
        messages.append(("warn", f"{steps} skipped: the loss or a gradient was not finite."))
    waits = [float(r["data_wait"]) for r in run.steps if r.get("data_wait") is not None]
    if waits and sum(waits) / len(waits) > 0.1:
        messages.append(("warn", f"Steps waited for data {sum(waits) / len(waits):.0%} of the time."))
    if run.corrupt_images:
        images = plural(len(run.corrupt_images), "corrupt image was", "corrupt images were")
        messages.append(("warn", f"{images} skipped (listed below)."))
    if len(run.starts) > 1:
        first, *resumed = (f"{t:%Y-%m-%d %H:%M}" for t in run.starts)
        times = ", ".join(resumed[:5]) + (", ..." if len(resumed) > 5 else "")
        messages.append(("", f"Started {first}, resumed {plural(len(resumed), 'time', 'times')}: {times}."))
    return messages + [("warn", f"Left out: {note}.") for note in run.notes]


def _collapse(run: RunFiles) -> tuple[str, str]:
    if not run.steps:
        return "", "No step is recorded yet."
    batch_size, method = run.values.get("batch_size"), run.values.get("method")
    health = assess(run.records, batch_size=batch_size, method=method)
    if health.problem is not None:
        return "warn", f"{health.problem[0].upper()}{health.problem[1:]}."
    if math.isnan(health.embedding_std):
        return "warn", "The last tenth of the steps was skipped: no loss was finite."
    healthy = HEALTHY * largest_std(batch_size)
    if health.embedding_std >= healthy:
        return "good", f"Healthy: the embedding std is {health.embedding_std:.2f} ({scale(batch_size)})."
    return "warn", (
        f"Partly collapsed: the embedding std is {health.embedding_std:.2f} (above {healthy:.2g} is healthy). If it "
        f"keeps falling, try {advice(method)}."
    )


def _knn_gain(run: RunFiles) -> list[tuple[str, str]]:
    """The last kNN accuracy compared with that before the first step, where both are known."""
    evaluated = [r for r in run.records if r.get("knn_top1") is not None]
    if len(evaluated) < 2 or evaluated[0]["step"] != 0:
        return []
    before, after = evaluated[0], evaluated[-1]
    text = f"kNN top-1 accuracy is {after['knn_top1']:.1%}"
    first = f"the {_before_training(run)} encoder"
    intervals = [accuracy_interval(r["knn_top1"], r.get("knn_num_val")) for r in (before, after)]
    if not differ(*intervals):
        overlap = "" if None in intervals else "; the 95 % intervals overlap"
        return [("", f"{text}, that of {first} {before['knn_top1']:.1%}{overlap}.")]
    gain = round(100 * after["knn_top1"], 1) - round(100 * before["knn_top1"], 1)
    difference = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
    return [("good" if gain > 0 else "warn", f"{text}, {difference} {first} ({before['knn_top1']:.1%}).")]


def _before_training(run: RunFiles) -> str:
    return "untrained" if run.config is None else run.config.before_training


def progress(run: RunFiles) -> tuple[str, str]:
    """Progress of a run in a word or two, and in steps and epochs."""
    total, done = run.total_steps, run.last_step
    epochs = next((r["epoch"] for r in reversed(run.steps) if r.get("epoch") is not None), None)
    steps = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    steps += f", {epochs:.4g} epochs" if epochs else ""
    if run.complete:
        return "complete", steps
    return (f"{done / total:.0%} done" if total and done else "not started" if not done else "in progress"), steps


def summary(run: RunFiles) -> Section:
    """The most important figures of a run, and its health."""
    word, steps = progress(run)
    entries = [("Progress", word, steps)]
    model, view = (value if isinstance(value := run.values.get(k), dict) else {} for k in ("model", "view1"))
    method, recipe = str(run.values.get("method", "byol")).upper(), run.values.get("recipe", "")
    if model:
        local = f", {local} local views" if (local := run.values.get("num_local_views")) else ""
        entries.append((method, str(model.get("encoder", "?")), f"recipe {recipe}, {view.get('size', '?')} px{local}"))
    if (loss := run.last("loss")) is not None:
        entries.append(("Loss", f"{loss:.4f}", "mean of the last ten steps"))
    entries += _accuracies(run)
    if (std := run.last("embedding_std")) is not None:
        entries.append(("Embedding std", f"{std:.2f}", "1 healthy, 0 collapsed"))
    speeds = sorted(float(r["images_per_second"]) for r in run.steps if r.get("images_per_second"))
    if speeds:
        steps_time = f"; {duration(run.seconds)} of steps" if run.seconds is not None else ""
        entries.append(("Throughput", f"{speeds[len(speeds) // 2]:,.4g} img/s", f"median{steps_time}"))
    environment = run.environment
    if environment:
        machine = environment.get("gpu") or environment.get("cpu") or "?"
        processes = environment.get("processes", 1)
        more = f"{environment.get('precision', '?')}, {environment.get('mode', '?')}"
        entries.append(("Machine", str(machine), more + (f", {processes} processes" if processes > 1 else "")))
    return Section("Summary", facts(entries) + "".join(paragraph(text, kind) for kind, text in health(run)))


def _accuracies(run: RunFiles) -> list[tuple[str, str, str]]:
    """Figures of the evaluations during the run and after it."""
    entries = []
    evaluated = [r for r in run.records if r.get("knn_top1") is not None]
    if evaluated:
        last, trained = evaluated[-1], [r for r in evaluated if r["step"] > 0]
        k = f"-{last['knn_k']}" if last.get("knn_k") else ""
        when = f"step {last['step']:,}" if trained else _before_training(run)
        if len(trained) > 1:
            best = max(trained, key=lambda r: float(r["knn_top1"]))
            when += f"; best {best['knn_top1']:.1%} at step {best['step']:,}"
        entries.append((f"kNN{k} top-1", f"{last['knn_top1']:.1%}", when))
    for r in run.records:
        if r.get("knn_full_top1") is not None:
            images = f"all {r['knn_num_val']:,} validation images; step {r['step']:,}" if r.get("knn_num_val") else ""
            entries.append(("kNN top-1, all images", f"{r['knn_full_top1']:.1%}", images))
    probed = [r["probe_val_top1"] for r in run.records if r.get("probe_val_top1") is not None]
    if probed:
        entries.append(("Linear probe top-1", f"{probed[-1]:.1%}", f"best {max(probed):.1%}"))
    for record in run.evaluations:
        key, ends, label = metric_of(record)
        if isinstance(record.get(key), int | float):
            num_test = record.get("num_test")
            details = [interval_text(record, ends, prefix="95 %: ")]
            details += [f"{num_test:,} images"] if isinstance(num_test, int) else []
            entries.append((f"eval {record['name']} {label}", f"{record[key]:.1%}", "; ".join(filter(None, details))))
    return entries
