//! The devices as they are when a pool is opened, and reclaiming what a dead process left.

use std::collections::BTreeMap;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use tracing::info;

use super::attached::has_node;
use super::error::PoolError;
use super::netlink::Driver;
use super::owner::Owner;
use super::{PoolConfig, sysfs};

/// Between two looks at a device that is being freed.
const LOOK: Duration = Duration::from_millis(5);

/// What was found.
pub(super) struct Survey {
    pub(super) driver: Driver,
    pub(super) free: Vec<u32>,
    pub(super) quarantined: BTreeMap<u32, String>,
    pub(super) reclaimed: usize,
}

/// Looks at every device of the host. Blocks.
pub(super) fn survey(config: &PoolConfig) -> Result<Survey, PoolError> {
    let (driver, devices) = find()?;
    let mut survey = Survey { driver, free: Vec::new(), quarantined: BTreeMap::new(), reclaimed: 0 };
    for index in devices {
        let reclaimed = match abandoned(index, &config.instance) {
            Some(owner) => reclaim(driver, index, &owner, config.detach_limit).map_err(PoolError::Driver)?,
            None => false,
        };
        survey.reclaimed += usize::from(reclaimed);
        match why_not_free(driver, index) {
            Some(reason) => {
                survey.quarantined.insert(index, reason);
            }
            None if survey.free.len() < config.limit => survey.free.push(index),
            None => {}
        }
    }
    Ok(survey)
}

/// The driver and its devices, if this process may use them. Blocks.
pub(super) fn find() -> Result<(Driver, Vec<u32>), PoolError> {
    let reason = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => PoolError::NoModule,
        io::ErrorKind::PermissionDenied => PoolError::NotAllowed,
        _ => PoolError::Driver(e),
    };
    let driver = Driver::find().map_err(reason)?;
    let devices = sysfs::devices();
    let first = devices.first().ok_or(PoolError::NoModule)?;
    // Everybody may ask for the driver, but only root may ask the driver.
    driver.in_use(*first).map_err(reason)?;
    Ok((driver, devices))
}

/// The dead process of this installation that left the device attached, if one did.
fn abandoned(index: u32, instance: &str) -> Option<Owner> {
    let owner = Owner::parse(&sysfs::backend(index)?)?;
    (owner.is_of(instance) && !owner.is_alive()).then_some(owner)
}

/// Disconnects a device; says whether it is free then.
fn reclaim(driver: Driver, index: u32, owner: &Owner, limit: Duration) -> io::Result<bool> {
    info!(device = index, pid = owner.pid(), "reclaiming an NBD device that a dead process left");
    driver.disconnect(index, &owner.identifier())?;
    let end = Instant::now() + limit;
    while why_not_free(driver, index).is_some() {
        if Instant::now() > end {
            return Ok(false);
        }
        thread::sleep(LOOK);
    }
    Ok(true)
}

/// One sentence about why a device cannot be handed out; `None` if it can.
pub(super) fn why_not_free(driver: Driver, index: u32) -> Option<String> {
    if let Some(pid) = sysfs::pid(index) {
        let owner = sysfs::backend(index).as_deref().and_then(Owner::parse);
        return Some(match owner {
            Some(owner) if owner.is_alive() => format!("it was attached by process {}", owner.pid()),
            Some(owner) => format!("it was attached by process {}, which has ended", owner.pid()),
            None => format!("it was attached by process {pid}"),
        });
    }
    match driver.in_use(index) {
        Ok(false) if sysfs::size(index) != 0 => Some("it has a size but no connections".into()),
        Ok(false) if !has_node(index) => Some("it has no node in /dev".into()),
        Ok(false) => None,
        Ok(true) => Some("someone has it open".into()),
        Err(error) => Some(format!("the kernel does not tell its state: {error}")),
    }
}
