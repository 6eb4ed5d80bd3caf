"""Shortlist, offline: data, models, training, evaluation and the model registry."""

import os

# A thread that waits for another keeps its core for milliseconds by default, and where another program wants that
# core, the one that is waited for gets none. Told before torch is imported, which reads it once; decision 0028.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
