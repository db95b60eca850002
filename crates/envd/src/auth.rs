//! Who may call: the access token, and signatures of file URLs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::HeaderMap;
use nidus_envd_protocol::ACCESS_TOKEN_HEADER;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::reply::HttpError;

/// Compares in a time that depends on the lengths alone.
pub fn equal(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

/// The token that a request brings.
pub fn token_of(headers: &HeaderMap) -> Option<&str> {
    headers.get(ACCESS_TOKEN_HEADER).and_then(|v| v.to_str().ok())
}

/// Lets a request through that brings the token, or any when none is set.
pub fn check_token(token: Option<&str>, headers: &HeaderMap) -> Result<(), HttpError> {
    match token {
        Some(token) if !token_of(headers).is_some_and(|given| equal(given, token)) => {
            Err(HttpError::unauthorized(
                "unauthorized access, please provide a valid access token or method signing if supported",
            ))
        }
        _ => Ok(()),
    }
}

/// What a signed URL says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Signed<'a> {
    /// Path as in the query.
    pub path: &'a str,
    /// User as in the query; empty when absent.
    pub user: &'a str,
    pub signature: Option<&'a str>,
    /// Seconds since 1970.
    pub expiration: Option<i64>,
}

/// What the URL allows.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    Read,
    Write,
}

/// Lets a file request through that brings the token or a valid signature.
pub fn check_file_access(
    token: Option<&str>,
    headers: &HeaderMap,
    signed: &Signed<'_>,
    operation: Operation,
    now: i64,
) -> Result<(), HttpError> {
    let Some(token) = token else { return Ok(()) };
    if let Some(given) = token_of(headers) {
        return if equal(given, token) {
            Ok(())
        } else {
            Err(HttpError::unauthorized("access token present in header but does not match"))
        };
    }
    let Some(given) = signed.signature else {
        return Err(HttpError::unauthorized("missing signature query parameter"));
    };
    if !equal(given, &signature(token, signed, operation)) {
        return Err(HttpError::unauthorized("invalid signature"));
    }
    if signed.expiration.is_some_and(|at| at < now) {
        return Err(HttpError::unauthorized("signature is already expired"));
    }
    Ok(())
}

/// `v1_` and the unpadded base64 of SHA-256 over `path:operation:user:token[:expiration]`.
fn signature(token: &str, signed: &Signed<'_>, operation: Operation) -> String {
    let operation = match operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut text = format!("{}:{operation}:{}:{token}", signed.path, signed.user);
    if let Some(at) = signed.expiration {
        text.push_str(&format!(":{at}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    // Made with the Python SDK's `get_signature` (2.63.0) for these arguments, the time fixed.
    const READ: &str = "v1_cDBbVx4OFeTfc039TEq86uOXWNOUawaaYVIpCzB4iG8";
    const EXPIRING: &str = "v1_JlHMYQwQ1/0/jPX/9qtq5VFc12hR3lcOLnlVBggW28Y";

    fn check(signed: &Signed<'_>, operation: Operation, now: i64) -> Result<(), String> {
        check_file_access(Some("tok"), &HeaderMap::new(), signed, operation, now).map_err(|e| e.message)
    }

    #[test]
    fn signatures_are_the_sdks() {
        let read = Signed { path: "/a b", user: "user", signature: Some(READ), expiration: None };
        assert_eq!(check(&read, Operation::Read, 0), Ok(()));
        assert_eq!(check(&read, Operation::Write, 0), Err("invalid signature".into()));
        let other = Signed { path: "/a", ..read };
        assert_eq!(check(&other, Operation::Read, 0), Err("invalid signature".into()));
        let expiring =
            Signed { path: "x", user: "", signature: Some(EXPIRING), expiration: Some(1_800_000_000) };
        assert_eq!(check(&expiring, Operation::Read, 1_799_999_999), Ok(()));
        assert_eq!(
            check(&expiring, Operation::Read, 1_800_000_001),
            Err("signature is already expired".into())
        );
        assert_eq!(
            check(&Signed::default(), Operation::Read, 0),
            Err("missing signature query parameter".into())
        );
    }

    #[test]
    fn the_header_decides_before_the_signature() {
        let mut headers = HeaderMap::new();
        let signed = Signed { path: "/a b", user: "user", signature: Some(READ), expiration: None };
        headers.insert(ACCESS_TOKEN_HEADER, HeaderValue::from_static("wrong"));
        assert!(check_file_access(Some("tok"), &headers, &signed, Operation::Read, 0).is_err());
        headers.insert(ACCESS_TOKEN_HEADER, HeaderValue::from_static("tok"));
        assert!(check_file_access(Some("tok"), &headers, &Signed::default(), Operation::Read, 0).is_ok());
        assert!(check_file_access(None, &HeaderMap::new(), &Signed::default(), Operation::Write, 0).is_ok());
    }
}
