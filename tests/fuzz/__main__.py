"""Check the properties for FUZZ_SECONDS, in turn, each time with new examples.

    FUZZ_SECONDS=3600 python -m tests.fuzz

Prints the number of examples of each property. A failing example is shrunk and printed. The exit code is the number of properties
that failed.
"""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings

from .properties import PROPERTIES, scratch_folder

ROUND = settings(max_examples=500, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def main() -> int:
    """Run until the time is over. Returns the number of properties that failed."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "3600"))
    counts: Counter[str] = Counter()
    failed: set[str] = set()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and len(failed) < len(PROPERTIES):
            for name, prop in PROPERTIES.items():
                if name in failed or time.monotonic() > end:
                    continue
                try:
                    ROUND(given(prop.strategy)(_counted(prop.check, counts, name)))()
                except Exception as error:  # any error of the code under test
                    failed.add(name)
                    print(
                        f"{name}: {type(error).__name__}: {error}",
                        *getattr(error, "__notes__", ()),
                        sep="\n",
                        flush=True,
                    )
    finally:
        shutil.rmtree(scratch_folder(), ignore_errors=True)
    for name in PROPERTIES:
        print(f"{name}: {counts[name]} examples{', failed' if name in failed else ''}")
    print(f"{sum(counts.values())} examples in {seconds:.0f} s, {len(failed)} properties failed")
    return len(failed)


def _counted(check: Callable[[Any], None], counts: Counter[str], name: str) -> Callable[[Any], None]:
    def counted(example: Any) -> None:
        counts[name] += 1
        check(example)

    return counted


if __name__ == "__main__":
    sys.exit(main())
