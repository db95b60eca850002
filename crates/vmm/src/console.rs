//! The end of a text that somebody else writes without end.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes that are read of a guest's console.
pub(crate) const CONSOLE_MOST: u64 = 16 << 20;

/// The last bytes of what was written; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Tail {
    text: Arc<Mutex<Vec<u8>>>,
    limit: usize,
}

impl Tail {
    /// Keeps the last `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { text: Arc::default(), limit }
    }

    pub fn push(&self, bytes: &[u8]) {
        if let Ok(mut text) = self.text.lock() {
            text.extend_from_slice(&bytes[bytes.len().saturating_sub(self.limit)..]);
            let over = text.len().saturating_sub(self.limit);
            text.drain(..over);
        }
    }

    /// What is kept; what is no UTF-8 is replaced.
    pub fn text(&self) -> String {
        self.text.lock().map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default()
    }

    /// Reads until the other side closes, or has written `most` bytes: then this side closes. A boot
    /// writes a bounded text; what goes on without end is a guest that wants to keep its host busy.
    pub async fn keep(self, from: impl AsyncRead + Unpin, most: u64) {
        let (mut from, mut buf) = (from.take(most), [0u8; 4096]);
        while let Ok(n @ 1..) = from.read(&mut buf).await {
            self.push(&buf[..n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_end_is_kept() {
        let tail = Tail::new(4);
        tail.clone().keep(&b"abcdefg"[..], 100).await;
        assert_eq!(tail.text(), "defg");
        tail.clone().keep(&b"abcdefg"[..], 5).await;
        assert_eq!(tail.text(), "bcde");
        tail.push(b"h");
        assert_eq!(tail.text(), "cdeh");
        tail.push(&[b'x'; 100]);
        assert_eq!(tail.text(), "xxxx");
    }
}
