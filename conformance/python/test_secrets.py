"""Secrets by the SDK: written, listed, rotated, destroyed, and never read again."""

import uuid

import pytest
from e2b import AsyncSecret, InvalidArgumentException, Secret, SecretException, SecretNotFoundException
from support.teams import new_team


@pytest.fixture
def name():
    name = f"key-{uuid.uuid4().hex[:8]}"
    yield name
    Secret.destroy(name)


def test_a_secrets_life(name, api):
    made = Secret.create(name.upper(), "sk-1", metadata={"env": "test"})
    assert (made.name, made.version, made.metadata) == (name, 1, {"env": "test"})
    assert made.secret_id.startswith("sec_")
    with pytest.raises(SecretException):
        Secret.create(name, "sk-2")
    assert Secret.get_info(name) == Secret.get_info(made.secret_id) == made
    updated = Secret.update(made.secret_id, "sk-2")
    assert (updated.version, updated.metadata) == (2, {"env": "test"}) and updated.updated_at >= made.updated_at
    assert Secret.update(name, "sk-3", metadata={}).metadata == {}
    assert Secret.exists(name) and not Secret.exists(f"{name}-not")
    for path in ("/secrets", f"/secrets/{name}"):
        assert "sk-" not in api.get(path).text, "values are written only"
    assert Secret.destroy(name) is True
    assert Secret.destroy(name) is False
    with pytest.raises(SecretNotFoundException):
        Secret.get_info(name)
    with pytest.raises(SecretNotFoundException):
        Secret.update(name, "x")


def test_pages(name):
    names = sorted(f"{name}-{n}" for n in range(5))
    try:
        for n in reversed(names):
            Secret.create(n, "v")
        paginator = Secret.list(limit=2)
        found = []
        while paginator.has_next:
            page = paginator.next_items()
            assert len(page) <= 2
            found += [s.name for s in page]
        assert [n for n in found if n in names] == names and len(set(found)) == len(found)
    finally:
        for n in names:
            Secret.destroy(n)


async def test_the_async_sdk(name):
    made = await AsyncSecret.create(name, "v")
    assert (await AsyncSecret.get_info(name)).secret_id == made.secret_id
    assert (await AsyncSecret.update(name, "w")).version == 2
    assert await AsyncSecret.exists(name)
    assert name in [s.name for s in await AsyncSecret.list().next_items()]
    assert await AsyncSecret.destroy(name)
    assert AsyncSecret.fill(name) == Secret.fill(name) == "${e2b.secrets." + name + "}"


def test_what_the_sdk_makes_of_identities():
    assert Secret.iam_token(audience="a", token_type="JWT-SVID")["audience"] == "a"
    with pytest.raises(InvalidArgumentException):
        Secret.fill("a}b")


@pytest.mark.parametrize("body", [
    {}, {"name": "x"}, {"name": "", "value": "v"}, {"name": "a}b", "value": "v"}, {"name": "a/b", "value": "v"},
    {"name": "x", "value": ""}, {"name": "x", "value": "a\r\nb"}, {"name": "x", "value": "v" * 2049},
    {"name": "x" * 129, "value": "v"}, {"name": "x", "value": "v", "metadata": {"k": 1}},
    {"name": "x", "value": "v", "metadata": {"k": "v" * 9000}},
], ids=str)
def test_what_cannot_be_kept_is_refused(api, body):
    answer = api.post("/secrets", json=body)
    assert answer.status_code == 400 and answer.json()["message"], answer.text


def test_rules_name_secrets_and_show_no_values(name, new_sandbox, api):
    Secret.create(name, "sk-hidden")
    rules = {"api.example": [{"transform": {"headers": {"Authorization": f"Bearer {Secret.fill(name)}"}}}]}
    sandbox = new_sandbox(network={"rules": rules})
    shown = api.get(f"/sandboxes/{sandbox.sandbox_id}").json()
    assert shown["network"]["rules"]["api.example"][0]["transform"]["headers"]["Authorization"].endswith(Secret.fill(name))
    assert "sk-hidden" not in str(shown)
    # A pause stores the rules and not the values; a resume takes what the secret is then.
    sandbox.pause()
    Secret.update(name, "sk-rotated")
    sandbox.connect()
    assert "sk-" not in str(api.get(f"/sandboxes/{sandbox.sandbox_id}").json())
    missing = {"api.example": [{"transform": {"headers": {"X": Secret.fill(f"{name}-not")}}}]}
    for answer in (
        api.put(f"/sandboxes/{sandbox.sandbox_id}/network", json={"rules": missing}),
        api.post("/sandboxes", json={"templateID": "base", "network": {"rules": missing}}),
    ):
        assert answer.status_code == 400 and f"{name}-not" in answer.text
    other = new_team()
    with other.client() as theirs:
        answer = theirs.post("/sandboxes", json={"templateID": "base", "network": {"rules": rules}})
        assert answer.status_code == 400, "another team's secret is as unknown as none"
