//! External data representation (RFC 4506): what is read is bounded by what is there.

/// The bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Garbage;

pub(crate) type Result<T> = std::result::Result<T, Garbage>;

/// Reads from a request; borrows what it hands out.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(n).ok_or(Garbage)?;
        self.0 = rest;
        Ok(front)
    }

    pub fn u32(&mut self) -> Result<u32> {
        let bytes = self.take(4)?.try_into().map_err(|_| Garbage)?;
        Ok(u32::from_be_bytes(bytes))
    }

    pub fn u64(&mut self) -> Result<u64> {
        let bytes = self.take(8)?.try_into().map_err(|_| Garbage)?;
        Ok(u64::from_be_bytes(bytes))
    }

    pub fn bool(&mut self) -> Result<bool> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Garbage),
        }
    }

    pub fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.take(N.next_multiple_of(4))?;
        bytes.first_chunk().copied().ok_or(Garbage)
    }

    /// Bytes of a stated length, at most `max`.
    pub fn opaque(&mut self, max: usize) -> Result<&'a [u8]> {
        let n = self.u32()? as usize;
        if n > max {
            return Err(Garbage);
        }
        let padded = self.take(n.next_multiple_of(4))?;
        padded.get(..n).ok_or(Garbage)
    }

    /// What comes if the flag in front of it says so.
    pub fn optional<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        if self.bool()? { read(self).map(Some) } else { Ok(None) }
    }
}

/// Writes an answer.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.u32(value.into())
    }

    /// As many bytes as both sides know, a multiple of four.
    pub fn fixed(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Its length is bounded by who makes it, far below what 32 bits can say.
    pub fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub fn append(&mut self, other: &Writer) -> &mut Self {
        self.fixed(&other.0)
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_are_checked_before_they_are_believed() {
        assert_eq!(Reader::new(&u32::MAX.to_be_bytes()).opaque(usize::MAX), Err(Garbage));
        assert_eq!(Reader::new(&[0, 0, 0, 3, 1, 2, 3]).opaque(8), Err(Garbage), "without its padding");
        assert_eq!(Reader::new(&[0, 0, 0, 3, 1, 2, 3, 0]).opaque(2), Err(Garbage));
        assert_eq!(Reader::new(&[0, 0, 0, 3, 1, 2, 3, 0]).opaque(3), Ok(&[1, 2, 3][..]));
        assert_eq!(Reader::new(&[0, 0, 0, 2]).bool(), Err(Garbage));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(a: u32, b: u64, c: bool, d in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut w = Writer::default();
            w.u32(a).opaque(&d).u64(b).bool(c).fixed(&[7; 8]);
            prop_assert_eq!(w.len() % 4, 0);
            let bytes = w.into_bytes();
            let mut r = Reader::new(&bytes);
            prop_assert_eq!(r.u32(), Ok(a));
            prop_assert_eq!(r.opaque(40), Ok(&d[..]));
            prop_assert_eq!(r.u64(), Ok(b));
            prop_assert_eq!(r.bool(), Ok(c));
            prop_assert_eq!(r.fixed::<8>(), Ok([7; 8]));
            prop_assert_eq!(r.u32(), Err(Garbage));
        }
    }
}
