"""Decide by measurement which tests are slow, and write them to ``tests/slow.txt``, which ``conftest.py`` reads.

    python -m pytest -n 2 --durations=0 -vv > report.txt        # on a machine that does nothing else
    python tests/mark_slow.py report.txt

A case of a test is slow above `SECONDS`; a test whose cases all are is one line. In each file the quickest tests stay in the
quick run whatever they take, so that it has every kind of test.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

SECONDS = 2.0
KEPT = 3  # tests of each file that stay quick at the least ...
KEPT_SECONDS = 12.0  # ... if their quickest case takes no more than this
LINE = re.compile(r"\s*(\d+\.\d+)s (?:call|setup|teardown)\s+(tests/\S+\.py::.+)")


def durations(report: str) -> dict[str, float]:
    """Seconds of each case, set-up and teardown included."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for line in report.splitlines():
        if match := LINE.fullmatch(line.rstrip()):
            seconds[match[2]] += float(match[1])
    return dict(seconds)


def slow_tests(seconds: dict[str, float]) -> dict[str, float]:
    """Tests, or cases of tests, to seconds. A test that the report does not name took no time worth a line."""
    files: defaultdict[str, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for case, time in seconds.items():
        test = case.partition("[")[0]
        files[test.partition("::")[0]][test][case] = time
    slow: dict[str, float] = {}
    for tests in files.values():
        by_quickest_case = sorted(tests, key=lambda test: min(tests[test].values()))
        for rank, test in enumerate(by_quickest_case):
            cases = tests[test]
            quickest = min(cases, key=cases.__getitem__)
            kept = rank < KEPT and cases[quickest] <= KEPT_SECONDS
            above = {case: time for case, time in cases.items() if time > SECONDS and not (kept and case == quickest)}
            slow |= {test: max(above.values())} if len(above) == len(cases) else above
    return slow


if __name__ == "__main__":
    measured = durations(Path(sys.argv[1]).read_text())
    slow = slow_tests(measured)
    lines = [f"{time:.1f}\t{test}\n" for test, time in sorted(slow.items())]
    (Path(__file__).parent / "slow.txt").write_text("".join(lines))
    quick = sum(time for case, time in measured.items() if case not in slow and case.partition("[")[0] not in slow)
    print(f"{len(lines)} lines; the quick tests took {quick / 60:.1f} of {sum(measured.values()) / 60:.1f} minutes")
