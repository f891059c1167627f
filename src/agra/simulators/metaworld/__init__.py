"""Meta-World's 50 tasks, in a Python environment of their own (`make env-metaworld`).

On Linux, the import sets MUJOCO_GL to egl unless it is set: MuJoCo's default needs a screen.
"""

import os
import sys

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
