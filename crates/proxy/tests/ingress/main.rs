//! The proxy over real sockets: TLS on either side, gRPC, what takes too long, and what ends with its sandbox.

#![allow(clippy::unwrap_used)]

mod net;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use net::{Client, Guest, Proxy, certificate};
use nidus_proxy::{Certificate, ProxyConfig};

/// An answer that tells what the guest saw.
async fn told(request: Request<hyper::body::Incoming>) -> Response<net::Body> {
    let header =
        |name: &str| request.headers().get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
    let text = format!(
        "{:?} {} host={} proto={}",
        request.version(),
        request.uri().path(),
        header("host"),
        header("x-forwarded-proto")
    );
    Response::new(Full::new(Bytes::from(text)).map_err(|e| match e {}).boxed())
}

#[tokio::test]
async fn clients_may_use_tls_and_the_certificate_may_be_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (chain, key) = (folder.path().join("chain.pem"), folder.path().join("key.pem"));
    let write = |(certificate, private): (String, String)| {
        std::fs::write(&chain, &certificate).unwrap();
        std::fs::write(&key, private).unwrap();
        certificate
    };
    let first = write(certificate(&["*.sandbox.test"]));
    let opened = Certificate::open(chain.clone(), key.clone()).unwrap();
    let guest = Guest::http1(told).await;
    let proxy = Proxy::start(ProxyConfig::default(), guest.route(), Some(opened.clone())).await;
    let host = format!("{}-sandbox.sandbox.test", guest.port);
    for alpn in ["http/1.1", "h2"] {
        let mut client = Client::tls(proxy.tls.unwrap(), &host, alpn, &first).await.unwrap();
        let (head, text) = client.get(&format!("https://{host}/x")).await;
        assert_eq!(head.status, StatusCode::OK);
        assert_eq!(text, format!("HTTP/1.1 /x host={host} proto=https"), "{alpn}");
    }
    // A pair that is wrong changes nothing, and is told of once.
    std::fs::write(&key, "no key").unwrap();
    assert!(opened.refresh().is_err());
    assert!(!opened.refresh().unwrap());
    assert!(Client::tls(proxy.tls.unwrap(), &host, "h2", &first).await.is_ok());
    let second = write(certificate(&["*.sandbox.test"]));
    net::later(&key);
    assert!(opened.refresh().unwrap());
    assert!(Client::tls(proxy.tls.unwrap(), &host, "h2", &first).await.is_err());
    assert!(Client::tls(proxy.tls.unwrap(), &host, "h2", &second).await.is_ok());
    assert!(Certificate::open(chain, folder.path().join("none")).unwrap_err().to_string().contains("none"));
    proxy.end().await;
}

#[tokio::test]
async fn guests_may_speak_tls_where_they_say_so() {
    let guest = Guest::tls(told).await;
    let mut route = guest.route();
    route.https_ports = vec![guest.port];
    let proxy = Proxy::start(ProxyConfig::default(), route, None).await;
    let mut client = Client::http1(proxy.plain).await;
    for _ in 0..2 {
        let (head, text) = client.get_from("sandbox", guest.port, "/y").await;
        assert_eq!((head.status, text.as_str()), (StatusCode::OK, "HTTP/1.1 /y host=x proto=http"));
    }
    proxy.end().await;
    // Where they do not say so, it is a connection that makes no sense.
    let proxy = Proxy::start(ProxyConfig::default(), guest.route(), None).await;
    let (head, _) = Client::http1(proxy.plain).await.get_from("sandbox", guest.port, "/y").await;
    assert_eq!(head.status, StatusCode::BAD_GATEWAY);
    proxy.end().await;
}

#[tokio::test]
async fn grpc_goes_through_with_its_trailers() {
    let guest = Guest::http2(|request: Request<hyper::body::Incoming>| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(request.headers()["te"], "trailers");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let frames = [Ok(Frame::data(body)), Ok(Frame::trailers(trailers))];
        Response::new(StreamBody::new(futures::stream::iter(frames)).boxed())
    })
    .await;
    let proxy = Proxy::start(ProxyConfig::default(), guest.route(), None).await;
    let client = Client::http2(proxy.plain).await;
    let calls = (0..20).map(|n| {
        let mut client = client.clone();
        let port = guest.port;
        async move {
            let request = Request::post("http://x/service/Method")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("e2b-sandbox-id", "sandbox")
                .header("e2b-sandbox-port", port)
                .body(Full::new(Bytes::from(format!("call {n}"))))
                .unwrap();
            let answer = client.send(request).await;
            assert_eq!(answer.status(), StatusCode::OK);
            let whole = answer.into_body().collect().await.unwrap();
            assert_eq!(whole.trailers().unwrap()["grpc-status"], "0");
            assert_eq!(whole.to_bytes(), format!("call {n}"));
        }
    });
    futures::future::join_all(calls).await;
    // One connection for all of them, from the worker that has the client.
    assert_eq!(guest.connections(), 1);
    proxy.end().await;
}

#[tokio::test]
async fn what_takes_too_long_is_ended() {
    let guest = Guest::http1(|request: Request<hyper::body::Incoming>| async move {
        if request.uri().path() == "/never" {
            std::future::pending::<()>().await;
        }
        // One piece, and then nothing.
        let first = futures::stream::iter([Ok(Frame::data(Bytes::from("first")))]);
        let body = futures::StreamExt::chain(first, futures::stream::pending());
        Response::new(StreamBody::new(body).boxed())
    })
    .await;
    for config in [
        ProxyConfig { idle_timeout: Some(Duration::from_millis(100)), ..ProxyConfig::default() },
        ProxyConfig { total_timeout: Some(Duration::from_millis(100)), ..ProxyConfig::default() },
    ] {
        let proxy = Proxy::start(config, guest.route(), None).await;
        let (head, _) = Client::http1(proxy.plain).await.get_from("sandbox", guest.port, "/never").await;
        assert_eq!(head.status, StatusCode::GATEWAY_TIMEOUT);
        let answer = Client::http1(proxy.plain).await.ask("sandbox", guest.port, "/stalls").await;
        assert!(answer.into_body().collect().await.is_err(), "a cut answer looks whole");
        proxy.end().await;
    }
}

#[tokio::test]
async fn an_answer_is_cut_with_its_sandbox_and_does_not_look_whole() {
    let guest = Guest::http1(|_| async move {
        let first = futures::stream::iter([Ok(Frame::data(Bytes::from("first")))]);
        Response::new(StreamBody::new(futures::StreamExt::chain(first, futures::stream::pending())).boxed())
    })
    .await;
    let route = guest.route();
    let gone = route.gone.clone();
    let proxy = Proxy::start(ProxyConfig::default(), route, None).await;
    let mut answer = Client::http1(proxy.plain).await.ask("sandbox", guest.port, "/").await;
    assert_eq!(answer.body_mut().frame().await.unwrap().unwrap().into_data().unwrap(), "first");
    gone.cancel();
    assert!(answer.body_mut().frame().await.is_none_or(|f| f.is_err()));
    let (head, _) = Client::http1(proxy.plain).await.get_from("sandbox", guest.port, "/").await;
    assert_eq!(head.status, StatusCode::BAD_GATEWAY);
    proxy.end().await;
}

#[tokio::test]
async fn connections_are_used_again() {
    let guest = Guest::http1(told).await;
    let config = ProxyConfig { workers: Some(1), ..ProxyConfig::default() };
    let proxy = Proxy::start(config, guest.route(), None).await;
    let mut client = Client::http1(proxy.plain).await;
    for n in 0..50 {
        let (_, text) = client.get_from("sandbox", guest.port, &format!("/{n}")).await;
        assert!(text.contains(&format!("/{n} ")), "{text}");
    }
    assert!(guest.connections() < 10, "{} connections for 50 requests", guest.connections());
    proxy.end().await;
}
