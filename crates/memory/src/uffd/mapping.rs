//! A read-only mapping of a file whose bytes only the kernel touches.

use std::{ffi::c_void, io, marker::PhantomData, os::fd::AsFd, ptr::NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// A file, mapped to be read.
///
/// If the file becomes shorter, touching what lies beyond its end raises SIGBUS. So this code never
/// touches it: it only gives addresses to the kernel, which then answers EFAULT. The one gap is a
/// file cut within a page: the rest of that page reads as zeros. Therefore a mapped file must be
/// one that nobody changes, as published artifacts are.
#[derive(Debug)]
pub struct FileMapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the value alone until it is dropped, and is not written to.
unsafe impl Send for FileMapping {}
// SAFETY: as above; shared use only reads addresses.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps the first `len` bytes of a file; `len` is not zero.
    pub fn new(file: impl AsFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let start = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self { start, len })
    }

    /// Zeros that the kernel can copy from.
    pub(super) fn zeros(len: usize) -> io::Result<Self> {
        // SAFETY: as in `new`.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE)
        }?;
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        let mapping = Self { start, len };
        // SAFETY: the range is the mapping's own; the advice changes no content.
        let _ = unsafe { madvise(start.as_ptr(), len, Advice::LinuxHugepage) };
        Ok(mapping)
    }

    /// The bytes at an offset; `None` if they are not all within the mapping.
    pub fn bytes(&self, at: u64, len: usize) -> Option<MappedBytes<'_>> {
        let at = usize::try_from(at).ok()?;
        at.checked_add(len).filter(|end| *end <= self.len)?;
        let start = self.start.as_ptr().cast::<u8>().wrapping_add(at).cast_const();
        Some(MappedBytes { start, len, mapping: PhantomData })
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is the value's own and nothing borrows from it any more.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}

/// Bytes within a [`FileMapping`], for the kernel to copy.
#[derive(Debug, Clone, Copy)]
pub struct MappedBytes<'a> {
    start: *const u8,
    len: usize,
    mapping: PhantomData<&'a FileMapping>,
}

impl MappedBytes<'_> {
    pub(super) fn start(&self) -> *const u8 {
        self.start
    }

    /// How many bytes there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }
}
