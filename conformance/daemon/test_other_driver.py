"""A snapshot is refused by another VMM than the one that made it, and is whole under its own again."""

import os

import pytest
from e2b import Sandbox, SandboxException
from support import sandboxes
from support.counting import count, count_beyond, counting

pytestmark = pytest.mark.skipif(
    not os.environ.get("NIDUS_FIRECRACKER") or os.environ.get("NIDUS_TESTBED") != "1",
    reason="needs a host on which both drivers work, and NIDUS_FIRECRACKER",
)


@pytest.mark.parametrize("own, other", [("firecracker", "qemu"), ("qemu", "firecracker")])
def test_paused_under_one_driver(make_daemon, host, own, other):
    def start(vmm, key=None):
        daemon = make_daemon(extra_env={"NIDUS_VMM": vmm}).start()
        daemon.key = key or daemon.create_key()
        return daemon

    first = start(own)
    sandbox = counting(first)
    assert sandbox.pause(**sandboxes.options(first)) is True
    assert first.terminate() == 0

    second = start(other, first.key)
    with pytest.raises(SandboxException) as refused:
        Sandbox.connect(sandbox.sandbox_id, **sandboxes.options(second))
    sentence = str(refused.value)
    assert f"made by {own}" in sentence and f"resumed by {other}" in sentence, sentence
    assert second.terminate() == 0

    third = start(own, first.key)
    resumed = Sandbox.connect(sandbox.sandbox_id, timeout=300, **sandboxes.options(third))
    count_beyond(resumed, count(resumed))
    assert resumed.kill(**sandboxes.options(third)) is True
    assert third.terminate() == 0
    host.assert_clean()
