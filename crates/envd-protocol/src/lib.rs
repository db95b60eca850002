//! envd's protocol: Connect and protobuf types, and the host's client for envd
