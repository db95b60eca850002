//! What a slot's kernel rules let through, with a guest that is a network namespace behind the slot's tap, and a
//! host of the internet that is another one. Needs root.

#![allow(clippy::unwrap_used)]

mod net;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::time::Duration;

use nidus_network::{EgressRules, HYPERLOOP_IP, NetworkConfig, TcpRedirect, original_destination};

use net::{Guest, Internet, ONE, OTHER};

/// A refusal or a packet that is dropped, whichever it is, is noticed by then.
const SHORT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(10);

fn rules(allowed: &[&str], denied: &[&str]) -> EgressRules {
    let parse = |list: &[&str]| list.iter().map(|n| n.parse().unwrap()).collect();
    EgressRules { allowed: parse(allowed), denied: parse(denied), ..EgressRules::default() }
}

const EVERYTHING: &[&str] = &["0.0.0.0/0"];

fn config(first_index: u32, table: &str) -> NetworkConfig {
    NetworkConfig { first_index, max_slots: 4, table: table.into(), ..NetworkConfig::default() }
}

/// Connects from inside the guest.
fn connect(guest: &Guest, ip: Ipv4Addr, port: u16, wait: Duration) -> std::io::Result<TcpStream> {
    guest.inside(move || TcpStream::connect_timeout(&SocketAddrV4::new(ip, port).into(), wait))
}

fn echoes(mut stream: &TcpStream, text: &[u8]) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(text)?;
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got)?;
    assert_eq!(got, text);
    Ok(())
}

fn udp_echoes(guest: &Guest, ip: Ipv4Addr) -> bool {
    guest.inside(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(SHORT)).unwrap();
        // A refusal of an earlier packet is told by the next send.
        let sent = socket.send_to(b"hello", (ip, net::PORT));
        let mut got = [0; 16];
        sent.is_ok() && matches!(socket.recv(&mut got), Ok(5))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_obeyed_and_changes_while_connections_stand() {
    let internet = Internet::start("pol", 1);
    let (pool, guest) = Guest::start(config(30_300, "nidus_test_d"), "pol").await;
    let slot = &guest.slot;
    // Open: all of the internet, nothing private.
    let one = connect(&guest, internet.ip(ONE), net::PORT, LONG).unwrap();
    let other = connect(&guest, internet.ip(OTHER), net::PORT, LONG).unwrap();
    echoes(&one, b"first").unwrap();
    echoes(&other, b"first").unwrap();
    assert!(udp_echoes(&guest, internet.ip(ONE)));
    for private in ["10.12.0.1", "192.168.0.1", "169.254.169.254", "127.0.0.1", "192.0.2.9"] {
        let e = connect(&guest, private.parse().unwrap(), 80, SHORT).unwrap_err();
        // The guest's own loopback refuses.
        assert!(matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::ConnectionRefused), "{private}: {e}");
    }
    // One is allowed, the other not any more.
    let allowed = format!("{}/32", internet.ip(ONE));
    slot.set_egress(&rules(&[&allowed], EVERYTHING)).await.unwrap();
    echoes(&one, b"still").unwrap();
    assert!(echoes(&other, b"cut").is_err());
    let e = connect(&guest, internet.ip(OTHER), net::PORT, LONG).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ConnectionRefused, "refused at once, not dropped");
    connect(&guest, internet.ip(ONE), net::PORT, LONG).unwrap();
    assert!(udp_echoes(&guest, internet.ip(ONE)) && !udp_echoes(&guest, internet.ip(OTHER)));
    // Connections that stand may be kept where new ones are not allowed.
    let kept = EgressRules { kept: vec![allowed.parse().unwrap()], ..rules(&[], EVERYTHING) };
    slot.set_egress(&kept).await.unwrap();
    echoes(&one, b"kept").unwrap();
    assert!(connect(&guest, internet.ip(ONE), net::PORT, LONG).is_err());
    // A private range that is asked for stays closed, and a hole in what is allowed is none.
    slot.set_egress(&rules(&["10.0.0.0/8", "0.0.0.0/0"], &[])).await.unwrap();
    assert!(connect(&guest, "10.12.0.1".parse().unwrap(), 80, SHORT).is_err());
    // More than one message holds.
    let many: Vec<String> = (0..3000u32).map(|n| format!("203.0.{}.{}/32", n / 128, 2 * (n % 128))).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).chain([allowed.as_str()]).collect();
    slot.set_egress(&rules(&many, EVERYTHING)).await.unwrap();
    echoes(&one, b"again").unwrap();
    connect(&guest, internet.ip(ONE), net::PORT, LONG).unwrap();
    slot.set_egress(&EgressRules::default()).await.unwrap();
    connect(&guest, internet.ip(OTHER), net::PORT, LONG).unwrap();
    guest.end(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_gets_what_is_redirected_and_nothing_else() {
    let internet = Internet::start("gat", 2);
    let (pool, guest) = Guest::start(config(30_310, "nidus_test_e"), "gat").await;
    let sockets = guest.slot.gateway_sockets().unwrap();
    for listener in [&sockets.tcp, &sockets.dns_tcp, &sockets.hyperloop] {
        listener.set_nonblocking(false).unwrap();
    }
    // Hyperloop is there whatever the policy is.
    let closed = EgressRules { dns: true, redirect: TcpRedirect::Unlisted, ..rules(&[], EVERYTHING) };
    for policy in [EgressRules::default(), closed.clone()] {
        guest.slot.set_egress(&policy).await.unwrap();
        connect(&guest, HYPERLOOP_IP, 80, LONG).unwrap();
        sockets.hyperloop.accept().unwrap();
        // Another port of it, and the gateway's own ports, are not.
        assert!(connect(&guest, HYPERLOOP_IP, 81, SHORT).is_err());
        for port in [10_001, 10_053, 10_080] {
            assert!(connect(&guest, nidus_network::TAP_IP, port, SHORT).is_err(), "{port}");
        }
    }
    let wanted = SocketAddrV4::new(internet.ip(OTHER), 4567);
    let _stream = connect(&guest, *wanted.ip(), wanted.port(), LONG).unwrap();
    let (taken, _) = sockets.tcp.accept().unwrap();
    assert_eq!(original_destination(&taken).unwrap(), wanted);
    // Private addresses never get that far.
    assert!(connect(&guest, "10.0.0.1".parse().unwrap(), 80, SHORT).is_err());
    // DNS, to whomever it was sent.
    sockets.dns_udp.set_nonblocking(false).unwrap();
    sockets.dns_udp.set_read_timeout(Some(LONG)).unwrap();
    let asked = guest.inside({
        let resolver = internet.ip(OTHER);
        move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect((resolver, 53)).unwrap();
            socket.send(b"question").unwrap();
            socket
        }
    });
    let mut buffer = [0; 32];
    let (n, from) = sockets.dns_udp.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"question");
    sockets.dns_udp.send_to(b"answer", from).unwrap();
    asked.set_read_timeout(Some(LONG)).unwrap();
    let n = asked.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"answer", "it seems to come from whom was asked");
    // An allowed address is reached directly, but for web traffic if that is to be looked at.
    let allowed = format!("{}/32", internet.ip(ONE));
    let web = EgressRules { redirect: TcpRedirect::UnlistedAndWeb, ..rules(&[&allowed], EVERYTHING) };
    guest.slot.set_egress(&web).await.unwrap();
    echoes(&connect(&guest, internet.ip(ONE), net::PORT, LONG).unwrap(), b"direct").unwrap();
    let _stream = connect(&guest, internet.ip(ONE), 443, LONG).unwrap();
    let (taken, _) = sockets.tcp.accept().unwrap();
    assert_eq!(original_destination(&taken).unwrap().port(), 443);
    guest.end(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_be_somebody_else() {
    let internet = Internet::start("spf", 3);
    let (pool, guest) = Guest::start(config(30_320, "nidus_test_f"), "spf").await;
    connect(&guest, internet.ip(ONE), net::PORT, LONG).unwrap();
    guest.ip(&["addr", "add", "169.254.0.20/30", "dev", "eth0"]);
    guest.ip(&["addr", "add", "198.51.100.77/32", "dev", "eth0"]);
    let target = internet.ip(ONE);
    for source in ["169.254.0.20:0", "198.51.100.77:0"] {
        let reached = guest.inside(move || {
            let socket = UdpSocket::bind(source).unwrap();
            socket.set_read_timeout(Some(SHORT)).unwrap();
            socket.send_to(b"hello", (target, net::PORT)).is_ok() && socket.recv(&mut [0; 8]).is_ok()
        });
        assert!(!reached, "{source}");
    }
    guest.ip(&["link", "set", "eth0", "down"]);
    guest.ip(&["link", "set", "eth0", "address", "02:00:00:00:00:99", "up"]);
    guest.ip(&["route", "replace", "default", "via", "169.254.0.22"]);
    assert!(connect(&guest, target, net::PORT, SHORT).is_err());
    guest.end(pool).await;
}

/// A slot's next tenant hears nothing of what was said to the one before.
#[tokio::test(flavor = "multi_thread")]
async fn late_packets_do_not_reach_the_next_tenant() {
    let internet = Internet::start("late", 3);
    let config = NetworkConfig { max_slots: 1, ..config(31_300, "nidus_test_late") };
    let (pool, first) = Guest::start(config, "late").await;
    let (index, server_ip) = (first.slot.index(), internet.ip(ONE));
    let server = internet.inside(move || std::net::UdpSocket::bind((server_ip, 4000)).unwrap());
    server.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    let asked = first.inside(move || {
        let socket = std::net::UdpSocket::bind(("0.0.0.0", 4001)).unwrap();
        socket.send_to(b"question", (server_ip, 4000)).unwrap();
        socket
    });
    let mut buffer = [0; 100];
    let (_, masqueraded) = server.recv_from(&mut buffer).unwrap();
    // In time it is heard.
    server.send_to(b"in time", masqueraded).unwrap();
    asked.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    assert_eq!(asked.recv(&mut buffer).unwrap(), 7);
    drop(asked);
    pool.release(first.leave()).await;
    let slot = pool.acquire().await.unwrap();
    assert_eq!((slot.index(), pool.stats().reused.load(std::sync::atomic::Ordering::Relaxed)), (index, 1));
    let second = Guest::attach(slot, "late");
    let (waiting, other) = second.inside(move || {
        let other = std::net::UdpSocket::bind(("0.0.0.0", 4002)).unwrap();
        (std::net::UdpSocket::bind(("0.0.0.0", 4001)).unwrap(), other)
    });
    server.send_to(b"too late", masqueraded).unwrap();
    // An echo to the new one is behind it on every way.
    other.send_to(b"hello", (server_ip, net::PORT)).unwrap();
    other.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    assert_eq!(other.recv(&mut buffer).unwrap(), 5);
    waiting.set_nonblocking(true).unwrap();
    assert!(waiting.recv(&mut buffer).is_err(), "the next tenant got what was the first one's");
    second.end(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unsent_bytes_do_not_reach_the_next_tenant() {
    const SECRET: &[u8] = b"of the first tenant alone";
    let internet = Internet::start("left", 5);
    let config = NetworkConfig { max_slots: 1, ..config(31_340, "nidus_test_left") };
    let (pool, first) = Guest::start(config, "left").await;
    // One connection that the gateway accepted inside the slot, and one that the host opened to the guest.
    let sockets = first.slot.gateway_sockets().unwrap();
    sockets.hyperloop.set_nonblocking(false).unwrap();
    let asking = connect(&first, HYPERLOOP_IP, 80, LONG).unwrap();
    let (gateway, _) = sockets.hyperloop.accept().unwrap();
    let listener = first.inside(|| std::net::TcpListener::bind("0.0.0.0:4000").unwrap());
    let host = TcpStream::connect_timeout(&(first.slot.host_ip(), 4000).into(), LONG).unwrap();
    let (serving, _) = listener.accept().unwrap();
    let slot = first.leave();
    for mut held in [&gateway, &host] {
        held.write_all(SECRET).unwrap();
    }
    drop((sockets, asking, listener, serving));
    pool.release(slot).await;
    let slot = pool.acquire().await.unwrap();
    assert_eq!(pool.stats().reused.load(std::sync::atomic::Ordering::Relaxed), 1);
    let second = Guest::attach(slot, "left");
    let mut seen = second.inside(net::sniffer);
    // The kernel sends again what nobody has confirmed, to whoever has the address now.
    for held in [&gateway, &host] {
        let sent = || net::sent_again(held).expect("the next tenant answered, and closed it");
        let (before, since) = (sent(), std::time::Instant::now());
        while sent() < before + 2 {
            assert!(since.elapsed() < 6 * LONG, "it was not sent again");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // What the new one opens itself is behind that on every way.
    echoes(&connect(&second, internet.ip(ONE), net::PORT, LONG).unwrap(), b"hello").unwrap();
    let (mut frame, mut frames) = (vec![0; 70_000], 0);
    while let Ok(n) = seen.read(&mut frame) {
        frames += 1;
        let found = frame[..n].windows(SECRET.len()).any(|w| w == SECRET);
        assert!(!found, "the next tenant got what was the first one's");
    }
    assert!(frames > 0, "nothing was seen at all");
    second.end(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_may_have_at_once_is_bounded() {
    let internet = Internet::start("lim", 4);
    let limits = NetworkConfig {
        max_bandwidth: Some(64 << 10),
        max_connections: Some(5),
        ..config(31_320, "nidus_test_lim")
    };
    let (pool, guest) = Guest::start(limits, "lim").await;
    let ip = internet.ip(ONE);
    let standing: Vec<_> = (0..8).map(|_| connect(&guest, ip, net::PORT, SHORT)).collect();
    assert_eq!(standing.iter().filter(|c| c.is_ok()).count(), 5);
    // One that has ended makes room, when the kernel has forgotten it.
    drop(standing);

    let server = internet.inside(move || UdpSocket::bind((ip, 4000)).unwrap());
    server.set_read_timeout(Some(LONG)).unwrap();
    let sender = guest.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    const SENT: usize = 1000;
    for _ in 0..SENT {
        sender.send_to(&[0; 1000], (ip, 4000)).unwrap();
    }
    // A mark gets through when there is room again.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let marks = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                sender.send_to(b"mark", (ip, 4000)).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    let (mut arrived, mut buffer) = (0, [0; 2000]);
    while server.recv(&mut buffer).unwrap() != 4 {
        arrived += 1;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    marks.join().unwrap();
    assert!((10..SENT / 2).contains(&arrived), "{arrived} of {SENT} datagrams arrived");
    guest.end(pool).await;
}
