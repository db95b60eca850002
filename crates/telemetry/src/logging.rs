//! The process-wide `tracing` subscriber.

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Name of the environment variable that holds the filter directives (`info,nidus_proxy=debug`).
pub const FILTER_VARIABLE: &str = "NIDUS_LOG";

/// How a log line is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One readable line per record.
    #[default]
    Text,
    /// One JSON object per record, for collectors.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter directives do not parse.
    #[error("cannot read the log filter `{filter}`: {source}")]
    Filter {
        /// The directives as given.
        filter: String,
        /// What the parser found.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// A subscriber is already installed in this process.
    #[error("cannot install the log subscriber: another one is already installed in this process")]
    Installed,
}

/// Installs the subscriber of this process: records go to standard error, so that standard output
/// stays free for what a command prints.
///
/// # Errors
/// [`InitError::Filter`] when `filter` does not parse, [`InitError::Installed`] on a second call.
pub fn init(format: Format, filter: &str) -> Result<(), InitError> {
    let directives = EnvFilter::try_new(filter)
        .map_err(|source| InitError::Filter { filter: filter.to_owned(), source })?;
    let builder = tracing_subscriber::fmt().with_env_filter(directives).with_writer(std::io::stderr);
    match format {
        Format::Text => builder.with_target(true).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_| InitError::Installed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_filter_is_named_in_the_error() {
        let error = init(Format::Text, "info,nidus=[broken").unwrap_err();
        assert!(matches!(error, InitError::Filter { .. }));
        assert!(error.to_string().contains("nidus=[broken"), "{error}");
    }
}
