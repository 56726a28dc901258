"""`python -m benchmarks.gpu`: see `benchmarks.gpu.queue`."""

import sys

from benchmarks.gpu.queue import main

sys.exit(main())
