//! In which order the frames of an artifact were first used: what a later start reads ahead.

use bytes::{Buf, BufMut};
use parking_lot::Mutex;

const MAGIC: &[u8; 8] = b"NIDUSORD";
const SUM: usize = 32;
/// The most frames of a recording.
const MAX_FRAMES: usize = 1 << 20;

/// Why bytes are not a recorded order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// They do not begin like one, or have no length that one can have.
    #[error("it is not a recorded order")]
    Format,
    /// Something changed it.
    #[error("its checksum is wrong")]
    Checksum,
}

/// Numbers of frames in the order of their first use.
///
/// A hint: a reader skips numbers that its artifact does not have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AccessOrder(Vec<u32>);

impl AccessOrder {
    /// The most bytes of a stored order.
    pub const MAX_BYTES: usize = MAGIC.len() + 4 * MAX_FRAMES + SUM;

    /// An order of the first frames of these, as many as one may have.
    pub fn new(frames: impl IntoIterator<Item = u32>) -> Self {
        Self(frames.into_iter().take(MAX_FRAMES).collect())
    }

    /// The numbers of the frames.
    pub fn frames(&self) -> &[u32] {
        &self.0
    }

    /// The order as it is stored: a magic, the numbers (little-endian), the BLAKE3 hash of both.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        self.0.iter().for_each(|n| out.put_u32_le(*n));
        let sum = blake3::hash(&out);
        out.put_slice(sum.as_bytes());
        out
    }

    /// Reads what [`AccessOrder::to_bytes`] wrote.
    pub fn parse(bytes: &[u8]) -> Result<Self, OrderError> {
        if !bytes.starts_with(MAGIC) || bytes.len() < MAGIC.len() + SUM || bytes.len() > Self::MAX_BYTES {
            return Err(OrderError::Format);
        }
        let (body, sum) = bytes.split_at(bytes.len() - SUM);
        if blake3::hash(body).as_bytes() != sum {
            return Err(OrderError::Checksum);
        }
        let mut numbers = &body[MAGIC.len()..];
        if !numbers.len().is_multiple_of(4) {
            return Err(OrderError::Format);
        }
        Ok(Self(std::iter::from_fn(|| numbers.try_get_u32_le().ok()).collect()))
    }
}

/// Notes the first use of each frame.
#[derive(Debug)]
pub(crate) struct Recorder(Mutex<Noted>);

#[derive(Debug)]
struct Noted {
    seen: Vec<u64>,
    order: Vec<u32>,
}

impl Recorder {
    /// One for an artifact of this many frames.
    pub fn new(frames: u64) -> Self {
        Self(Mutex::new(Noted { seen: vec![0; frames.div_ceil(64) as usize], order: Vec::new() }))
    }

    pub fn note(&self, frame: u32) {
        let mut noted = self.0.lock();
        let (word, bit) = (frame as usize / 64, 1 << (frame % 64));
        if noted.seen.get(word).is_some_and(|w| w & bit == 0) {
            noted.seen[word] |= bit;
            noted.order.push(frame);
        }
    }

    pub fn order(&self) -> AccessOrder {
        AccessOrder::new(self.0.lock().order.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_order_is_read_as_it_was_written(frames in prop::collection::vec(any::<u32>(), 0..100)) {
            let order = AccessOrder::new(frames);
            prop_assert_eq!(AccessOrder::parse(&order.to_bytes()), Ok(order));
        }

        #[test]
        fn a_flipped_bit_is_seen(frames in prop::collection::vec(any::<u32>(), 0..20), bit in any::<usize>()) {
            let mut bytes = AccessOrder::new(frames).to_bytes();
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(AccessOrder::parse(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_an_order_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = AccessOrder::parse(&bytes);
            let mut framed = MAGIC.to_vec();
            framed.extend_from_slice(&bytes);
            let sum = blake3::hash(&framed);
            framed.extend_from_slice(sum.as_bytes());
            prop_assert_eq!(AccessOrder::parse(&framed).is_ok(), bytes.len() % 4 == 0);
        }
    }

    #[test]
    fn only_the_first_use_counts() {
        let recorder = Recorder::new(70);
        for frame in [69, 3, 69, 64, 3, 0, 1000] {
            recorder.note(frame);
        }
        assert_eq!(recorder.order().frames(), [69, 3, 64, 0]);
    }
}
