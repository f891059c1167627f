"""The rest of a chunk that LeRobot's real-time chunking hands over. Needs only numpy."""

import numpy as np


def remaining(chunk: np.ndarray, handed: np.ndarray) -> np.ndarray | None:
    """Return the actions of `chunk` (K, D) that are not executed yet, (P, D) with 0 <= P <= K.

    LeRobot hands over that rest cut or zero-padded to its `execution_horizon` H, `handed` (H, D). A continuation with
    padding would pull a robot to the origin, and a cut one would forget actions. So the rest is found in the chunk
    itself: the latest row from which both agree, with nothing but zeros after the chunk's end. None if there is none.
    """
    for start in range(len(chunk), -1, -1):
        rest = chunk[start:]
        length = min(len(rest), len(handed))
        if np.array_equal(rest[:length], handed[:length]) and not handed[length:].any():
            return rest
    return None
