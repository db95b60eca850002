"""Checks that several suites share."""


def assert_error_body(response, code):
    """E2B's error body: exactly an integer code that repeats the status, and a message."""
    assert response.status_code == code, response.text
    body = response.json()
    assert body["code"] == code
    assert isinstance(body["message"], str) and body["message"].strip()
    return body["message"]
