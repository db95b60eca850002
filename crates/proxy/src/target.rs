//! Which sandbox and port a request is for.

use http::header::{HOST, HeaderMap};
use http::request::Parts;

/// Header with the sandbox's id.
pub const ID_HEADER: &str = "e2b-sandbox-id";
/// Header with the port.
pub const PORT_HEADER: &str = "e2b-sandbox-port";
/// Ids are this long at most.
const ID_LIMIT: usize = 64;

/// A sandbox's port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Id of the sandbox.
    pub sandbox_id: String,
    /// TCP port in the guest.
    pub port: u16,
}

/// A request that names no target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetError {
    /// Neither headers nor a host name of the right form.
    None,
    /// Not an id.
    BadId,
    /// Not a port.
    BadPort,
}

impl TargetError {
    /// One sentence.
    pub fn message(&self) -> &'static str {
        match self {
            Self::None => {
                "The request names no sandbox: set E2b-Sandbox-Id and E2b-Sandbox-Port, or use the host PORT-SANDBOXID.DOMAIN"
            }
            Self::BadId => "A sandbox id has 1 to 64 lower-case letters and digits",
            Self::BadPort => "A port is a number from 1 to 65535",
        }
    }
}

impl Target {
    /// Reads the headers first, then the host name.
    pub fn of(parts: &Parts) -> Result<Self, TargetError> {
        let headers = &parts.headers;
        match (headers.get(ID_HEADER), headers.get(PORT_HEADER)) {
            (Some(id), Some(port)) => {
                let text = |v: &http::HeaderValue| v.to_str().map(str::to_owned);
                let id = text(id).map_err(|_| TargetError::BadId)?;
                let port = text(port).map_err(|_| TargetError::BadPort)?;
                Self::new(&id, &port)
            }
            (Some(_), None) => Err(TargetError::BadPort),
            (None, _) => Self::of_host(host(headers, parts).ok_or(TargetError::None)?),
        }
    }

    fn new(id: &str, port: &str) -> Result<Self, TargetError> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if id.is_empty() || id.len() > ID_LIMIT || !id.bytes().all(plain) {
            return Err(TargetError::BadId);
        }
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = if digits { port.parse().ok().filter(|p| *p != 0) } else { None };
        Ok(Self { sandbox_id: id.to_owned(), port: port.ok_or(TargetError::BadPort)? })
    }

    /// `{port}-{sandboxID}.{anything}[:port]`; host names know no case.
    fn of_host(host: &str) -> Result<Self, TargetError> {
        let (label, _) = host.split_once('.').ok_or(TargetError::None)?;
        let (port, id) = label.split_once('-').ok_or(TargetError::None)?;
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(TargetError::None);
        }
        // Older sandbox ids carry the client's id behind a dash.
        let id = id.split('-').next().unwrap_or(id);
        Self::new(&id.to_ascii_lowercase(), port)
    }
}

/// HTTP/2 has the authority in the URI, HTTP/1.1 a header.
fn host<'a>(headers: &'a HeaderMap, parts: &'a Parts) -> Option<&'a str> {
    headers.get(HOST).and_then(|h| h.to_str().ok()).or_else(|| parts.uri.authority().map(|a| a.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(headers: &[(&str, &str)]) -> Result<Target, TargetError> {
        let mut request = http::Request::builder().uri("/");
        for (k, v) in headers {
            request = request.header(*k, *v);
        }
        Target::of(&request.body(()).unwrap().into_parts().0)
    }

    fn target(id: &str, port: u16) -> Target {
        Target { sandbox_id: id.into(), port }
    }

    #[test]
    fn headers_win_over_the_host() {
        let t = of(&[(ID_HEADER, "iabc"), (PORT_HEADER, "49983"), ("host", "80-other.example.com")]);
        assert_eq!(t, Ok(target("iabc", 49983)));
        assert_eq!(of(&[(ID_HEADER, "iabc")]), Err(TargetError::BadPort));
        assert_eq!(of(&[(ID_HEADER, "../x"), (PORT_HEADER, "1")]), Err(TargetError::BadId));
    }

    #[test]
    fn host_names() {
        assert_eq!(of(&[("host", "8000-iabc.e2b.app:5007")]), Ok(target("iabc", 8000)));
        assert_eq!(of(&[("host", "8000-IABC.e2b.app")]), Ok(target("iabc", 8000)));
        assert_eq!(of(&[("host", "8000-iabc-node1.e2b.app")]), Ok(target("iabc", 8000)));
        assert_eq!(of(&[("host", "70000-iabc.e2b.app")]), Err(TargetError::BadPort));
        assert_eq!(of(&[("host", "0-iabc.e2b.app")]), Err(TargetError::BadPort));
        for none in ["127.0.0.1:5007", "localhost", "my-host.example.com", "", "-.x"] {
            assert_eq!(of(&[("host", none)]), Err(TargetError::None), "{none}");
        }
    }

    proptest! {
        #[test]
        fn every_target_has_its_host_name(id in "[a-z0-9]{1,64}", port in 1u16.., domain in "[a-z.]{0,20}") {
            let host = format!("{port}-{id}.{domain}");
            prop_assert_eq!(of(&[("host", &host)]), Ok(target(&id, port)));
        }

        #[test]
        fn no_host_name_makes_it_panic(host in "[ -~]{0,80}") {
            if let Ok(t) = of(&[("host", &host)]) {
                prop_assert!(t.port != 0 && t.sandbox_id.bytes().all(|b| b.is_ascii_alphanumeric()));
            }
        }
    }
}
