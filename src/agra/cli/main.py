"""The command line `agra`. Errors that a user can correct print one line and exit with code 1.

Heavy imports happen inside the commands, so that `agra --help` is quick and an install without torch can collect.
"""

import os
import sys
from collections.abc import Sequence

from agra.cli.arguments import Command, command, unknown
from agra.cli.data import collect, convert, doctor, prepare, view
from agra.cli.deploy import bench_latency, control, export, pull, push, serve
from agra.cli.diagnose import diagnose, probes, report, study
from agra.cli.evaluate import compare, demo, evaluate, leaderboard, merge
from agra.cli.train import plan, recipes, train
from agra.types import SimulatorFailed

COMMANDS: dict[str, Command] = {
    "collect": command(collect),
    "convert": command(convert),
    "doctor": command(doctor),
    "view": command(view),
    "prepare": prepare,
    "train": train,
    "plan": plan,
    "evaluate": command(evaluate),
    "merge": command(merge),
    "compare": command(compare),
    "leaderboard": command(leaderboard),
    "demo": command(demo),
    "diagnose": command(diagnose),
    "report": command(report),
    "serve": command(serve),
    "control": command(control),
    "bench-latency": command(bench_latency),
    "probes": probes,
    "study": study,
    "export": command(export),
    "push": command(push),
    "pull": command(pull),
    "recipes": command(recipes),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. With AGRA_TRACEBACK=1 an error prints its traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        raise SystemExit(0 if arguments else 2)
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise ValueError(unknown("command", name, COMMANDS))
        COMMANDS[name](rest)
    except (ValueError, OSError, ImportError, OverflowError, RecursionError, SimulatorFailed) as error:
        if os.environ.get("AGRA_TRACEBACK"):
            raise
        print(f"agra: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("agra: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _help() -> str:
    lines = [f"  {name:15}{(function.__doc__ or '').strip().splitlines()[0]}" for name, function in COMMANDS.items()]
    return "usage: agra COMMAND [flags]\n\n" + "\n".join(lines) + "\n\n`agra COMMAND --help` lists a command's flags."


if __name__ == "__main__":
    main()
