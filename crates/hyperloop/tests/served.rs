//! The service over real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nidus_hyperloop::{Hyperloop, Limits, serve};
use nidus_telemetry::{LogLimits, LogOrigin, MemoryLogs};
use tokio_util::sync::CancellationToken;

struct Served {
    address: SocketAddr,
    logs: Arc<MemoryLogs>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

async fn served(limits: Limits) -> Served {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let logs = Arc::new(MemoryLogs::new(LogLimits { entries: 10_000, bytes: 64 << 20, sandboxes: 10 }));
    let text = |t: &str| t.to_owned();
    let origin = LogOrigin {
        sandbox_id: text("isandbox"),
        team_id: text("team"),
        template_id: text("t"),
        execution_id: text("e"),
    };
    let stop = CancellationToken::new();
    let service = Hyperloop::new(origin, logs.clone(), limits);
    let task = tokio::spawn(serve(listener, service, stop.clone()));
    Served { address, logs, stop, task }
}

impl Served {
    /// Sends text as it is and returns all that comes back.
    async fn raw(&self, request: String) -> String {
        let address = self.address;
        let talk = move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            // The server may have answered and closed before all is sent.
            let _ = stream.write_all(request.as_bytes());
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            String::from_utf8_lossy(&answer).into_owned()
        };
        tokio::task::spawn_blocking(talk).await.unwrap()
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let answer = self
            .raw(format!(
                "{method} {path} HTTP/1.1\r\nhost: events.e2b.local\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            ))
            .await;
        let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        (status, answer)
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_guest_is_itself_and_its_logs_arrive() {
    let s = served(Limits::default()).await;
    let (status, me) = s.ask("GET", "/me", "").await;
    assert!(status == 200 && me.ends_with(r#"{"sandboxID":"isandbox"}"#), "{me}");
    let (status, answer) =
        s.ask("POST", "/logs", r#"[{"message":"one","sandboxID":"x"},{"message":"two"}]"#).await;
    assert_eq!(status, 200, "{answer}");
    let texts: Vec<String> = s.logs.of("team", "isandbox").into_iter().map(|l| l.message).collect();
    assert_eq!(texts, ["one", "two"]);
    assert!(s.logs.of("team", "x").is_empty());
    s.end().await;
}

#[tokio::test]
async fn what_is_not_served_is_refused_in_words() {
    let limits = Limits { body_bytes: 1000, batch: 2, ..Limits::default() };
    let s = served(limits).await;
    for (method, path, body, wanted) in [
        ("GET", "/", "", 404),
        ("GET", "/logs", "", 405),
        ("DELETE", "/me", "", 405),
        ("POST", "/logs", "nonsense", 400),
        ("POST", "/logs", "[{},{},{}]", 413),
        ("POST", "/logs", &"x".repeat(1001), 413),
    ] {
        let (status, answer) = s.ask(method, path, body).await;
        assert!(status == wanted && answer.contains("\"message\""), "{method} {path}: {answer}");
    }
    s.end().await;
}

/// A client that writes all before it reads gets the answer and no reset, also when the answer was due long
/// before; one that asks first need not send.
#[tokio::test]
async fn who_sends_too_much_still_reads_the_answer() {
    let s = served(Limits::default()).await;
    let address = s.address;
    tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        for (headers, body) in [("", vec![b'x'; 8 << 20]), ("Expect: 100-continue\r\n", Vec::new())] {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let head =
                format!("POST /logs HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n{headers}\r\n", 8 << 20);
            stream.write_all(head.as_bytes()).unwrap();
            for piece in body.chunks(64 << 10) {
                stream.write_all(piece).unwrap();
                std::thread::yield_now();
            }
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"HTTP/1.1 413");
        }
    })
    .await
    .unwrap();
    s.end().await;
}

#[tokio::test]
async fn the_rate_is_limited_and_said() {
    let limits = Limits { entries_per_second: 1, ..Limits::default() };
    let s = served(limits).await;
    let ten = format!("[{}]", ["{}"; 10].join(","));
    assert_eq!(s.ask("POST", "/logs", &ten).await.0, 200);
    let (status, answer) = s.ask("POST", "/logs", &ten).await;
    assert!(status == 429 && answer.to_lowercase().contains("retry-after"), "{answer}");
    assert_eq!(s.logs.of("team", "isandbox").len(), 10);
    s.end().await;
}

#[tokio::test]
async fn open_connections_do_not_keep_it_from_ending() {
    let s = served(Limits { connections: 2, ..Limits::default() }).await;
    let idle: Vec<_> = (0..4).map(|_| std::net::TcpStream::connect(s.address).unwrap()).collect();
    s.stop.cancel();
    s.task.await.unwrap().unwrap();
    drop(idle);
}
