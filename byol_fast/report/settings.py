"""Sections about corrupt images, options and environment."""

from __future__ import annotations

from byol_fast import config as configs
from byol_fast.config import recipes
from byol_fast.report.formatting import as_text
from byol_fast.report.page import Section, details, paragraph, table
from byol_fast.report.reading import RunFiles
from byol_fast.utils.records import flatten


def corrupt_images(run: RunFiles) -> list[Section]:
    """Images that were skipped because they could not be read."""
    if not run.corrupt_images:
        return []
    shown = run.corrupt_images[:50]
    rows = [[str(r.get("image", "?")), str(r.get("reason", "?")), as_text(r.get("batch_number", ""))] for r in shown]
    num_more = len(run.corrupt_images) - len(shown)
    rest = paragraph(f"{num_more} more are listed in corrupt_images.jsonl.", "faint") if num_more else ""
    return [Section("Corrupt images", table(["image", "reason", "batch"], rows) + rest)]


def options(run: RunFiles) -> list[Section]:
    """The configuration: differences from the recipe first, all options folded away."""
    if not run.values:
        return []
    html = ""
    if run.config is not None and run.config.recipe in recipes.RECIPES:
        recipe = run.config.recipe
        differences = configs.differences(recipes.get(recipe), run.config)
        rows = [[k, as_text(b), as_text(a)] for k, (a, b) in differences.items() if k not in {"name", "out"}]
        headers = ["option", "this run", f"recipe {recipe}"]
        html = table(headers, rows) if rows else paragraph(f"All options are those of the recipe {recipe}.")
    rows = [[key, as_text(value)] for key, value in flatten(run.values).items()]
    return [Section("Options", html + details("All options", table(["option", "value"], rows)))]


def environment(run: RunFiles) -> list[Section]:
    """Machine and versions."""
    if not run.environment:
        return []
    rows = [[key, as_text(value)] for key, value in flatten(run.environment).items()]
    return [Section("Environment", table(["name", "value"], rows))]
