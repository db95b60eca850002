"""Adds up JUnit files: `python -m support.summary NAME=FILE...`, a row each and a plain last line."""

import sys
import xml.etree.ElementTree as ElementTree


def count(path: str) -> tuple[int, int, int, list[str]]:
    """(passed, failed, skipped, names of what failed) of one JUnit file."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname') or ''} {case.get('name')}".strip())
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, len(failures), skipped, failures


def main() -> int:
    all_passed = all_failed = 0
    print(f"\n{'suite':<12}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for argument in sys.argv[1:]:
        name, path = argument.split("=", 1)
        try:
            passed, failed, skipped, failures = count(path)
        except (OSError, ElementTree.ParseError) as error:
            passed, failed, skipped, failures = 0, 1, 0, [f"the suite left no result: {error}"]
        if passed + failed == 0:
            failed, failures = 1, ["the suite ran no test"]
        print(f"{name:<12}{passed:>8}{failed:>8}{skipped:>9}")
        for failure in failures:
            print(f"    failed: {failure}")
        all_passed += passed
        all_failed += failed
    print(f"{all_passed} passed, {all_failed} failed")
    return 1 if all_failed else 0


if __name__ == "__main__":
    sys.exit(main())
