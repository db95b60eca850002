//! HTTP and WebSocket reverse proxy to sandboxes
