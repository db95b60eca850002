//! The few requests to netfilter that are made while sandboxes start and run: elements of a slot's sets
//! replaced in one transaction (linux/netfilter/nf_tables.h), and connection tracking flushed
//! (linux/netfilter/nfnetlink_conntrack.h). Tables and chains are made ahead of need by `nft`.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use ipnet::Ipv4Net;

use crate::NetworkError;

const SUBSYS_CTNETLINK: u16 = 1;
const SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWSETELEM: u16 = SUBSYS_NFTABLES << 8 | 12;
const DELSETELEM: u16 = SUBSYS_NFTABLES << 8 | 14;
const GETGEN: u16 = SUBSYS_NFTABLES << 8 | 16;
const CT_GET: u16 = SUBSYS_CTNETLINK << 8 | 1;
const CT_DELETE: u16 = SUBSYS_CTNETLINK << 8 | 2;
/// CTA_TUPLE_ORIG with CTA_TUPLE_IP, CTA_IP_V4_SRC and CTA_IP_V4_DST in it; CTA_FILTER.
const CT_TUPLE: u16 = 1;
const CT_TUPLE_IP: u16 = 1;
const CT_SOURCE: u16 = 1;
const CT_DESTINATION: u16 = 2;
const CT_FILTER: u16 = 25;
const NLA_F_NESTED: u16 = 1 << 15;
const INTERVAL_END: u32 = 1;
/// linux/netfilter.h.
const NFPROTO_INET: u8 = 1;

/// A socket to the netfilter of one namespace. It stays in the namespace that it was opened in.
#[derive(Debug)]
pub struct Netfilter {
    socket: OwnedFd,
    transactions: u32,
}

/// The elements of one set: those that are there go, these come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetContent<'a> {
    /// Name of the set, of type `ipv4_addr` with `flags interval`.
    pub set: &'a str,
    /// What it is to contain.
    pub ranges: &'a [Ipv4Net],
}

impl Netfilter {
    /// Opens one in the calling thread's namespace.
    pub fn open() -> Result<Self, NetworkError> {
        let wrap = || NetworkError::last("open a socket to netfilter");
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER)
        };
        if fd < 0 {
            return Err(wrap());
        }
        // SAFETY: `fd` is open and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // A kernel that does not answer is no reason to wait for ever.
        let limit = libc::timeval { tv_sec: 5, tv_usec: 0 };
        // SAFETY: the kernel reads one timeval, which lives across the call.
        let set = unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(wrap());
        }
        Ok(Self { socket, transactions: 0 })
    }

    /// Replaces what is in these sets of table `inet TABLE`, all or nothing.
    pub fn replace(&mut self, table: &str, sets: &[SetContent]) -> Result<(), NetworkError> {
        let mut batch = Batch::default();
        batch.message(BATCH_BEGIN, libc::NLM_F_REQUEST as u16, 0, SUBSYS_NFTABLES, |_| {});
        for content in sets {
            let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
            batch.message(DELSETELEM, flags, NFPROTO_INET, 0, |m| {
                m.text(1, table);
                m.text(2, content.set);
            });
            // One attribute holds at most 64 KiB.
            for some in intervals(content.ranges).chunks(500) {
                batch.message(NEWSETELEM, flags | libc::NLM_F_CREATE as u16, NFPROTO_INET, 0, |m| {
                    m.text(1, table);
                    m.text(2, content.set);
                    m.nested(3, |m| {
                        for (first, end) in some {
                            m.element(*first, false);
                            if let Some(end) = end {
                                m.element(*end, true);
                            }
                        }
                    });
                });
            }
        }
        batch.message(BATCH_END, libc::NLM_F_REQUEST as u16, 0, SUBSYS_NFTABLES, |_| {});
        self.exchange(&batch, &format!("replace the sets of table {table}"))?;
        self.transactions += 1;
        Ok(())
    }

    /// How often it changed the rules: each time moves [`Self::generation`] by one.
    pub fn transactions(&self) -> u32 {
        self.transactions
    }

    /// How often the rules of the namespace were changed, by whomever.
    pub fn generation(&self) -> Result<u32, NetworkError> {
        let mut batch = Batch::default();
        batch.message(GETGEN, libc::NLM_F_REQUEST as u16, 0, 0, |_| {});
        let action = "ask for the generation of the rules";
        let messages = self.ask(&batch, false, action)?;
        let id = messages.iter().find_map(|m| attributes(m).find(|(kind, _)| *kind == 1).map(|(_, v)| v));
        let id = id.and_then(|v| v.try_into().ok()).map(u32::from_be_bytes);
        id.ok_or_else(|| NetworkError::io(action, std::io::Error::other("the answer has none")))
    }

    /// Forgets every tracked connection of the namespace.
    pub fn flush_conntrack(&self) -> Result<(), NetworkError> {
        let mut batch = Batch::default();
        batch.message(CT_DELETE, (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16, 0, 0, |_| {});
        self.exchange(&batch, "flush connection tracking")
    }

    /// How many connections the namespace tracks.
    pub fn connections(&self) -> Result<usize, NetworkError> {
        let mut batch = Batch::default();
        batch.message(
            CT_GET,
            (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16,
            libc::AF_INET as u8,
            0,
            |_| {},
        );
        Ok(self.ask(&batch, true, "list tracked connections")?.len())
    }

    /// Forgets the tracked connections that an address began or that were made to it.
    pub fn forget(&self, ip: Ipv4Addr) -> Result<(), NetworkError> {
        for end in [CT_SOURCE, CT_DESTINATION] {
            let mut batch = Batch::default();
            let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
            batch.message(CT_GET, flags, libc::AF_INET as u8, 0, |m| {
                m.nested(CT_TUPLE, |m| {
                    m.nested(CT_TUPLE_IP, |m| m.attribute(end, |m| m.bytes.extend(ip.octets())));
                });
                // A kernel before 5.8 does not know it, and lists all.
                m.nested(CT_FILTER, |m| m.attribute(1, |m| m.bytes.extend((u32::from(end)).to_ne_bytes())));
            });
            let action = format!("list the connections of {ip}");
            for message in self.ask(&batch, true, &action)? {
                let Some((_, tuple)) = attributes(&message).find(|(kind, _)| *kind == CT_TUPLE) else {
                    continue;
                };
                let ours = nested(tuple, CT_TUPLE_IP).and_then(|a| nested(a, end)) == Some(&ip.octets()[..]);
                if ours {
                    self.delete_connection(tuple)?;
                }
            }
        }
        Ok(())
    }

    fn delete_connection(&self, tuple: &[u8]) -> Result<(), NetworkError> {
        let mut batch = Batch::default();
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        batch.message(CT_DELETE, flags, libc::AF_INET as u8, 0, |m| {
            m.nested(CT_TUPLE, |m| m.bytes.extend(tuple));
        });
        match self.exchange(&batch, "forget a connection") {
            // It ended by itself.
            Err(NetworkError::Io { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done,
        }
    }

    fn send(&self, batch: &Batch, action: &str) -> Result<(), NetworkError> {
        let (fd, bytes) = (self.socket.as_raw_fd(), &batch.bytes);
        // SAFETY: the buffer lives across the call.
        let sent = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), 0) };
        if usize::try_from(sent) == Ok(bytes.len()) { Ok(()) } else { Err(NetworkError::last(action)) }
    }

    /// The next datagram of the kernel.
    fn receive<'a>(&self, buffer: &'a mut [u8], action: &str) -> Result<&'a [u8], NetworkError> {
        // SAFETY: the kernel writes at most the buffer's length.
        let got = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let got = usize::try_from(got).map_err(|_| NetworkError::last(action))?;
        Ok(&buffer[..got])
    }

    /// Sends one request and collects what is answered, without the headers; to its end if it is a list.
    fn ask(&self, batch: &Batch, list: bool, action: &str) -> Result<Vec<Vec<u8>>, NetworkError> {
        self.send(batch, action)?;
        let mut found = Vec::new();
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            for message in messages(self.receive(&mut buffer, action)?) {
                if message.sequence != batch.first {
                    continue;
                }
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(found),
                    libc::NLMSG_ERROR => {
                        let code = message.code().unwrap_or_default();
                        return Err(NetworkError::io(action, std::io::Error::from_raw_os_error(-code)));
                    }
                    // After nfgenmsg.
                    _ => found.push(message.body.get(4..).unwrap_or_default().to_vec()),
                }
                if !list {
                    return Ok(found);
                }
            }
        }
    }

    /// Sends and waits for the acknowledgement of each message that asks for one. The first error counts.
    fn exchange(&self, batch: &Batch, action: &str) -> Result<(), NetworkError> {
        self.send(batch, action)?;
        let mut open = batch.acks;
        let mut failed = None;
        let mut buffer = vec![0u8; 32 << 10];
        while open > 0 {
            for (sequence, code) in answers(self.receive(&mut buffer, action)?) {
                // Left over from an exchange that was given up.
                if sequence < batch.first || sequence >= batch.next {
                    continue;
                }
                open = open.saturating_sub(1);
                if code != 0 && failed.is_none() {
                    failed = Some(std::io::Error::from_raw_os_error(-code));
                }
                // An aborted transaction acknowledges nothing else.
                if failed.is_some() {
                    open = 0;
                }
            }
        }
        match failed {
            Some(e) => Err(NetworkError::io(action, e)),
            None => Ok(()),
        }
    }
}

/// One message of the kernel.
struct Message<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Message<'_> {
    /// The code of an acknowledgement.
    fn code(&self) -> Option<i32> {
        Some(i32::from_ne_bytes(self.body.get(..4)?.try_into().ok()?))
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let head = bytes.get(..16)?;
        let number = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = number(0) as usize;
        let body = bytes.get(16..length.min(bytes.len()))?;
        let message = Message { kind: u16::from_ne_bytes([head[4], head[5]]), sequence: number(8), body };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Kinds and values of a run of attributes.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let head = bytes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & !(NLA_F_NESTED | 1 << 14);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn nested(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Sequence numbers and codes of the acknowledgements in what the kernel sent.
fn answers(bytes: &[u8]) -> Vec<(u32, i32)> {
    messages(bytes)
        .filter(|m| i32::from(m.kind) == libc::NLMSG_ERROR)
        .filter_map(|m| Some((m.sequence, m.code()?)))
        .collect()
}

/// The ranges as sorted, disjoint intervals: first address, and the one after the last unless there is none.
fn intervals(ranges: &[Ipv4Net]) -> Vec<(Ipv4Addr, Option<Ipv4Addr>)> {
    let mut spans: Vec<(u32, u32)> =
        ranges.iter().map(|n| (n.network().to_bits(), n.broadcast().to_bits())).collect();
    spans.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::new();
    for (first, last) in spans {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
            _ => merged.push((first, last)),
        }
    }
    let after = |last: u32| last.checked_add(1).map(Ipv4Addr::from_bits);
    merged.into_iter().map(|(first, last)| (Ipv4Addr::from_bits(first), after(last))).collect()
}

/// Messages in one buffer (netlink(7)).
struct Batch {
    bytes: Vec<u8>,
    first: u32,
    next: u32,
    acks: usize,
}

impl Default for Batch {
    fn default() -> Self {
        // Numbers of an earlier exchange are not used again soon.
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
        let first = NEXT.fetch_add(1 << 12, std::sync::atomic::Ordering::Relaxed) & 0x7fff_ffff;
        Self { bytes: Vec::new(), first, next: first, acks: 0 }
    }
}

impl Batch {
    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.next.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.next += 1;
        self.acks += usize::from(i32::from(flags) & libc::NLM_F_ACK != 0);
        fill(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend(kind.to_ne_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.attribute(kind | NLA_F_NESTED, fill);
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, |m| {
            m.bytes.extend(text.as_bytes());
            m.bytes.push(0);
        });
    }

    /// NFTA_LIST_ELEM with NFTA_SET_ELEM_KEY (1) and NFTA_SET_ELEM_FLAGS (3).
    fn element(&mut self, key: Ipv4Addr, end: bool) {
        self.nested(1, |m| {
            m.nested(1, |m| m.attribute(1, |m| m.bytes.extend(key.octets())));
            if end {
                m.attribute(3, |m| m.bytes.extend(INTERVAL_END.to_be_bytes()));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net() -> impl Strategy<Value = Ipv4Net> {
        // Near each other and near both ends, so that they meet.
        let base = prop_oneof![0u32..1024, (u32::MAX - 1024)..=u32::MAX];
        (base, 22u8..=32)
            .prop_map(|(base, length)| Ipv4Net::new_assert(Ipv4Addr::from_bits(base), length).trunc())
    }

    proptest! {
        #[test]
        fn intervals_hold_what_the_ranges_hold(nets in prop::collection::vec(net(), 0..20)) {
            let made = intervals(&nets);
            for pair in made.windows(2) {
                // Sorted, and with a gap between.
                prop_assert!(pair[0].1.is_some_and(|end| end < pair[1].0));
            }
            let holds = |ip: Ipv4Addr| made.iter().any(|(first, end)| ip >= *first && end.is_none_or(|end| ip < end));
            for ip in (0..1100).chain((u32::MAX - 1100)..=u32::MAX).map(Ipv4Addr::from_bits) {
                prop_assert_eq!(holds(ip), nets.iter().any(|n| n.contains(&ip)), "{}", ip);
            }
        }

        #[test]
        fn whatever_the_kernel_sends(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = answers(&bytes);
            for message in messages(&bytes) {
                let _ = attributes(message.body).count();
            }
        }
    }
}
