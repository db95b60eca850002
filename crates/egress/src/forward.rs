//! A sandbox's DNS, where its policy has something to say about names.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::dns::{Asked, ask, checked_reply, datagram, frame, parse_question, read_frame, reply};
use crate::gateway::Slot;

/// How long a connection may say nothing.
const IDLE: Duration = Duration::from_secs(10);

/// Answers datagrams until the slot is closed.
pub async fn serve_udp(slot: Arc<Slot>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; 4096];
    loop {
        let received = tokio::select! {
            () = slot.stop.cancelled() => return,
            received = socket.recv_from(&mut buffer) => received,
        };
        let (n, from) = match received {
            Ok(received) => received,
            // An earlier answer found nobody.
            Err(e) => {
                tracing::debug!("receive a guest's question: {e}");
                continue;
            }
        };
        // Over the limit it is as if the datagram was lost: the guest asks again.
        let Ok(permit) = slot.questions.clone().try_acquire_owned() else {
            slot.counters().flows_over_limit.one();
            continue;
        };
        let (bytes, slot, socket) = (buffer[..n].to_vec(), slot.clone(), socket.clone());
        slot.tracker.clone().spawn(async move {
            tokio::select! {
                () = slot.stop.cancelled() => {}
                () = one(&slot, &socket, &bytes, from) => {}
            }
            drop(permit);
        });
    }
}

async fn one(slot: &Slot, socket: &UdpSocket, bytes: &[u8], from: SocketAddr) {
    let Some((asked, answer)) = answer(slot, bytes).await else { return };
    let wire = match &asked {
        Some(asked) => datagram(asked, &answer),
        None => answer.to_vec().map_err(std::io::Error::other),
    };
    let sent = match wire {
        Ok(wire) => socket.send_to(&wire, from).await.map(drop),
        Err(e) => Err(e),
    };
    if let Err(e) = sent {
        tracing::debug!("answer a guest's question: {e}");
    }
}

/// Answers connections until the slot is closed.
pub async fn serve_tcp(slot: Arc<Slot>, listener: TcpListener) {
    while let Some(mut stream) = slot.accept(&listener).await {
        let Ok(permit) = slot.questions.clone().try_acquire_owned() else {
            slot.counters().flows_over_limit.one();
            crate::tcp::reset(&stream);
            continue;
        };
        let slot = slot.clone();
        slot.tracker.clone().spawn(async move {
            tokio::select! {
                () = slot.stop.cancelled() => {}
                ended = questions(&slot, &mut stream) => if let Err(e) = ended {
                    tracing::debug!("a guest's questions over TCP: {e}");
                }
            }
            drop(permit);
        });
    }
}

async fn questions(slot: &Slot, stream: &mut TcpStream) -> std::io::Result<()> {
    while let Ok(Ok(bytes)) = timeout(IDLE, read_frame(stream)).await {
        let Some((_, answer)) = answer(slot, &bytes).await else { break };
        let wire = answer.to_vec().map_err(std::io::Error::other)?;
        stream.write_all(&frame(&wire)?).await?;
    }
    Ok(())
}

/// The answer to what a guest sent, with the question where it was one; `None` for what gets none.
async fn answer(slot: &Slot, bytes: &[u8]) -> Option<(Option<Message>, Message)> {
    let Asked { message, question, host } = match parse_question(bytes) {
        Ok(asked) => asked,
        Err(at_once) => return at_once.map(|answer| (None, *answer)),
    };
    let policy = slot.flows.policy();
    let resolves = match &host {
        Some(host) => policy.resolves(host),
        // Names that are none of hosts go where all names do.
        None => policy.resolves(""),
    };
    let transfer = matches!(question.query_type(), RecordType::ANY | RecordType::AXFR | RecordType::IXFR);
    if !resolves || transfer {
        slot.counters().dns_refused.one();
        let answer = reply(&message, ResponseCode::Refused);
        return Some((Some(message), answer));
    }
    // Guests have no IPv6, and what else these say leads round the gateway.
    if matches!(question.query_type(), RecordType::AAAA | RecordType::HTTPS | RecordType::SVCB) {
        let answer = reply(&message, ResponseCode::NoError);
        return Some((Some(message), answer));
    }
    let dialer = slot.dialer();
    let servers = policy.dns_servers().unwrap_or(&dialer.dns);
    let answer = match ask(&question, servers).await {
        Ok(upstream) => checked_reply(&message, upstream, |ip| dialer.forbidden(ip)),
        Err(e) => {
            slot.counters().dns_failed.one();
            tracing::debug!(host, "a guest's question: {e}");
            let answer = reply(&message, ResponseCode::ServFail);
            return Some((Some(message), answer));
        }
    };
    slot.counters().dns_answered.one();
    if let Some(host) = host.filter(|host| policy.allows_name(host)) {
        let found = answer.answers.iter().filter_map(|record| match &record.data {
            RData::A(a) => Some(a.0),
            _ => None,
        });
        slot.learn(host, found.collect());
    }
    Some((Some(message), answer))
}
