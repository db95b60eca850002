"""Hyperloop: what a guest may ask its host, and only as itself."""

import json

import pytest
from support import sandboxes
from support.daemon import wait_for

POST = """
import json, sys, urllib.error, urllib.request
body = sys.stdin.read().encode() if len(sys.argv) < 3 else b'{"message": "' + b"x" * int(sys.argv[2]) + b'"}'
try:
    with urllib.request.urlopen(urllib.request.Request(sys.argv[1], data=body, method="POST"), timeout=10) as answer:
        print(answer.status)
except urllib.error.HTTPError as e:
    print(e.code, e.headers.get("Retry-After") or "")
"""


@pytest.fixture
def pair(daemon):
    """Two sandboxes without internet."""
    made = [sandboxes.create(daemon, allow_internet_access=False) for _ in range(2)]
    for sandbox in made:
        sandbox.files.write("/home/user/post.py", POST)
    yield made
    for sandbox in made:
        sandbox.kill(**sandboxes.options(daemon))


def say(sandbox, text, url="http://events.e2b.local/logs"):
    sandbox.files.write("/home/user/said", text)
    return sandbox.commands.run(f"python3 post.py {url} < said").stdout.strip()


def test_everybody_is_who_they_are(pair):
    for sandbox in pair:
        for where in ("192.0.2.1", "events.e2b.local"):
            seen = sandbox.commands.run(f"curl -s -m 10 -H 'X-Sandbox-Id: {pair[0].sandbox_id}' http://{where}/me").stdout
            assert json.loads(seen)["sandboxID"] == sandbox.sandbox_id
        assert sandbox.commands.run("echo $E2B_EVENTS_ADDRESS").stdout.strip() == "http://192.0.2.1"
        assert sandbox.commands.run("curl -s -m 10 -o /dev/null -w '%{http_code}' http://192.0.2.1/other").stdout == "404"


def test_logs_come_under_the_name_of_who_says_them(daemon, pair):
    one, two = pair
    entries = [{"message": "hello from one", "level": "warn", "sandboxID": two.sandbox_id}, {"message": "second\u001b[31m line", "n": 7}]
    assert say(one, json.dumps(entries)).startswith("2")
    assert say(two, "\n".join(json.dumps({"message": f"two says {n}"}) for n in range(3))).startswith("2")
    wait_for("the log to have it all", lambda: "two says 2" in daemon.log(400) and "second" in daemon.log(400), 10)
    lines = [line for line in daemon.log(400).splitlines() if "nidus::guest" in line]
    for sandbox, other, words in ((one, two, ["hello from one", "second"]), (two, one, ["two says 0", "two says 1", "two says 2"])):
        for word in words:
            (line,) = [line for line in lines if word in line]
            assert sandbox.sandbox_id in line and other.sandbox_id not in line, line
    assert "\x1b" not in "".join(lines)


def test_what_is_too_much_is_refused_and_said_so(pair):
    one, two = pair
    assert say(one, "not json") == "400"
    # curl asks before it sends so much (Expect: 100-continue); Python sends it all and reads then.
    big = "head -c 2000000 /dev/zero > /tmp/big && curl -s -o /dev/null -w '%{http_code}' --data-binary @/tmp/big http://192.0.2.1/logs"
    assert one.commands.run(big).stdout == "413"
    assert one.commands.run("python3 post.py http://192.0.2.1/logs 2000000").stdout.strip() == "413"
    many = "\n".join(json.dumps({"message": f"{n}"}) for n in range(900))
    answers = [say(one, many) for _ in range(4)]
    assert answers[0].startswith("2") and answers[-1].split()[0] == "429" and int(answers[-1].split()[1]) >= 1, answers
    # Only the one who said too much.
    assert say(two, json.dumps({"message": "still here"})).startswith("2")
