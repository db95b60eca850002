//! What the first bytes of a flow say of where it wants to go. They come from a guest: nothing in them is
//! believed further than that the node itself resolves the name.

use rustls::server::Acceptor;

use crate::host_name;

/// Bytes that are looked at.
pub const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 128;

/// What a flow turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sniffed {
    /// Too little has come.
    More,
    /// TLS, and the name that it asks for.
    Tls(Option<String>),
    /// HTTP/1, and the host of its first request. Each request is looked at again where it matters.
    Http(Option<String>),
    /// Anything else, or what is wrong in itself.
    Other,
}

/// Looks at what has come of a flow.
pub fn sniff(head: &[u8]) -> Sniffed {
    let found = match head {
        [] => Sniffed::More,
        [22, ..] => tls(head),
        [first, ..] if first.is_ascii_uppercase() => http(head),
        _ => Sniffed::Other,
    };
    if found == Sniffed::More && head.len() >= MAX_HEAD { Sniffed::Other } else { found }
}

fn tls(head: &[u8]) -> Sniffed {
    let mut acceptor = Acceptor::default();
    let mut rest = head;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(0) | Err(_) => return Sniffed::Other,
            Ok(_) => {}
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().and_then(host_name);
                return Sniffed::Tls(name);
            }
            Ok(None) => {}
            Err(_) => return Sniffed::Other,
        }
    }
    Sniffed::More
}

fn http(head: &[u8]) -> Sniffed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Err(_) => Sniffed::Other,
        Ok(httparse::Status::Partial) => Sniffed::More,
        // The preface of HTTP/2 (RFC 9113, 3.4) parses as a request; what follows is none.
        Ok(_) if request.method == Some("PRI") => Sniffed::Other,
        Ok(_) => {
            let mut hosts = request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("host"));
            let (host, more) = (hosts.next(), hosts.next());
            if more.is_some() {
                return Sniffed::Http(None);
            }
            let absolute = request
                .path
                .and_then(|p| p.parse::<http::Uri>().ok())
                .and_then(|uri| uri.host().map(str::to_owned));
            let named =
                absolute.or_else(|| authority_host(host.and_then(|h| std::str::from_utf8(h.value).ok())?));
            Sniffed::Http(named.and_then(|h| host_name(&h)))
        }
    }
}

/// The host of an authority, without its port.
pub fn authority_host(text: &str) -> Option<String> {
    text.trim().parse::<http::uri::Authority>().ok().map(|a| a.host().to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn hello(name: &'static str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let mut client =
            ClientConnection::new(Arc::new(config), ServerName::try_from(name).unwrap()).unwrap();
        let mut out = Vec::new();
        client.write_tls(&mut out).unwrap();
        out
    }

    /// The same handshake message in records of `size` bytes.
    fn fragmented(hello: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for chunk in hello[5..].chunks(size) {
            out.extend([22, 3, 1]);
            out.extend((chunk.len() as u16).to_be_bytes());
            out.extend(chunk);
        }
        out
    }

    #[test]
    fn the_name_of_a_client_hello() {
        let hello = hello("Api.Example.com");
        assert_eq!(sniff(&hello), Sniffed::Tls(Some("api.example.com".into())));
        assert_eq!(sniff(&hello[..hello.len() - 1]), Sniffed::More);
        assert_eq!(sniff(&fragmented(&hello, 7)), Sniffed::Tls(Some("api.example.com".into())));
        assert_eq!(sniff(b"\x16\x03\x01\xff\xff"), Sniffed::Other);
    }

    #[test]
    fn the_host_of_a_request() {
        let http = |text: &str| sniff(text.as_bytes());
        let named = |name: &str| Sniffed::Http(Some(name.to_owned()));
        assert_eq!(http("GET / HTTP/1.1\r\nHost: A.example:8080\r\n\r\n"), named("a.example"));
        assert_eq!(http("GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n"), named("b.example"));
        assert_eq!(http("GET / HTTP/1.1\r\nHost: a.example\r\nHOST: b.example\r\n\r\n"), Sniffed::Http(None));
        assert_eq!(http("GET / HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n"), Sniffed::Http(None));
        assert_eq!(http("GET / HTTP/1.1\r\nHost: a.exam"), Sniffed::More);
        assert_eq!(http("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Sniffed::Other);
        assert_eq!(http("SSH-2.0-x\r\n"), Sniffed::Other);
        assert_eq!(http(&"A".repeat(MAX_HEAD)), Sniffed::Other);
    }

    proptest! {
        #[test]
        fn whatever_comes(bytes in prop::collection::vec(any::<u8>(), 0..300), prefix in any::<bool>()) {
            let bytes = if prefix { [&[22, 3, 1][..], &bytes].concat() } else { bytes };
            let _ = sniff(&bytes);
        }

        #[test]
        fn a_cut_hello_wants_more(size in 1usize..64) {
            let whole = fragmented(&hello("a.example"), size);
            for n in (1..whole.len()).step_by(11) {
                prop_assert_eq!(sniff(&whole[..n]), Sniffed::More);
            }
        }
    }
}
