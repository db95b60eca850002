//! Upgraded connections (WebSocket): two streams joined until either side or the sandbox ends.

use std::future;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::time::sleep_until;
use tokio_util::io::InspectReader;

use crate::streamed::{Limits, Used};

/// Bytes of the two buffers of a tunnel: most of them stand idle, and there may be thousands.
const COPY_BYTES: usize = 4 << 10;

/// Joins client and guest.
pub fn join(client: OnUpgrade, guest: OnUpgrade, connection: Used, limits: Limits) {
    tokio::spawn(async move {
        let moved = AtomicBool::new(false);
        let tunnel = async {
            let (client, guest) = match tokio::try_join!(client, guest) {
                Ok(both) => both,
                Err(e) => return tracing::debug!("an upgrade did not come about: {e}"),
            };
            let noted = |io| InspectReader::new(TokioIo::new(io), |_: &[u8]| moved.store(true, Relaxed));
            let (mut client, mut guest) = (noted(client), noted(guest));
            let copied = copy_bidirectional_with_sizes(&mut client, &mut guest, COPY_BYTES, COPY_BYTES).await;
            if let Err(e) = copied {
                tracing::debug!("a tunnel ended: {e}");
            }
        };
        tokio::select! {
            () = connection.upstream.gone().cancelled() => {}
            () = over(limits, &moved) => tracing::debug!("a tunnel's time was over"),
            () = tunnel => {}
        }
    });
}

/// Resolves when nothing moved for the whole of the idle time, or the total time is over.
async fn over(limits: Limits, moved: &AtomicBool) {
    loop {
        match limits.next() {
            Some(at) => sleep_until(at).await,
            None => return future::pending().await,
        }
        let ended = limits.end.is_some_and(|end| end <= tokio::time::Instant::now());
        if ended || !moved.swap(false, Relaxed) {
            return;
        }
    }
}
