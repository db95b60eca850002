//! The body of `POST /init`, by which the host tells a guest who it is.

use std::collections::HashMap;
use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// What the host tells envd after a boot or a resume. Absent fields leave things as they are,
/// but for the token: an authorised call without one takes the token away.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitRequest {
    /// Environment of every later process; replaces what an earlier call set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<HashMap<String, String>>,
    /// Token that later requests must bring in [`crate::ACCESS_TOKEN_HEADER`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The host's time when it wrote this; sets the guest's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<DateTime<Utc>>,
    /// User of requests that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Directory of processes and relative paths when none is named; otherwise the user's home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// Address that `events.e2b.local` gets in the guest's /etc/hosts.
    #[serde(rename = "hyperloopIP", skip_serializing_if = "Option::is_none")]
    pub hyperloop_ip: Option<String>,
    /// Network volumes to mount.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_mounts: Option<Vec<VolumeMount>>,
    /// Identifies one run of a sandbox; a call of another run is never stale.
    #[serde(rename = "lifecycleID", skip_serializing_if = "Option::is_none")]
    pub lifecycle_id: Option<String>,
    /// PEM certificates that the guest shall trust too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<String>,
    /// Ours: base64 of fresh random bytes (at least 64), mixed into the kernel's generator so
    /// that two clones of one snapshot never share random state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<String>,
    /// Ours: the guest's new host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

/// Names no values: the token and the environment are secrets.
impl fmt::Debug for InitRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InitRequest")
            .field("env_vars", &self.env_vars.as_ref().map(HashMap::len))
            .field("access_token", &self.access_token.is_some())
            .field("timestamp", &self.timestamp)
            .field("default_user", &self.default_user)
            .field("lifecycle_id", &self.lifecycle_id)
            .finish_non_exhaustive()
    }
}

/// A network volume of [`InitRequest`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeMount {
    /// `host:/export`.
    pub nfs_target: String,
    /// Where to mount it.
    pub path: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_wire_are_e2bs() {
        let request = InitRequest {
            env_vars: Some(HashMap::from([("A".into(), "1".into())])),
            hyperloop_ip: Some("10.0.0.1".into()),
            lifecycle_id: Some("x".into()),
            ca_bundle: Some("pem".into()),
            timestamp: Some(DateTime::UNIX_EPOCH),
            ..InitRequest::default()
        };
        let json = serde_json::to_value(&request).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "envVars": {"A": "1"}, "hyperloopIP": "10.0.0.1", "lifecycleID": "x",
                "caBundle": "pem", "timestamp": "1970-01-01T00:00:00Z",
            })
        );
    }

    #[test]
    fn accepts_nothing_and_unknown_fields() {
        let request: InitRequest = serde_json::from_str("{}").unwrap();
        assert!(request.access_token.is_none());
        let text = r#"{"timestamp":"2026-11-24T10:00:00.5+01:00","later":1,"accessToken":null}"#;
        let request: InitRequest = serde_json::from_str(text).unwrap();
        assert_eq!(request.timestamp.unwrap().timestamp_millis(), 1_795_510_800_500);
    }

    #[test]
    fn debug_shows_no_secret() {
        let request = InitRequest { access_token: Some("hunter2".into()), ..InitRequest::default() };
        assert!(!format!("{request:?}").contains("hunter2"));
    }
}
