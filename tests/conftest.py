"""Settings that every test shares."""

from hypothesis import HealthCheck, settings

# No deadline and no "too slow": how fast a machine is says nothing about what it computes.
settings.register_profile("tests", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
