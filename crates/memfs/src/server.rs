//! The threads that answer the kernel.

use std::{
    collections::HashMap,
    io::IoSlice,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
};

use parking_lot::RwLock;
use rustix::io::{Errno, read, write, writev};
use tracing::{debug, error, warn};

use crate::{
    MemFsError,
    file::Node,
    wire::{self, MAX_READ, Operation, REQUEST_MAX, ROOT, Request},
};

/// The server's side of the mount. Numbers of nodes, which are the names of their files too, are never
/// used twice.
#[derive(Debug)]
pub struct Server {
    device: Arc<OwnedFd>,
    nodes: RwLock<HashMap<u64, Arc<Node>>>,
    next: AtomicU64,
    gone: Sender<u64>,
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<(), MemFsError> {
    let started = thread::Builder::new().name(name).spawn(work);
    started.map(drop).map_err(|source| MemFsError::Mount { action: "start a thread of", source })
}

/// Lets the kernel free what it has of a node. It waits for reads of it that are under way, and so must
/// not be done by a thread that serves them, nor by one that others wait for.
fn forget_node(device: &OwnedFd, number: u64) {
    match write(device, &wire::forget_entry(&number.to_string())) {
        // It may have been forgotten already, or all is gone.
        Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
        Err(e) => warn!("the kernel does not forget a memory file that is gone: {e}"),
    }
}

impl Server {
    /// Its threads run until the mount is gone.
    pub fn start(device: OwnedFd, threads: usize) -> Result<Arc<Self>, MemFsError> {
        let (device, (gone, forgotten)) = (Arc::new(device), channel());
        let forget = device.clone();
        spawn("memfs-forget".to_owned(), move || {
            forgotten.iter().for_each(|node| forget_node(&forget, node))
        })?;
        let (nodes, next) = (RwLock::default(), AtomicU64::new(ROOT + 1));
        let server = Arc::new(Self { device, nodes, next, gone });
        for n in 0..threads.max(1) {
            let server = server.clone();
            spawn(format!("memfs-{n}"), move || server.run())?;
        }
        Ok(server)
    }

    pub fn add(&self, node: Arc<Node>) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.nodes.write().insert(number, node);
        number
    }

    /// Removes a node; the kernel frees what it has of it soon after.
    pub fn remove(&self, number: u64) {
        self.nodes.write().remove(&number);
        // The thread at the other end lives as long as this server.
        let _ = self.gone.send(number);
    }

    fn run(&self) {
        let (mut request, mut data) = (vec![0; REQUEST_MAX], vec![0; MAX_READ]);
        loop {
            match read(&*self.device, &mut *request) {
                Ok(len) => match Request::parse(&request[..len]) {
                    Some(request) => self.answer(&request, &mut data),
                    None => warn!("the kernel's request of {len} bytes about memory files is not understood"),
                },
                // The request was taken back meanwhile.
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::NODEV) => return debug!("the file system of memory files is unmounted"),
                Err(e) => return error!("cannot serve memory files any longer: {e}"),
            }
        }
    }

    fn answer(&self, request: &Request<'_>, data: &mut [u8]) {
        let node = || self.nodes.read().get(&request.node).cloned().ok_or(Errno::STALE);
        let result = match request.operation {
            Operation::Silent => return,
            Operation::Read { offset, len } => {
                let got = node().and_then(|node| node.read(offset, &mut data[..len.min(MAX_READ)]));
                return self.send(request.unique, got.map(|len| &data[..len]));
            }
            Operation::Init { major, flags, max_readahead } => {
                wire::init(major, max_readahead, flags).ok_or(Errno::PROTO)
            }
            Operation::Lookup { name } => self.look_up(name),
            Operation::GetAttributes if request.node == ROOT => Ok(wire::attributes_reply(ROOT, 0)),
            Operation::GetAttributes => node().map(|n| wire::attributes_reply(request.node, n.size())),
            // Also opening: the kernel then opens, and keeps its cache, without asking.
            Operation::Other => Err(Errno::NOSYS),
        };
        self.send(request.unique, result.as_deref().map_err(|e| *e));
    }

    fn look_up(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let number = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()).ok_or(Errno::NOENT)?;
        let node = self.nodes.read().get(&number).cloned().ok_or(Errno::NOENT)?;
        Ok(wire::entry_reply(number, node.size()))
    }

    fn send(&self, unique: u64, result: Result<&[u8], Errno>) {
        let header = wire::header(unique, result.map(<[u8]>::len));
        let body = result.unwrap_or_default();
        match writev(&*self.device, &[IoSlice::new(&header), IoSlice::new(body)]) {
            // Nobody waits for it any more.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(e) => error!("the kernel does not take an answer about memory files: {e}"),
        }
    }
}
