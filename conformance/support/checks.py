"""Checks that several suites share."""

import re
from pathlib import Path


def peak(pid):
    """The most memory that a process of the host has held, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10


def assert_error_body(response, code):
    """E2B's error body: exactly an integer code that repeats the status, and a message."""
    assert response.status_code == code, response.text
    body = response.json()
    assert body["code"] == code
    assert isinstance(body["message"], str) and body["message"].strip()
    return body["message"]
