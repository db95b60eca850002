//! How a message becomes bytes: protobuf's binary form or its JSON mapping.

use bytes::Bytes;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A message that has both forms.
pub trait Rpc: Message + Default + Serialize + DeserializeOwned + 'static {}

impl<T: Message + Default + Serialize + DeserializeOwned + 'static> Rpc for T {}

/// One of Connect's two message forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Protobuf's binary form.
    Proto,
    /// Protobuf's JSON mapping.
    Json,
}

/// Bytes that are not the message they should be.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not this message in binary form.
    #[error("cannot decode the protobuf message: {0}")]
    Proto(#[from] prost::DecodeError),
    /// Not this message in JSON.
    #[error("cannot decode the JSON message: {0}")]
    Json(#[from] serde_json::Error),
}

impl Codec {
    /// The codec of a unary call with this content type (parameters are allowed behind it).
    #[must_use]
    pub fn of_unary(content_type: &str) -> Option<Self> {
        match essence(content_type) {
            "application/proto" => Some(Self::Proto),
            "application/json" => Some(Self::Json),
            _ => None,
        }
    }

    /// The codec of a stream with this content type.
    #[must_use]
    pub fn of_stream(content_type: &str) -> Option<Self> {
        match essence(content_type) {
            "application/connect+proto" => Some(Self::Proto),
            "application/connect+json" => Some(Self::Json),
            _ => None,
        }
    }

    /// Content type of a unary message.
    #[must_use]
    pub fn unary_type(self) -> &'static str {
        match self {
            Self::Proto => "application/proto",
            Self::Json => "application/json",
        }
    }

    /// Content type of a stream.
    #[must_use]
    pub fn stream_type(self) -> &'static str {
        match self {
            Self::Proto => "application/connect+proto",
            Self::Json => "application/connect+json",
        }
    }

    /// The message's bytes.
    ///
    /// # Errors
    /// JSON only: a timestamp outside protobuf's range, or an unknown enum number.
    pub fn encode<M: Rpc>(self, message: &M) -> Result<Bytes, DecodeError> {
        Ok(match self {
            Self::Proto => message.encode_to_vec().into(),
            Self::Json => serde_json::to_vec(message)?.into(),
        })
    }

    /// The message that these bytes hold. An empty JSON text is an empty message, as in E2B.
    ///
    /// # Errors
    /// When they hold none.
    pub fn decode<M: Rpc>(self, bytes: &[u8]) -> Result<M, DecodeError> {
        Ok(match self {
            Self::Proto => M::decode(bytes)?,
            Self::Json if bytes.is_empty() => M::default(),
            Self::Json => serde_json::from_slice(bytes)?,
        })
    }
}

fn essence(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::filesystem::{EntryInfo, FileType};
    use crate::process::process_event::{DataEvent, EndEvent, data_event};
    use crate::process::{SendSignalRequest, StartRequest, process_selector};

    #[test]
    fn json_accepts_both_spellings_and_unknown_fields() {
        for text in [
            r#"{"process":{"pid":7},"signal":"SIGNAL_SIGKILL","x":{"y":[1]}}"#,
            r#"{"process":{"pid":7},"signal":9}"#,
        ] {
            let m: SendSignalRequest = Codec::Json.decode(text.as_bytes()).unwrap();
            assert_eq!(m.process.unwrap().selector, Some(process_selector::Selector::Pid(7)));
            assert_eq!(m.signal, 9);
        }
        for text in [r#"{"symlinkTarget":"/a","size":"5"}"#, r#"{"symlink_target":"/a","size":5}"#] {
            let m: EntryInfo = Codec::Json.decode(text.as_bytes()).unwrap();
            assert_eq!((m.symlink_target.as_deref(), m.size), (Some("/a"), 5));
        }
        let m: StartRequest =
            Codec::Json.decode(br#"{"process":{"cmd":"ls","envs":{"A":"b"},"args":["-l"]}}"#).unwrap();
        assert_eq!(m.process.unwrap().envs["A"], "b");
        assert_eq!(m.stdin, None);
    }

    #[test]
    fn json_has_protobufs_forms() {
        let end = EndEvent { exit_code: -1, exited: false, status: "signal: killed".into(), error: None };
        let text = Codec::Json.encode(&end).unwrap();
        assert_eq!(&text[..], br#"{"exitCode":-1,"status":"signal: killed"}"#);
        let data = DataEvent { output: Some(data_event::Output::Stdout(Bytes::from_static(b"\xff\x00"))) };
        assert_eq!(&Codec::Json.encode(&data).unwrap()[..], br#"{"stdout":"/wA="}"#);
        let entry = EntryInfo {
            name: "n".into(),
            r#type: FileType::Directory.into(),
            size: 1 << 40,
            modified_time: Some(pbjson_types::Timestamp { seconds: 1, nanos: 500_000_000 }),
            ..EntryInfo::default()
        };
        let json: serde_json::Value = serde_json::from_slice(&Codec::Json.encode(&entry).unwrap()).unwrap();
        assert_eq!(json["size"], "1099511627776");
        assert_eq!(json["type"], "FILE_TYPE_DIRECTORY");
        let time = json["modifiedTime"].as_str().unwrap();
        assert_eq!(chrono::DateTime::parse_from_rfc3339(time).unwrap().timestamp_millis(), 1500);
    }

    #[test]
    fn content_types() {
        assert_eq!(Codec::of_unary("application/json; charset=utf-8"), Some(Codec::Json));
        assert_eq!(Codec::of_unary("application/connect+json"), None);
        assert_eq!(Codec::of_stream("application/connect+proto"), Some(Codec::Proto));
    }
}
