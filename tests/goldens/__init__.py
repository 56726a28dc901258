"""Comparison of this tree's results with those of an earlier commit, bit for bit.

    python -m tests.goldens --base COMMIT [--only PART OF A CASE'S NAME]

Not part of the test suite: it serves a restructuring, and goes when that is done. Both trees run on this machine in one
go. `worker.py` runs in either tree; the names that differ between them are its table `RENAMED`.
"""
