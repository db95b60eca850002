//! Redirected TCP: looked at, let through or cut.

use std::io::Cursor;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nidus_network::original_destination;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use crate::dial::{DialError, Upstream, prepare};
use crate::gateway::Slot;
use crate::intercept;
use crate::policy::Verdict;
use crate::sniff::{MAX_HEAD, Sniffed, sniff};

/// How long a client may take to say where it wants to go.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Bytes in each direction of a flow. A guest may have hundreds of flows.
const COPY_BYTES: usize = 16 << 10;

/// Serves a slot's listener until the slot is closed.
pub async fn serve(slot: Arc<Slot>, listener: TcpListener) {
    while let Some(guest) = slot.accept(&listener).await {
        let Ok(permit) = slot.connections.clone().try_acquire_owned() else {
            slot.counters().flows_over_limit.one();
            reset(&guest);
            continue;
        };
        let (slot, tracker) = (slot.clone(), slot.tracker.clone());
        tracker.spawn(async move {
            let stop = slot.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = flow(slot, guest, permit) => {}
            }
        });
    }
}

/// The other end shall know at once, and not by a silence.
pub fn reset(socket: &impl AsFd) {
    let socket = socket2::SockRef::from(socket);
    if let Err(e) = socket.set_linger(Some(Duration::ZERO)) {
        tracing::debug!("reset a flow: {e}");
    }
}

async fn flow(slot: Arc<Slot>, mut guest: TcpStream, permit: OwnedSemaphorePermit) {
    let Ok(to) = original_destination(&guest) else { return reset(&guest) };
    prepare(&guest);
    let policy = slot.flows.policy();
    let mut head = Vec::new();
    let sniffed = if policy.looks_into(to) { read_head(&mut guest, &mut head).await } else { Sniffed::Other };
    let named = match &sniffed {
        Sniffed::Tls(name) | Sniffed::Http(name) => name.clone(),
        _ => None,
    };
    let by_address = policy.decide(*to.ip(), None) != Verdict::Deny;
    let per_request = matches!(sniffed, Sniffed::Http(_)) && (policy.has_rules() || !by_address);
    let verdict = policy.decide(*to.ip(), named.as_deref());
    // Requests have an answer that says why not.
    if verdict == Verdict::Deny && !per_request {
        slot.counters().flows_denied.one();
        tracing::debug!(%to, host = named, "a flow was refused");
        return reset(&guest);
    }
    // For HTTP the first request turns it to its host.
    let host = named.clone().filter(|_| !per_request);
    let undecided = per_request && !by_address;
    let Some(mut guard) = slot.flows.enter(&policy, *to.ip(), host, undecided) else {
        return reset(&guest);
    };
    guard.hold(permit);
    slot.counters().flows_allowed.one();
    // Whoever holds the socket then: this one closes it with a reset.
    let Ok(handle) = guest.as_fd().try_clone_to_owned() else { return reset(&guest) };
    let cut = guard.cut().clone();
    let ends = async {
        match (sniffed, named) {
            (Sniffed::Http(_), _) if per_request => {
                intercept::plain(&slot, guard, prefixed(head, guest), to).await
            }
            (Sniffed::Tls(_), Some(host)) if policy.headers_for(&host).is_some() => {
                intercept::tls(&slot, guard, prefixed(head, guest), to, host).await;
            }
            (_, named) => {
                let upstream = match (verdict, named) {
                    (Verdict::ByName, Some(host)) => slot.dialer().name(&policy, &host, to.port()).await,
                    _ => slot.dialer().address(&policy, to).await,
                };
                carry(&slot, guest, &head, upstream).await;
                drop(guard);
            }
        }
    };
    tokio::select! {
        () = ends => {}
        () = cut.cancelled() => {
            slot.counters().flows_cut.one();
            reset(&handle);
        }
    }
}

async fn carry(slot: &Slot, mut guest: TcpStream, head: &[u8], upstream: Result<Upstream, DialError>) {
    let mut upstream = match upstream {
        Ok(stream) => stream,
        Err(e) => {
            slot.counters().flows_failed.one();
            tracing::debug!("a flow that was allowed: {e}");
            return reset(&guest);
        }
    };
    if upstream.write_all(head).await.is_err() {
        return reset(&guest);
    }
    let copied =
        tokio::io::copy_bidirectional_with_sizes(&mut guest, &mut upstream, COPY_BYTES, COPY_BYTES).await;
    match copied {
        Ok((up, down)) => {
            slot.counters().bytes_up.add(up);
            slot.counters().bytes_down.add(down);
        }
        Err(_) => reset(&guest),
    }
}

/// The guest's stream with what was read of it in front again.
pub type Prefixed = tokio::io::Join<
    tokio::io::Chain<Cursor<Vec<u8>>, tokio::net::tcp::OwnedReadHalf>,
    tokio::net::tcp::OwnedWriteHalf,
>;

fn prefixed(head: Vec<u8>, guest: TcpStream) -> Prefixed {
    let (read, write) = guest.into_split();
    tokio::io::join(Cursor::new(head).chain(read), write)
}

/// Reads until it is clear where a flow wants to go, or that it does not say.
async fn read_head(guest: &mut TcpStream, head: &mut Vec<u8>) -> Sniffed {
    let until = Instant::now() + HEAD_TIME;
    loop {
        match sniff(head) {
            Sniffed::More => {}
            known => return known,
        }
        let mut more = guest.take((MAX_HEAD - head.len()) as u64);
        match timeout_at(until, more.read_buf(head)).await {
            Ok(Ok(1..)) => {}
            _ => return Sniffed::Other,
        }
    }
}
