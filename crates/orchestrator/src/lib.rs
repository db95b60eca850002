//! The node daemon: gRPC services, sandbox map, admission, timeouts, events
