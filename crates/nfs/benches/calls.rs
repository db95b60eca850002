//! `cargo bench -p nidus-nfs --bench calls`: what a guest's call costs over a TCP connection, one and sixteen at a time, beside
//! the same done to the same directory without a server, in the same run. One client thread, so that depth is all that differs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nidus_nfs::{Export, HandleKey, Limits, Server, serve};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const NFS: u32 = 100_003;
const MOUNT: u32 = 100_005;
const TRANSFER: usize = 128 << 10;
const FILE: usize = 64 << 20;
const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_millis(400);

fn opaque(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_be_bytes());
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn words(out: &mut Vec<u8>, words: &[u32]) {
    words.iter().for_each(|w| out.extend(w.to_be_bytes()));
}

struct Client {
    stream: TcpStream,
    xid: u32,
}

impl Client {
    fn send(&mut self, program: u32, procedure: u32, arguments: &[u8]) -> io::Result<()> {
        self.xid += 1;
        let mut call = Vec::with_capacity(arguments.len() + 64);
        words(&mut call, &[self.xid, 0, 2, program, 3, procedure, 1, 20, 0, 0, 0, 0, 0, 0, 0]);
        call.extend(arguments);
        let mut record = (call.len() as u32 | 1 << 31).to_be_bytes().to_vec();
        record.extend(call);
        self.stream.write_all(&record)
    }

    /// The results of the next answer.
    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut header = [0; 4];
        self.stream.read_exact(&mut header)?;
        let mut answer = vec![0; (u32::from_be_bytes(header) & 0x7fff_ffff) as usize];
        self.stream.read_exact(&mut answer)?;
        Ok(answer.split_off(24))
    }

    fn call(&mut self, program: u32, procedure: u32, arguments: &[u8]) -> io::Result<Vec<u8>> {
        self.send(program, procedure, arguments)?;
        self.receive()
    }

    /// A handle at the front of what a call has got.
    fn handle(&mut self, program: u32, procedure: u32, arguments: &[u8]) -> io::Result<Vec<u8>> {
        let results = self.call(program, procedure, arguments)?;
        let length = u32::from_be_bytes([results[4], results[5], results[6], results[7]]) as usize;
        Ok(results[8..8 + length].to_vec())
    }
}

/// Calls a second, with so many on their way.
fn rate(client: &mut Client, depth: usize, mut next: impl FnMut(u32) -> (u32, Vec<u8>)) -> io::Result<f64> {
    let (mut sent, mut done) = (0u32, 0u32);
    let begin = Instant::now();
    while begin.elapsed() < TIME {
        while (sent - done) < depth as u32 {
            let (procedure, arguments) = next(sent);
            client.send(NFS, procedure, &arguments)?;
            sent += 1;
        }
        let answer = client.receive()?;
        assert_eq!(answer[..4], [0; 4], "a call failed");
        done += 1;
    }
    let rate = f64::from(done) / begin.elapsed().as_secs_f64();
    while done < sent {
        client.receive()?;
        done += 1;
    }
    Ok(rate)
}

fn plain_rate(mut work: impl FnMut(u32) -> io::Result<()>) -> io::Result<f64> {
    let (begin, mut done) = (Instant::now(), 0);
    while begin.elapsed() < TIME {
        work(done)?;
        done += 1;
    }
    Ok(f64::from(done) / begin.elapsed().as_secs_f64())
}

fn offset(n: u32) -> u64 {
    (n as usize * TRANSFER % FILE) as u64
}

fn measure(
    client: &mut Client,
    dir: &Path,
    rows: &mut BTreeMap<&'static str, Vec<[f64; 3]>>,
) -> io::Result<()> {
    let mut export = Vec::new();
    opaque(&mut export, format!("/{}", Uuid::nil()).as_bytes());
    let root = client.handle(MOUNT, 1, &export)?;
    let mut place = Vec::new();
    opaque(&mut place, &root);
    opaque(&mut place, b"file");
    let file = client.handle(NFS, 3, &place)?;
    let mut about = Vec::new();
    opaque(&mut about, &file);
    let read = |n: u32| {
        let mut a = about.clone();
        a.extend(offset(n).to_be_bytes());
        words(&mut a, &[TRANSFER as u32]);
        (6, a)
    };
    let data = vec![7; TRANSFER];
    let write = |n: u32| {
        let mut a = about.clone();
        a.extend(offset(n).to_be_bytes());
        words(&mut a, &[TRANSFER as u32, 0]);
        opaque(&mut a, &data);
        (7, a)
    };
    let (path, mut buffer) = (dir.join("file"), vec![0; TRANSFER]);
    let plain = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut add =
        |name, one: f64, many: f64, plain: f64| rows.entry(name).or_default().push([one, many, plain]);
    let attributes = |_| (1, about.clone());
    add(
        "attributes",
        rate(client, 1, attributes)?,
        rate(client, 16, attributes)?,
        plain_rate(|_| fs::symlink_metadata(&path).map(drop))?,
    );
    let lookup = |_| (3, place.clone());
    add(
        "a name looked up",
        rate(client, 1, lookup)?,
        rate(client, 16, lookup)?,
        plain_rate(|_| fs::symlink_metadata(&path).map(drop))?,
    );
    add(
        "128 KiB read",
        rate(client, 1, read)?,
        rate(client, 16, read)?,
        plain_rate(|n| plain.read_exact_at(&mut buffer, offset(n)))?,
    );
    add(
        "128 KiB written",
        rate(client, 1, write)?,
        rate(client, 16, write)?,
        plain_rate(|n| plain.write_all_at(&data, offset(n)))?,
    );
    Ok(())
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Run by `cargo test` as well, which only wants to know whether it works.
    let rounds = if std::env::args().any(|a| a == "--bench") { ROUNDS } else { 1 };
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("file"), vec![1; FILE])?;
    let fd: OwnedFd = File::open(dir.path())?.into();
    let export = Export::new(Uuid::nil(), &fd, &HandleKey::new(&[1; 32]), Limits::default())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let (address, stop) = (listener.local_addr()?, CancellationToken::new());
    let server = runtime.spawn(serve(listener, Server::new(vec![export]), stop.clone()));
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut client = Client { stream, xid: 0 };
    let mut rows = BTreeMap::new();
    for _ in 0..rounds {
        measure(&mut client, dir.path(), &mut rows)?;
    }
    println!(
        "| calls a second, median of {rounds} | one at a time | 16 at a time | without a server | 16 / without |"
    );
    println!("|---|---:|---:|---:|---:|");
    for (name, rounds) in rows {
        let [one, many, plain] = [0, 1, 2].map(|n| median(rounds.iter().map(|r| r[n]).collect()));
        println!("| {name} | {one:.0} | {many:.0} | {plain:.0} | {:.2} |", many / plain);
    }
    stop.cancel();
    runtime.block_on(server)?;
    Ok(())
}
