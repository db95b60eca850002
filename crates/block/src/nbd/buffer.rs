//! Reply buffers that are used again, so that a read neither allocates nor clears memory.

use std::sync::Arc;

use parking_lot::Mutex;

/// What a busy connection keeps for its next reads.
const KEEP_BUSY: usize = 4 << 20;
/// What an idle one keeps: there may be hundreds.
const KEEP_IDLE: usize = 128 << 10;

/// The free buffers of one connection.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    free: Mutex<Vec<Vec<u8>>>,
}

impl BufferPool {
    /// A buffer of `len` bytes with unspecified contents.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let bytes = {
            let mut free = self.free.lock();
            let fit = free.iter().rposition(|b| b.len() >= len);
            fit.map(|i| free.swap_remove(i))
        };
        // A page at least, so that the buffers of small reads serve one another.
        let bytes = bytes.unwrap_or_else(|| vec![0; len.next_multiple_of(4096)]);
        Buffer { bytes, len, pool: self.clone() }
    }

    /// Whether more memory is kept than an idle connection should.
    pub(super) fn is_large(&self) -> bool {
        self.free.lock().iter().map(Vec::len).sum::<usize>() > KEEP_IDLE
    }

    /// Gives most of the kept memory back.
    pub(super) fn shrink(&self) {
        self.keep(KEEP_IDLE);
    }

    fn keep(&self, limit: usize) {
        let mut free = self.free.lock();
        let mut total = 0;
        free.retain(|b| {
            let kept = total + b.len() <= limit;
            total += if kept { b.len() } else { 0 };
            kept
        });
    }
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Arc<BufferPool>,
}

impl std::ops::Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut free = self.pool.free.lock();
        let kept: usize = free.iter().map(Vec::len).sum();
        if kept + bytes.len() <= KEEP_BUSY {
            free.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_the_pool_stays_small() {
        let pool = Arc::new(BufferPool::default());
        let first = pool.take(5000);
        assert_eq!(first.len(), 5000);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.take(100).as_ptr(), address);
        assert_eq!(pool.free.lock().len(), 1);
        drop((0..6).map(|_| pool.take(1 << 20)).collect::<Vec<_>>());
        let kept = || pool.free.lock().iter().map(Vec::len).sum::<usize>();
        assert!(kept() <= KEEP_BUSY);
        pool.shrink();
        assert!(kept() <= KEEP_IDLE);
    }
}
