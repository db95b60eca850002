//! A guest that answers before it has read the request: the client must hear that its connection ends.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use nidus_proxy::{InProcessCatalog, ProxyConfig, Route};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Sends a request with so much of a body of 10 bytes, and returns the head of the answer of a guest that waits
/// for `read` bytes of it.
async fn answer(sent: &[u8], read: usize) -> String {
    let guest = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = guest.local_addr().unwrap().port();
    let guest = tokio::spawn(async move {
        let (mut stream, _) = guest.accept().await.unwrap();
        let mut seen = Vec::new();
        loop {
            let head = seen.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
            if head.is_some_and(|head| seen.len() - head >= read) {
                break;
            }
            assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        // Until the proxy hangs up.
        while stream.read_buf(&mut seen).await.is_ok_and(|n| n > 0) {}
    });
    let catalog = InProcessCatalog::new();
    let route = Route {
        host_ip: "127.0.0.1".parse().unwrap(),
        traffic_access_token: None,
        mask_request_host: None,
        https_ports: Vec::new(),
        gone: CancellationToken::new(),
    };
    catalog.insert("sandbox".to_owned(), route);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let proxy =
        tokio::spawn(nidus_proxy::serve(listener, ProxyConfig::default(), Arc::new(catalog), stop.clone()));
    let mut client = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST / HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: sandbox\r\ne2b-sandbox-port: {port}\r\ncontent-length: 10\r\n\r\n"
    );
    client.write_all(&[head.as_bytes(), sent].concat()).await.unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"ok") {
        assert_ne!(client.read_buf(&mut text).await.unwrap(), 0, "no whole answer");
    }
    drop(client);
    stop.cancel();
    proxy.await.unwrap().unwrap();
    guest.abort();
    String::from_utf8(text).unwrap().to_ascii_lowercase()
}

#[tokio::test]
async fn an_answer_to_a_part_of_a_request_ends_the_connection() {
    let text = answer(b"01234", 5).await;
    assert!(text.starts_with("http/1.1 200") && text.contains("connection: close"), "{text}");
}

#[tokio::test]
async fn an_answer_to_a_whole_request_does_not() {
    let text = answer(b"0123456789", 10).await;
    assert!(text.starts_with("http/1.1 200") && !text.contains("connection: close"), "{text}");
}
