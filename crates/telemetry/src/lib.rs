//! Tracing, metrics and event sinks
