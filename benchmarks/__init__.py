"""The asv suite. asv imports this first, so what must be set before Numba is imported is set here."""

import os

# Two spinning threads that meet on one core cost 4 ms or more, now and then.
os.environ.setdefault("OMP_PROC_BIND", "true")
os.environ["NHWCONV_TUNING"] = "off"

if "ASV_COMMIT" in os.environ and "ASV_ENV_DIR" in os.environ:
    # Each commit compiles its own kernels, whatever an older commit's cache thinks of its keys.
    folder = os.path.join(os.environ["ASV_ENV_DIR"], "kernels", os.environ["ASV_COMMIT"])
    os.environ["NUMBA_CACHE_DIR"] = os.environ["NHWCONV_CACHE_DIR"] = folder
