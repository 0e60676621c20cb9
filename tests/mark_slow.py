"""Decide by measurement which tests are slow, and write them to ``tests/slow.txt``, which ``conftest.py`` reads.

    python -m pytest -n 2 --cpu-seconds report.txt
    python tests/mark_slow.py report.txt

Seconds are those of the processor, of the test and of the processes that it started, so that what else the machine does
hardly matters. A case of a test is slow above `SECONDS`; a test whose cases all are is one line. In each file the quickest
tests stay in the quick run whatever they take, so that it has every kind of test.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

SECONDS = 1.5
KEPT = 3  # tests of each file that stay quick at the least ...
KEPT_SECONDS = 8.0  # ... if their quickest case takes no more than this


def durations(report: str) -> dict[str, float]:
    """Seconds of each case, set-up and teardown included; the last ones where a report has a case twice."""
    lines = (line.partition("\t") for line in report.splitlines())
    return {case: float(seconds) for seconds, _, case in lines}


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
