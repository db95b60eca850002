//! Generated gRPC types of the node daemon (orchestrator, template manager, info, chunks)
