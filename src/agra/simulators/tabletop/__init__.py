"""The bundled simulator: a table, two floating hands and objects to move, with MuJoCo's physics and rendering.

The import loads MuJoCo. On Linux it sets MUJOCO_GL to egl unless it is set.
"""

import os
import sys

GL_HELP = (
    "no usable OpenGL library for MUJOCO_GL={backend}: install the Debian packages libegl1 libgl1-mesa-dri"
    " (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa)"
)


def gl_error(error: Exception) -> ImportError:
    """The error for a missing or broken OpenGL library, in one line."""
    reason = str(error).partition("\n")[0]
    return ImportError(f"{GL_HELP.format(backend=os.environ.get('MUJOCO_GL', ''))} [{type(error).__name__}: {reason}]")


if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
try:
    import mujoco as mujoco
except ModuleNotFoundError as error:
    if error.name != "mujoco":
        raise gl_error(error) from error
    raise ImportError("the tabletop needs MuJoCo: pip install '.[tabletop]' in a checkout of agra") from error
except (ImportError, AttributeError, RuntimeError) as error:
    # mujoco loads the OpenGL bindings: a missing library shows up there as an attribute of None.
    raise gl_error(error) from error
