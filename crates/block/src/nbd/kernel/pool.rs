//! The pool: which devices are free, attached or unusable.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::attached::{AttachedDevice, Parts, until};
use super::error::{AttachError, PoolError};
use super::netlink::{Driver, Setup};
use super::owner::Owner;
use super::servers::Servers;
use super::{AttachOptions, PoolConfig, PoolStatus, Quarantined, survey, sysfs};
use crate::nbd::Export;
use crate::{BLOCK_SIZE, BlockDevice};

/// The most connections of a device.
const MAX_CONNECTIONS: usize = 16;
/// How long a device may be busy with someone who only looks at it (udev, blkid).
const GLANCE_LIMIT: Duration = Duration::from_secs(1);

/// A pool of the kernel's NBD devices. Clones are the same pool.
#[derive(Clone)]
pub struct DevicePool {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) driver: Driver,
    pub(super) config: PoolConfig,
    pub(super) tasks: TaskTracker,
    pub(super) runtime: Handle,
    owner: Owner,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    /// The one that has been free for longest comes first.
    free: VecDeque<u32>,
    attached: usize,
    quarantined: BTreeMap<u32, String>,
    closed: bool,
}

impl DevicePool {
    /// Finds out which devices there are, takes back those that a dead process of this installation
    /// left attached, and puts those in quarantine that someone else uses.
    ///
    /// # Errors
    /// When the kernel has no NBD driver, or the process may not use it.
    pub async fn open(config: PoolConfig) -> Result<Self, PoolError> {
        let surveying = config.clone();
        let survey = spawn_blocking(move || survey::survey(&surveying)).await;
        let survey = survey.map_err(|e| PoolError::Driver(io::Error::other(e)))??;
        if !survey.quarantined.is_empty() {
            warn!(devices = ?survey.quarantined, "NBD devices that will not be used");
        }
        info!(free = survey.free.len(), reclaimed = survey.reclaimed, "NBD devices");
        let places =
            Places { free: survey.free.into(), quarantined: survey.quarantined, ..Places::default() };
        let inner = Inner {
            driver: survey.driver,
            owner: Owner::this(&config.instance),
            config,
            tasks: TaskTracker::new(),
            runtime: Handle::current(),
            places: Mutex::new(places),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes back the devices that dead processes of the installation left attached, and says how many: a
    /// VMM of theirs waits for its requests until then, whatever signal it was sent.
    ///
    /// # Errors
    /// When the kernel has no NBD driver, or the process may not use it.
    pub async fn reclaim(config: PoolConfig) -> Result<usize, PoolError> {
        let survey = spawn_blocking(move || survey::survey(&config)).await;
        Ok(survey.map_err(|e| PoolError::Driver(io::Error::other(e)))??.reclaimed)
    }

    /// Attaches `device` to a free device of the kernel. A device found to be in use by someone else
    /// is put in quarantine, and the next one taken.
    ///
    /// # Errors
    /// When no device is free, or the kernel refuses.
    pub async fn acquire(
        &self,
        device: Arc<dyn BlockDevice>,
        options: AttachOptions,
    ) -> Result<AttachedDevice, AttachError> {
        let (size, block) = (device.size(), BLOCK_SIZE);
        if size == 0 || !size.is_multiple_of(block) {
            return Err(AttachError::Unaligned { size, block });
        }
        if !(1..=MAX_CONNECTIONS).contains(&options.connections) {
            return Err(AttachError::Connections(options.connections));
        }
        // A task of its own: a connected device must not be forgotten when the caller goes away.
        let attaching = self.inner.clone().attach(device, options);
        let task = self.inner.tasks.spawn_on(attaching, &self.inner.runtime);
        task.await.unwrap_or(Err(AttachError::Shutdown))
    }

    /// How many devices are free and attached, and which are in quarantine and why.
    pub fn status(&self) -> PoolStatus {
        let places = self.inner.places.lock();
        let quarantined = places.quarantined.iter();
        PoolStatus {
            free: places.free.len(),
            attached: places.attached,
            quarantined: quarantined
                .map(|(index, reason)| Quarantined { node: sysfs::node(*index), reason: reason.clone() })
                .collect(),
        }
    }

    /// Hands no device out any more, and waits until those that are being detached are free. Devices
    /// that somebody still has stay attached until they are dropped.
    pub async fn shutdown(&self) {
        self.inner.places.lock().closed = true;
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

/// A device that is neither free nor in quarantine. When dropped, it goes into quarantine.
pub(super) struct Place {
    pool: Arc<Inner>,
    index: u32,
    settled: bool,
}

impl Place {
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// The device is known to be free.
    pub(super) fn give_back(mut self) {
        self.settled = true;
        let mut places = self.pool.places.lock();
        places.attached -= 1;
        places.free.push_back(self.index);
    }

    /// The device is in a state that is not known, or not ours.
    pub(super) fn quarantine(mut self, reason: &str) {
        self.settle(reason);
    }

    fn settle(&mut self, reason: &str) {
        self.settled = true;
        warn!(device = self.index, reason, "an NBD device was put in quarantine");
        let mut places = self.pool.places.lock();
        places.attached -= 1;
        places.quarantined.insert(self.index, reason.to_owned());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.settled {
            self.settle("it was being attached or detached when the runtime was shut down");
        }
    }
}

impl Inner {
    fn take(self: &Arc<Self>) -> Result<Place, AttachError> {
        let mut places = self.places.lock();
        if places.closed {
            return Err(AttachError::Shutdown);
        }
        let Some(index) = places.free.pop_front() else {
            let (attached, quarantined) = (places.attached, places.quarantined.len());
            return Err(AttachError::Exhausted { attached, quarantined });
        };
        places.attached += 1;
        Ok(Place { pool: self.clone(), index, settled: false })
    }

    async fn attach(
        self: Arc<Self>,
        device: Arc<dyn BlockDevice>,
        options: AttachOptions,
    ) -> Result<AttachedDevice, AttachError> {
        let size = device.size();
        let export = Export::new("", device);
        let setup = Setup {
            size,
            block_size: BLOCK_SIZE,
            flags: export.transmission_flags(false),
            backend: self.owner.identifier(),
            request_timeout: options.request_timeout,
            dead_connection_timeout: options.dead_connection_timeout,
        };
        loop {
            let place = self.take()?;
            let index = place.index();
            if let Some(reason) = until(GLANCE_LIMIT, self.look(index)).await {
                place.quarantine(&reason);
                continue;
            }
            let node = sysfs::node(index);
            let started = Servers::start(
                self.driver,
                index,
                setup.backend.clone(),
                export.clone(),
                options.connections,
            );
            let (servers, sockets) = match started {
                Ok(started) => started,
                Err(source) => {
                    place.give_back();
                    return Err(AttachError::Socket { node, source });
                }
            };
            let (driver, setup) = (self.driver, setup.clone());
            let connecting = spawn_blocking(move || driver.connect(index, &setup, &sockets));
            let source = match connecting.await.unwrap_or_else(|e| Err(io::Error::other(e))) {
                Ok(()) => return Ok(AttachedDevice::new(Parts { pool: self, place, servers }, size)),
                Err(source) => source,
            };
            servers.detaching();
            // The kernel's refusal need not be the whole truth: a part may have been set up.
            let ours = sysfs::backend(index).as_deref() == Some(self.owner.identifier().as_str());
            let freed = if ours { self.free(index).await } else { Ok(()) };
            servers.end().await;
            match freed {
                Err(reason) => place.quarantine(&reason),
                Ok(()) if source.kind() == io::ErrorKind::ResourceBusy => {
                    // Someone was faster. What it is, the next look tells.
                    match until(GLANCE_LIMIT, self.look(index)).await {
                        Some(reason) => place.quarantine(&reason),
                        None => place.give_back(),
                    }
                    continue;
                }
                Ok(()) => place.give_back(),
            }
            return Err(AttachError::Connect { node, source });
        }
    }

    /// Says why a device that should be free is not.
    fn look(&self, index: u32) -> impl Fn() -> Option<String> + Clone + Send + 'static {
        let driver = self.driver;
        move || survey::why_not_free(driver, index)
    }

    /// Takes a device's connections away and waits until it is free, or says why it is not.
    pub(super) async fn free(&self, index: u32) -> Result<(), String> {
        let (driver, backend) = (self.driver, self.owner.identifier());
        match spawn_blocking(move || driver.disconnect(index, &backend)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(format!("it cannot be disconnected: {error}")),
            Err(error) => return Err(format!("it was not disconnected: {error}")),
        }
        until(self.config.detach_limit, self.look(index)).await.map_or(Ok(()), Err)
    }
}
