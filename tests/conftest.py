"""Hypothesis profiles: no deadline (a first call compiles), few examples, and the same ones each time in CI.

What the user of this machine has tuned stays out of the tests.
"""

import os

from hypothesis import HealthCheck, Phase, settings

settings.register_profile("local", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.register_profile("found", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])  # not reduced
settings.register_profile("thorough", settings.get_profile("local"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "local"))

os.environ["NHWCONV_TUNING"] = "off"
