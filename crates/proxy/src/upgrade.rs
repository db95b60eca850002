//! Upgraded connections (WebSocket): two streams joined until either side or the sandbox ends.

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use crate::upstream::{Permit, Upstream};

/// Joins client and guest.
pub fn join(client: OnUpgrade, guest: OnUpgrade, upstream: std::sync::Arc<Upstream>, permit: Permit) {
    tokio::spawn(async move {
        let _permit = permit;
        let tunnel = async {
            let (client, guest) = match tokio::try_join!(client, guest) {
                Ok(both) => both,
                Err(e) => return tracing::debug!("an upgrade did not come about: {e}"),
            };
            let (mut client, mut guest) = (TokioIo::new(client), TokioIo::new(guest));
            if let Err(e) = copy_bidirectional(&mut client, &mut guest).await {
                tracing::debug!("a tunnel ended: {e}");
            }
        };
        tokio::select! {
            () = upstream.gone().cancelled() => {}
            () = tunnel => {}
        }
    });
}
