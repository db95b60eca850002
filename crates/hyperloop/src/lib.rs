//! The HTTP service that guests may call, each only as itself.
//!
//! Every sandbox has a listener of its own inside its network namespace (see `nidus-network`), so who calls is
//! known by where the call arrives and cannot be said otherwise. Guests find it at `http://192.0.2.1`, also
//! as `events.e2b.local`, whatever their network policy is.
//!
//! - `GET /me`: `{"sandboxID": …}`.
//! - `POST /logs`: one JSON object, an array of them, or one in each line. Bounded in size and rate; what is
//!   too much is refused with 429 and said so, never dropped in silence.

mod logs;
mod rate;
mod server;

pub use server::{Hyperloop, Limits, serve};
