"""What the server promises under overload, faults and restarts, shown with real servers and real clients.

    benchmarks/reliability.py list
    benchmarks/reliability.py NAME ... [--seconds S]

Each scenario prints its figures beside what is asked of them. The exit code is 1 if one of them is missed. Nothing is
written but temporary files. docs/reliability.md has the promises.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

# The tests' own faults, names and certificates.
sys.path.append(str(Path(__file__).parents[1] / "tests"))


def main() -> int:
    # Here, because processes that the scenarios start import this file.
    from reliability.figure import Figure, table
    from reliability.registry import scenarios
    from reliability.setup import Setup

    known = scenarios()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=["list", "all", *known], help="list: show them all")
    parser.add_argument("--seconds", type=float, help="length of each measurement; default: the scenario's own")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the server, for another checkout")
    parser.add_argument("--cases", help="only the cases whose name has this text, where a scenario has several")
    options = parser.parse_args()
    if "list" in options.names:
        width = max(map(len, known))
        for name, scenario in known.items():
            print(f"{name:<{width}}  {scenario.about} ({scenario.seconds:g} s each)")
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in known if "all" in options.names else options.names:
            scenario = known[name]
            began = time.monotonic()
            with Setup(
                Path(scratch),
                seconds=options.seconds or scenario.seconds,
                python=options.python,
                cases=options.cases or "",
            ) as setup:
                figures = []
                try:
                    figures.extend(scenario.run(setup))
                except Exception as error:
                    figures.append(Figure(what=f"it stopped: {error!r:.2000}", value="no figure", wanted="a figure"))
            if not figures:
                figures.append(Figure(what=f"no case has {options.cases!r}", value="no figure", wanted="a figure"))
            failed = sum(figure.passed is False for figure in figures)
            missed += failed
            verdict = "FAIL" if failed else "PASS"
            print(
                f"\n{name}: {scenario.about}\n{table(figures)}\n{verdict} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
