"""Settings that every test shares."""

import os

from hypothesis import HealthCheck, settings

# Before anything imports NumPy: pytest runs as many processes as there are cores, and so needs one thread in each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# No deadline and no "too slow": how fast a machine is says nothing about what it computes.
settings.register_profile("tests", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
