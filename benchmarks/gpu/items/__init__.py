"""The items of the queue, in the order in which they run."""

from __future__ import annotations

from benchmarks.gpu.item import Item

ITEMS: tuple[Item, ...] = ()
