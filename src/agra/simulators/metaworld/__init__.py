"""Meta-World's 50 tasks; in its own environment, made by `make env-metaworld`.

Importing it asks, on Linux, for EGL rendering unless the variable MUJOCO_GL says otherwise: MuJoCo's own choice needs a screen.
"""

import os
import sys

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
