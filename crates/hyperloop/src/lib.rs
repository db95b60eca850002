//! The HTTP service that guests may call, each only as itself
