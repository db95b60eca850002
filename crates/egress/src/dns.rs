//! Names to addresses: questions to the resolvers that the node or a policy names, their answers checked.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// How long one resolver may take, before the next is asked.
const ASK_TIME: Duration = Duration::from_millis(2500);
/// Bytes of an answer that we ask for over UDP (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;
const MAX_CACHED: usize = 4096;
/// How long an answer is kept, whatever it says of itself.
const MIN_TTL: Duration = Duration::from_secs(1);
const MAX_TTL: Duration = Duration::from_secs(300);
/// CNAMEs that are followed in one answer.
const MAX_CHAIN: usize = 8;

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No resolver answered.
    #[error("no resolver answered for {name}: {why}")]
    NoAnswer {
        /// The name.
        name: String,
        /// What the last one did.
        why: String,
    },
    /// A resolver says that there is none.
    #[error("{0} has no IPv4 address")]
    NoAddress(String),
    /// All its addresses are where no sandbox goes.
    #[error("{0} resolves to addresses that no sandbox reaches")]
    Forbidden(String),
}

/// Addresses and until when they are good.
type Cached = (Vec<Ipv4Addr>, Instant);

/// Asks resolvers, and remembers addresses for a while.
#[derive(Debug, Default)]
pub struct Resolver {
    cache: Mutex<HashMap<(String, Vec<SocketAddr>), Cached>>,
}

impl Resolver {
    /// The IPv4 addresses of a name ([`crate::host_name`]), unchecked.
    ///
    /// # Errors
    /// When no server answers or there is none.
    pub async fn addresses(&self, name: &str, servers: &[SocketAddr]) -> Result<Vec<Ipv4Addr>, ResolveError> {
        let key = (name.to_owned(), servers.to_vec());
        if let Some((addresses, until)) = self.cache.lock().get(&key)
            && *until > Instant::now()
        {
            return Ok(addresses.clone());
        }
        let no_answer = |why: String| ResolveError::NoAnswer { name: name.to_owned(), why };
        let wire = Name::from_ascii(format!("{name}.")).map_err(|e| no_answer(e.to_string()))?;
        let question = Query::query(wire, RecordType::A);
        let answer = ask(&question, servers).await.map_err(|e| no_answer(e.to_string()))?;
        let (addresses, ttl) = follow(&question, &answer);
        if addresses.is_empty() {
            return Err(ResolveError::NoAddress(name.to_owned()));
        }
        let until = Instant::now() + Duration::from_secs(ttl.into()).clamp(MIN_TTL, MAX_TTL);
        let mut cache = self.cache.lock();
        if cache.len() >= MAX_CACHED {
            let now = Instant::now();
            cache.retain(|_, (_, until)| *until > now);
            if cache.len() >= MAX_CACHED {
                cache.clear();
            }
        }
        cache.insert(key, (addresses.clone(), until));
        Ok(addresses)
    }
}

/// The addresses that an answer gives for a question, by its CNAMEs, and the least time that it is good for.
fn follow(question: &Query, answer: &Message) -> (Vec<Ipv4Addr>, u32) {
    let (mut name, mut ttl) = (question.name().clone(), u32::MAX);
    for _ in 0..MAX_CHAIN {
        let mut found = Vec::new();
        let mut next = None;
        for record in answer.answers.iter().filter(|r| r.name == name) {
            match &record.data {
                RData::A(a) => {
                    found.push(a.0);
                    ttl = ttl.min(record.ttl);
                }
                RData::CNAME(target) => {
                    next = Some(target.0.clone());
                    ttl = ttl.min(record.ttl);
                }
                _ => {}
            }
        }
        match next {
            _ if !found.is_empty() => return (found, ttl),
            Some(target) => name = target,
            None => break,
        }
    }
    (Vec::new(), 0)
}

/// Asks one resolver after the other until one answers.
pub async fn ask(question: &Query, servers: &[SocketAddr]) -> io::Result<Message> {
    let mut last = io::Error::other("no resolver is configured");
    for server in servers {
        match timeout(ASK_TIME, ask_one(question, *server)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(e)) => last = io::Error::new(e.kind(), format!("{server}: {e}")),
            Err(_) => {
                last = io::Error::new(io::ErrorKind::TimedOut, format!("{server} did not answer in time"))
            }
        }
    }
    Err(last)
}

/// A random number and a port of its own for every question, so that nobody who does not see it can answer it.
async fn ask_one(question: &Query, server: SocketAddr) -> io::Result<Message> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(question.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD).set_version(0);
    message.set_edns(edns);
    let wire = message.to_vec().map_err(io::Error::other)?;

    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(server).await?;
    socket.send(&wire).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let n = socket.recv(&mut buffer).await?;
        // What is no answer to this is as good as nothing: the real one may still come.
        match answer_to(&message, &buffer[..n]) {
            Some(answer) if answer.metadata.truncation => break,
            Some(answer) => return Ok(answer),
            None => {}
        }
    }
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&frame(&wire)?).await?;
    let reply = read_frame(&mut stream).await?;
    answer_to(&message, &reply)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer over TCP to something else"))
}

/// Parses what came back, if it answers what was asked.
fn answer_to(asked: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let (m, a) = (&answer.metadata, &asked.metadata);
    let same = m.id == a.id && m.message_type == MessageType::Response && m.op_code == OpCode::Query;
    (same && answer.queries == asked.queries).then_some(answer)
}

/// A message as TCP carries it (RFC 1035, 4.2.2).
pub fn frame(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::other("a message over 65535 bytes"))?;
    Ok([&length.to_be_bytes(), message].concat())
}

/// The next message of a TCP stream.
pub async fn read_frame(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// A guest's question, if it is one that is forwarded at all.
pub struct Asked {
    /// As it came.
    pub message: Message,
    /// Its one question.
    pub question: Query,
    /// Its name as policies compare it; `None` when it is none of a host.
    pub host: Option<String>,
}

/// Reads a guest's question.
///
/// # Errors
/// With the answer that it gets at once; `None` for what gets none.
pub fn parse_question(bytes: &[u8]) -> Result<Asked, Option<Box<Message>>> {
    let message = Message::from_vec(bytes).map_err(|_| None)?;
    let m = message.metadata;
    if m.message_type != MessageType::Query {
        return Err(None);
    }
    let (op, [question]) = (m.op_code, message.queries.as_slice()) else {
        return Err(Some(Message::error_msg(m.id, m.op_code, ResponseCode::FormErr).into()));
    };
    let question = question.clone();
    if op != OpCode::Query {
        return Err(Some(Message::error_msg(m.id, op, ResponseCode::NotImp).into()));
    }
    if question.query_class() != DNSClass::IN {
        return Err(Some(reply(&message, ResponseCode::Refused).into()));
    }
    let host = crate::host_name(&question.name().to_ascii());
    Ok(Asked { message, question, host })
}

/// An answer to a question, without records.
pub fn reply(asked: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::error_msg(asked.metadata.id, OpCode::Query, code);
    answer.metadata.recursion_desired = asked.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.add_queries(asked.queries.iter().cloned());
    if asked.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD).set_version(0);
        answer.set_edns(edns);
    }
    answer
}

/// The upstream's answer as the guest gets it: addresses that `forbidden` names are taken out, and what would
/// lead it to another protocol.
pub fn checked_reply(asked: &Message, upstream: Message, forbidden: impl Fn(Ipv4Addr) -> bool) -> Message {
    let mut answer = reply(asked, upstream.metadata.response_code);
    let good = |record: &Record| match &record.data {
        RData::A(a) => !forbidden(a.0),
        RData::AAAA(_) | RData::HTTPS(_) | RData::SVCB(_) => false,
        _ => true,
    };
    answer.add_answers(upstream.answers.into_iter().filter(good));
    answer.add_authorities(upstream.authorities.into_iter().filter(good));
    answer
}

/// The bytes of an answer for a datagram: what does not fit says so, and the guest asks again over TCP.
pub fn datagram(asked: &Message, answer: &Message) -> io::Result<Vec<u8>> {
    let limit = asked.edns.as_ref().map_or(512, |e| e.max_payload().clamp(512, 4096));
    let wire = answer.to_vec().map_err(io::Error::other)?;
    if wire.len() <= limit.into() { Ok(wire) } else { answer.truncate().to_vec().map_err(io::Error::other) }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn question(text: &str) -> Message {
        let mut message = Message::query();
        message.add_query(Query::query(name(text), RecordType::A));
        message
    }

    #[test]
    fn only_an_answer_to_the_question_is_one() {
        let asked = question("good.example.");
        let mut answer = reply(&asked, ResponseCode::NoError);
        assert!(answer_to(&asked, &answer.to_vec().unwrap()).is_some());
        answer.metadata.id ^= 1;
        assert!(answer_to(&asked, &answer.to_vec().unwrap()).is_none());
        let mut other = question("evil.example.");
        other.metadata.id = asked.metadata.id;
        assert!(answer_to(&asked, &reply(&other, ResponseCode::NoError).to_vec().unwrap()).is_none());
        assert!(answer_to(&asked, &asked.to_vec().unwrap()).is_none(), "a question is no answer");
    }

    #[test]
    fn private_addresses_do_not_reach_the_guest() {
        let asked = question("rebind.example.");
        let mut upstream = reply(&asked, ResponseCode::NoError);
        for ip in [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(203, 0, 113, 5)] {
            upstream.add_answer(Record::from_rdata(name("rebind.example."), 60, RData::A(A(ip))));
        }
        upstream.add_answer(Record::from_rdata(
            name("rebind.example."),
            60,
            RData::AAAA(AAAA(std::net::Ipv6Addr::LOCALHOST)),
        ));
        let answer = checked_reply(&asked, upstream, |ip| nidus_network::is_denied(ip, &[]));
        let kept: Vec<_> = answer.answers.iter().map(|r| r.data.clone()).collect();
        assert_eq!(kept, [RData::A(A(Ipv4Addr::new(203, 0, 113, 5)))]);
    }

    #[test]
    fn other_names_in_an_answer_are_not_believed() {
        let asked = question("a.example.");
        let query = asked.queries[0].clone();
        let mut answer = reply(&asked, ResponseCode::NoError);
        answer.add_answer(Record::from_rdata(
            name("a.example."),
            60,
            RData::CNAME(CNAME(name("b.example."))),
        ));
        answer.add_answer(Record::from_rdata(
            name("b.example."),
            30,
            RData::A(A(Ipv4Addr::new(203, 0, 113, 1))),
        ));
        answer.add_answer(Record::from_rdata(
            name("c.example."),
            9,
            RData::A(A(Ipv4Addr::new(203, 0, 113, 2))),
        ));
        assert_eq!(follow(&query, &answer), (vec![Ipv4Addr::new(203, 0, 113, 1)], 30));
        let mut circle = reply(&asked, ResponseCode::NoError);
        circle.add_answer(Record::from_rdata(
            name("a.example."),
            60,
            RData::CNAME(CNAME(name("a.example."))),
        ));
        assert!(follow(&query, &circle).0.is_empty());
    }

    #[test]
    fn what_does_not_fit_is_said_to_be_cut() {
        let asked = question("big.example.");
        let mut answer = reply(&asked, ResponseCode::NoError);
        for n in 0..100 {
            answer.add_answer(Record::from_rdata(
                name("big.example."),
                60,
                RData::A(A(Ipv4Addr::new(203, 0, 113, n))),
            ));
        }
        let wire = datagram(&asked, &answer).unwrap();
        assert!(wire.len() <= 512);
        assert!(Message::from_vec(&wire).unwrap().metadata.truncation);
    }

    proptest! {
        #[test]
        fn whatever_a_guest_sends(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(asked) = parse_question(&bytes) {
                let answer = reply(&asked.message, ResponseCode::Refused);
                let _ = datagram(&asked.message, &answer);
            }
        }
    }
}
