"""What the logs of a GPU session's tools say."""

from __future__ import annotations

import re
from typing import Any

# compute-sanitizer's own message where a machine does not let it attach
NOT_SUPPORTED = ("Device not supported", "not supported on this device", "Unable to initialize")
OUTCOME = r"(PASSED|FAILED|ERROR|SKIPPED)"
IN_TURN = re.compile(rf"(\S+::.+?) {OUTCOME}\b")  # a line of pytest -v
BY_WORKERS = re.compile(rf"\[gw\d+\] \[ *\d+%\] {OUTCOME} (.+)")  # and of pytest -v -n


def outcomes(log: str) -> dict[str, Any]:
    """The outcome in a log of pytest, even one that was cut off."""
    results = {}
    for line in log.splitlines():
        if found := BY_WORKERS.match(line):
            results[found[2].strip()] = found[1]
        elif found := IN_TURN.match(line):
            results[found[1]] = found[2]
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    for word in results.values():
        counts[word.lower()] += 1
    bad = [test for test, word in results.items() if word in ("FAILED", "ERROR")]
    return counts | {"not passed": bad}


def sanitizer_verdict(log: str) -> str:
    if any(text in log for text in NOT_SUPPORTED):
        return "refused by this machine"
    if "calls: done" not in log:
        return f"cut off or failed: {log[-2000:]}"
    summary = [line for line in log.splitlines() if "SUMMARY" in line]
    # racecheck's line reads "0 hazards displayed (0 errors, 0 warnings)", the others' "0 errors"
    clean = summary and all(re.search(r": 0 (errors|hazards)", line) for line in summary)
    return "clean" if clean else log[-4000:]
