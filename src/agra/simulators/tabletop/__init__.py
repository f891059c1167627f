"""The embedded world: a table, two floating hands, things to move; physics and rendering by MuJoCo.

Importing it loads MuJoCo and, on Linux, asks for EGL rendering unless the variable MUJOCO_GL says otherwise.
"""

import os
import sys

GL_HELP = (
    "no usable OpenGL library for MUJOCO_GL={backend}: install the Debian packages libegl1 libgl1-mesa-dri"
    " (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa)"
)


def gl_error(error: Exception) -> ImportError:
    """The one line that a missing or broken OpenGL library is reported with."""
    reason = str(error).partition("\n")[0]
    return ImportError(f"{GL_HELP.format(backend=os.environ.get('MUJOCO_GL', ''))} [{type(error).__name__}: {reason}]")


if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
try:
    import mujoco as mujoco
except ModuleNotFoundError as error:
    if error.name != "mujoco":
        raise gl_error(error) from error
    raise ImportError("the tabletop world needs MuJoCo: pip install 'agra[tabletop]'") from error
except (ImportError, AttributeError, RuntimeError) as error:
    # The OpenGL bindings are loaded with mujoco: a missing library shows up as an attribute of None there.
    raise gl_error(error) from error
