"""Frames and masks of a scene's fixed camera. One OpenGL context serves all scenes."""

# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false

import atexit
import weakref
from typing import Any

import mujoco
import numpy as np

from agra.simulators.tabletop import gl_error
from agra.simulators.tabletop.scene import Scene

MAX_GEOMS = 800
SHADOW = np.array([0.0, 0.0, 0.05, 0.38], np.float32)


class Renderer:
    """Renders scenes that share their textures and materials. Raises ImportError if OpenGL does not work."""

    def __init__(self, scene: Scene, frame_size: tuple[int, int]) -> None:
        height, width = frame_size
        try:
            self._gl = mujoco.GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(scene.model, mujoco.mjtFontScale.mjFONTSCALE_50)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            raise gl_error(error) from error
        self._free = weakref.finalize(self, _free, self._context, self._gl)
        # Exit handlers run in reverse order: this one before the OpenGL library's.
        self._free.atexit = False
        atexit.register(self._free)
        self._view = mujoco.MjvScene(scene.model, MAX_GEOMS)
        self._option = mujoco.MjvOption()
        self._rect = mujoco.MjrRect(0, 0, width, height)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = 0
        self._pixels = np.empty((height, width, 3), np.uint8)

    def frame(self, scene: Scene) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        self._update(scene)
        self._add_shadows(scene)
        return self._render()

    def mask(self, scene: Scene, geoms: np.ndarray) -> np.ndarray:
        """(H, W) bool: pixels of the geoms selected by `geoms` (ngeom,) bool."""
        self._update(scene)
        flags = self._view.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        pixels = self._render().astype(np.int32)
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = False
        chosen = np.zeros(self._view.ngeom + 1, bool)
        geom_kind = int(mujoco.mjtObj.mjOBJ_GEOM)
        for geom in self._view.geoms[: self._view.ngeom]:
            if geom.objtype == geom_kind and geom.segid >= 0:
                chosen[geom.segid + 1] = geoms[geom.objid]
        return chosen[pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]]

    def close(self) -> None:
        """Free the OpenGL context. Repeated calls do nothing."""
        self._free()

    def _add_shadows(self, scene: Scene) -> None:
        """A dark disc on the table under every item and hand: the depth cue of a shadow map without its cost."""
        camera = self._view.camera[0]
        eye, forward = np.array(camera.pos, np.float64), np.array(camera.forward, np.float64)
        for at, size in scene.shadows():
            geom = self._view.geoms[self._view.ngeom]
            mujoco.mjv_initGeom(
                geom, mujoco.mjtGeom.mjGEOM_ELLIPSOID, [*size, 0.0004], [*at, 0.0], np.eye(3).flatten(), SHADOW
            )
            geom.category = mujoco.mjtCatBit.mjCAT_DECOR
            # initGeom leaves these as the slot's last user set them. Discs are blended from far to near by camdist.
            geom.camdist = float(np.dot([*at, 0.0] - eye, forward))
            geom.modelrbound, geom.segid, geom.transparent = 0.0, -1, 1
            geom.objtype, geom.objid = int(mujoco.mjtObj.mjOBJ_UNKNOWN), -1
            self._view.ngeom += 1

    def _update(self, scene: Scene) -> None:
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(scene.model, scene.data, self._option, None, self._camera, everything, self._view)

    def _render(self) -> np.ndarray:
        self._gl.make_current()
        mujoco.mjr_render(self._rect, self._view, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        return self._pixels[::-1].copy()


def _free(context: "mujoco.MjrContext", gl: Any) -> None:
    context.free()
    gl.free()
