//! Doing as another user what the file system checks.

use std::marker::PhantomData;

use rustix::fs::Gid;
use rustix::thread::set_thread_groups;

use crate::status::{Result, Status};

/// Nobody: who says nothing of themselves.
const NOBODY: u32 = 65534;
/// Groups of a caller (RFC 5531, appendix A).
pub(crate) const MAX_GROUPS: usize = 16;

/// Who a call says it comes from. The guest's own root can say anything: a volume is the guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

impl Default for Credentials {
    fn default() -> Self {
        Self { uid: NOBODY, gid: NOBODY, groups: Vec::new() }
    }
}

/// This thread's accesses to files are another's until it is dropped (setfsuid(2)). Other threads are not changed.
pub(crate) struct Acting {
    pub uid: u32,
    gid: u32,
    /// It is the thread's.
    stays: PhantomData<*const ()>,
}

/// All ones is "no change" to the kernel, by which root would stay root.
fn real(id: u32) -> u32 {
    if id == u32::MAX { NOBODY } else { id }
}

impl Acting {
    /// # Errors
    /// When the kernel does not change the thread's user: then nothing is done for it.
    pub fn of(who: &Credentials) -> Result<Self> {
        let groups: Vec<Gid> = who.groups.iter().map(|g| Gid::from_raw(real(*g))).collect();
        let acting = Self { uid: real(who.uid), gid: real(who.gid), stays: PhantomData };
        set_thread_groups(&groups).map_err(|_| Status::Acces)?;
        acting.begin()?;
        Ok(acting)
    }

    fn begin(&self) -> Result<()> {
        set_fs_ids(self.uid, self.gid);
        if fs_ids() == (self.uid, self.gid) { Ok(()) } else { Err(Status::Acces) }
    }

    /// Does something as root meanwhile.
    ///
    /// # Errors
    /// What it fails with; when the thread does not become the other again.
    pub fn as_root<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        set_fs_ids(0, 0);
        let done = work();
        self.begin()?;
        done
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        set_fs_ids(0, 0);
        // No group is as good as any to root. A thread that stayed another user would serve the next caller as that one.
        let _ = set_thread_groups(&[]);
    }
}

fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: both calls take numbers and touch no memory. The group comes first: it needs a right that the user's change may take.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
    }
}

fn fs_ids() -> (u32, u32) {
    // SAFETY: an id that is none changes nothing, and the one in force is returned (setfsuid(2)).
    unsafe { (libc::setfsuid(u32::MAX).cast_unsigned(), libc::setfsgid(u32::MAX).cast_unsigned()) }
}
