//! Credentials of registries, and what they become in a request.
//!
//! Tokens: [Docker's token authentication](https://distribution.github.io/distribution/spec/auth/token/).
//! AWS: `GetAuthorizationToken` of [ECR's API](https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_GetAuthorizationToken.html).
//! GCP: the key of a service account as the password of
//! [`_json_key`](https://cloud.google.com/artifact-registry/docs/docker/authentication#json-key).

use std::collections::HashMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use object_store::aws::{AwsAuthorizer, AwsCredential};
use serde::Deserialize;
use url::Url;

use crate::OciError;
use crate::transport::{Endpoint, Transport};

const MAX_TOKEN_ANSWER: usize = 1 << 20;

/// What a registry wants to know of who asks.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    #[default]
    Anonymous,
    /// Name and password, or token in its place.
    Basic {
        /// Name.
        username: String,
        /// Password.
        password: String,
    },
    /// A key for AWS's registry.
    Aws {
        /// Key id.
        access_key_id: String,
        /// Secret.
        secret_access_key: String,
        /// Region of the registry.
        region: String,
    },
    /// The key of a service account, as JSON.
    Gcp {
        /// The document.
        service_account_json: String,
    },
}

/// Names no secret.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic",
            Self::Aws { .. } => "Aws",
            Self::Gcp { .. } => "Gcp",
        })
    }
}

impl Credentials {
    /// Name and password for the registry.
    pub(crate) async fn login(&self, transport: &Transport) -> Result<Option<(String, String)>, OciError> {
        match self {
            Self::Anonymous => Ok(None),
            Self::Basic { username, password } => Ok(Some((username.clone(), password.clone()))),
            Self::Gcp { service_account_json } => {
                let key: HashMap<String, serde_json::Value> = serde_json::from_str(service_account_json)
                    .map_err(|_| OciError::BadCredentials("the service account is no JSON object".into()))?;
                if !key.contains_key("private_key") {
                    return Err(OciError::BadCredentials("the service account has no private_key".into()));
                }
                Ok(Some(("_json_key".to_owned(), service_account_json.clone())))
            }
            Self::Aws { access_key_id, secret_access_key, region } => {
                aws_login(transport, access_key_id, secret_access_key, region).await.map(Some)
            }
        }
    }
}

async fn aws_login(
    transport: &Transport,
    key_id: &str,
    secret: &str,
    region: &str,
) -> Result<(String, String), OciError> {
    let bad = |text: &str| OciError::BadCredentials(text.to_owned());
    if region.is_empty() || !region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    {
        return Err(bad("the AWS region has letters, digits and '-'"));
    }
    let url = format!("https://api.ecr.{region}.amazonaws.com/");
    let url = Url::parse(&url).map_err(|_| bad("the AWS region is none"))?;
    let endpoint = transport.other(&url)?;
    let (headers, body) = aws_request(&url, key_id, secret, region)?;
    let response = endpoint.send(endpoint.post(url).headers(headers).body(body)).await?;
    if !response.status().is_success() {
        return Err(OciError::Unauthorized {
            host: endpoint.host,
            what: "an ECR token".into(),
            status: response.status().as_u16(),
        });
    }
    let text = endpoint.body(response, "ECR's answer", MAX_TOKEN_ANSWER).await?;
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Data {
        authorization_token: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        authorization_data: Vec<Data>,
    }
    let answer: Answer = serde_json::from_slice(&text).map_err(|e| OciError::malformed("ECR's answer", e))?;
    let token = answer.authorization_data.first().map(|d| d.authorization_token.as_str()).unwrap_or_default();
    let pair = STANDARD.decode(token).ok().and_then(|b| String::from_utf8(b).ok());
    let pair = pair.as_deref().and_then(|p| p.split_once(':'));
    let (name, password) = pair.ok_or_else(|| bad("ECR gave no token"))?;
    Ok((name.to_owned(), password.to_owned()))
}

/// Signed headers and the body of a request for a token.
fn aws_request(
    url: &Url,
    key_id: &str,
    secret: &str,
    region: &str,
) -> Result<(http::HeaderMap, &'static str), OciError> {
    let body = "{}";
    let request = http::Request::post(url.as_str())
        .header("content-type", "application/x-amz-json-1.1")
        .header("x-amz-target", "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken")
        .body(body.to_owned().into())
        .map_err(|e| OciError::BadCredentials(e.to_string()))?;
    let mut request: object_store::client::HttpRequest = request;
    let key = AwsCredential { key_id: key_id.to_owned(), secret_key: secret.to_owned(), token: None };
    AwsAuthorizer::new(&key, "ecr", region)
        .try_authorize(&mut request, None)
        .map_err(|e| OciError::BadCredentials(e.to_string()))?;
    Ok((request.headers().clone(), body))
}

/// What a registry asks for with status 401.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// Of a `WWW-Authenticate` header (RFC 9110, section 11.6.1).
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.split_once(' ').unwrap_or((header, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let parameters = parameters(rest);
        let realm = parameters.get("realm")?.clone();
        Some(Self::Bearer { realm, service: parameters.get("service").cloned() })
    }
}

/// `name="value"`, with commas between, which values may hold too.
fn parameters(text: &str) -> HashMap<String, String> {
    let mut found = HashMap::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([',', ' ']).to_ascii_lowercase();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(name, value.to_owned());
        rest = next;
    }
    found
}

/// Gets a token for reading `repository`.
pub(crate) async fn token(
    transport: &Transport,
    realm: &str,
    service: Option<&str>,
    repository: &str,
    login: Option<&(String, String)>,
) -> Result<String, OciError> {
    let mut url = Url::parse(realm).map_err(|e| OciError::malformed("the registry's token address", e))?;
    {
        let mut query = url.query_pairs_mut();
        if let Some(service) = service {
            query.append_pair("service", service);
        }
        query.append_pair("scope", &format!("repository:{repository}:pull"));
    }
    let endpoint: Endpoint = transport.other(&url)?;
    let mut request = endpoint.get(url);
    if let Some((name, password)) = login {
        request = request.basic_auth(name, Some(password));
    }
    let response = endpoint.send(request).await?;
    let status = response.status();
    if !status.is_success() {
        let (host, what) = (endpoint.host, repository.to_owned());
        return Err(OciError::Unauthorized { host, what, status: status.as_u16() });
    }
    let text = endpoint.body(response, "a token", MAX_TOKEN_ANSWER).await?;
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(&text).map_err(|e| OciError::malformed("a token", e))?;
    answer.token.or(answer.access_token).ok_or_else(|| OciError::malformed("a token", "there is none in it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_understood() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let bearer = Challenge::Bearer {
            realm: "https://auth.docker.io/token".into(),
            service: Some("registry.docker.io".into()),
        };
        assert_eq!(Challenge::parse(header), Some(bearer));
        assert_eq!(Challenge::parse("Basic realm=\"x\""), Some(Challenge::Basic));
        let bare = Challenge::Bearer { realm: "http://r".into(), service: None };
        assert_eq!(Challenge::parse("bearer realm=http://r"), Some(bare));
        assert_eq!(Challenge::parse("Negotiate"), None);
        assert_eq!(Challenge::parse("Bearer nothing"), None);
    }

    #[test]
    fn a_request_to_aws_is_signed_for_its_region() {
        let url = Url::parse("https://api.ecr.eu-west-1.amazonaws.com/").unwrap();
        let (headers, _) = aws_request(&url, "AKIDEXAMPLE", "secret", "eu-west-1").unwrap();
        let text = headers["authorization"].to_str().unwrap();
        assert!(text.starts_with("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/"), "{text}");
        assert!(text.contains("/eu-west-1/ecr/aws4_request") && text.contains("x-amz-target"), "{text}");
        assert!(!format!("{headers:?}").contains("secret"));
    }

    #[test]
    fn debug_shows_no_secret() {
        let c = Credentials::Basic { username: "me".into(), password: "hunter2".into() };
        assert!(!format!("{c:?}").contains("hunter2"));
    }
}
