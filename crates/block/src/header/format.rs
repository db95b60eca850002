//! The header's bytes, little-endian: version, block size, size and generation (u64 each), build id
//! and base build id (16 bytes each). In version 3, mappings follow up to the end: offset and length
//! (u64 each), build id (16 bytes), offset in that build (u64). For the others see [`packed`].

use std::collections::BTreeMap;

use nidus_storage::BuildId;

use super::{Header, HeaderError, Mapping, Version, packed};

const FIXED_LEN: usize = 64;
pub(super) const MAPPING_LEN: usize = 40;

impl Header {
    /// Reads a header of any [`Version`]. Nothing about the bytes is trusted; what is accepted maps
    /// all of the device without gaps or overlaps. A header without mappings stands for
    /// [`Header::identity`], but in version 5 for zeros.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let cut = || HeaderError::Cut(bytes.len());
        let mut fields = Fields(bytes);
        let version = fields.number().ok_or_else(cut)?;
        let version = Version::from_wire(version).ok_or(HeaderError::Version(version))?;
        let header = (|| {
            Some(Self {
                block_size: fields.number()?,
                size: fields.number()?,
                generation: fields.number()?,
                build: fields.id()?,
                base: fields.id()?,
                mappings: Vec::new(),
                stored: BTreeMap::new(),
                pending: false,
            })
        })();
        let mut header = header.ok_or_else(cut)?;
        if version == Version::V3 {
            header.mappings.reserve_exact(fields.0.len() / MAPPING_LEN);
            while !fields.0.is_empty() {
                header.mappings.push(fields.mapping().ok_or_else(cut)?);
            }
        } else {
            packed::read(&mut header, version, fields.0)?;
        }
        if header.mappings.is_empty() {
            header.mappings = Self::identity(header.build, header.size, header.block_size)?.mappings;
        }
        header.checked()
    }

    /// The header's bytes in version 3, the one that every reader has. It has no place for
    /// [`Header::stored_builds`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_LEN + MAPPING_LEN * self.mappings.len());
        self.put_fixed(Version::V3, &mut out);
        self.mappings.iter().for_each(|m| m.put(&mut out));
        out
    }

    /// The header's bytes in a version of choice.
    ///
    /// Fails with [`HeaderError::Unwritable`] if it is too large for that version.
    pub fn encode(&self, version: Version) -> Result<Vec<u8>, HeaderError> {
        if version == Version::V3 {
            return Ok(self.to_bytes());
        }
        let mut out = Vec::new();
        self.put_fixed(version, &mut out);
        packed::write(self, version, &mut out)?;
        Ok(out)
    }

    fn put_fixed(&self, version: Version, out: &mut Vec<u8>) {
        for number in [version as u64, self.block_size, self.size, self.generation] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.build.as_bytes());
        out.extend(self.base.as_bytes());
    }
}

impl Mapping {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.offset.to_le_bytes());
        out.extend(self.len.to_le_bytes());
        out.extend(self.build.as_bytes());
        out.extend(self.build_offset.to_le_bytes());
    }
}

/// What is left to be read.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(super) fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn short(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn id(&mut self) -> Option<BuildId> {
        self.take().map(BuildId::from_bytes)
    }

    pub(super) fn mapping(&mut self) -> Option<Mapping> {
        Some(Mapping {
            offset: self.number()?,
            len: self.number()?,
            build: self.id()?,
            build_offset: self.number()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::header::GRANULE;

    const BUILD: BuildId = BuildId::from_bytes([0xb1; 16]);

    /// A header's bytes from plain numbers, so that wrong ones can be made.
    fn bytes(fixed: [u64; 4], mappings: &[(u64, u64, u8, u64)]) -> Vec<u8> {
        let mut out: Vec<u8> = fixed.iter().flat_map(|n| n.to_le_bytes()).collect();
        out.extend([0xb1; 32]);
        for (offset, len, id, build_offset) in mappings {
            out.extend(offset.to_le_bytes());
            out.extend(len.to_le_bytes());
            out.extend([*id; 16]);
            out.extend(build_offset.to_le_bytes());
        }
        out
    }

    #[test]
    fn the_layout_is_the_contracts() {
        let wire = bytes([3, 4096, 12288, 7], &[(0, 4096, 1, 8192), (4096, 8192, 0, 0)]);
        assert_eq!(wire.len(), 64 + 2 * 40);
        let header = Header::parse(&wire).unwrap();
        assert_eq!((header.block_size(), header.size(), header.generation()), (4096, 12288, 7));
        assert_eq!((header.build(), header.base()), (BUILD, BUILD));
        assert!(header.mappings()[1].build.is_nil());
        assert_eq!(header.to_bytes(), wire);
    }

    #[test]
    fn no_mappings_stand_for_the_identity() {
        let header = Header::parse(&bytes([3, 2 << 20, 5000, 1], &[])).unwrap();
        assert_eq!(header.mappings(), [Mapping { offset: 0, len: 8192, build: BUILD, build_offset: 0 }]);
        assert_eq!(header.generation(), 1);
    }

    #[test]
    fn wrong_headers_are_named() {
        let m = (0, 8192, 1, 0);
        let parse = |fixed, mappings: &[_]| Header::parse(&bytes(fixed, mappings)).unwrap_err();
        assert_eq!(parse([6, 4096, 8192, 0], &[m]), HeaderError::Version(6));
        assert_eq!(parse([3, 0, 8192, 0], &[m]), HeaderError::BlockSize(0));
        assert_eq!(parse([3, 512, 8192, 0], &[m]), HeaderError::BlockSize(512));
        assert_eq!(parse([3, 12288, 8192, 0], &[m]), HeaderError::BlockSize(12288));
        assert_eq!(parse([3, 4096, 0, 0], &[m]), HeaderError::Size(0));
        assert_eq!(parse([3, 4096, u64::MAX, 0], &[m]), HeaderError::Size(u64::MAX));
        assert_eq!(parse([3, 1 << 63, 8192, 0], &[m]), HeaderError::Size(8192));
        assert_eq!(parse([3, 4096, u64::MAX, 0], &[]), HeaderError::Size(u64::MAX));
        let bad = HeaderError::BadRange { index: 0 };
        assert_eq!(parse([3, 4096, 8192, 0], &[(0, 0, 1, 0)]), bad);
        assert_eq!(parse([3, 4096, 8192, 0], &[(0, 8191, 1, 0)]), bad);
        assert_eq!(parse([3, 4096, 8192, 0], &[(0, 8192, 1, 1)]), bad);
        assert_eq!(parse([3, 4096, 8192, 0], &[(4096, u64::MAX - 4095, 1, 0)]), bad);
        assert_eq!(parse([3, 4096, 8192, 0], &[(0, 8192, 1, u64::MAX - 4095)]), bad);
        assert_eq!(parse([3, 4096, 8192, 0], &[m, (4096, 4096, 1, 0)]), HeaderError::OutOfOrder { index: 1 });
        assert_eq!(parse([3, 4096, 8192, 0], &[(4096, 4096, 1, 0)]), HeaderError::Gap(0));
        assert_eq!(parse([3, 4096, 12288, 0], &[m]), HeaderError::Gap(8192));
        assert_eq!(
            parse([3, 4096, 8192, 0], &[(0, 4096, 1, 0), (8192, 4096, 1, 0)]),
            HeaderError::BeyondEnd { index: 1 }
        );
        let whole = bytes([3, 4096, 8192, 0], &[m]);
        for len in (0..whole.len()).filter(|len| *len != FIXED_LEN) {
            assert_eq!(Header::parse(&whole[..len]), Err(HeaderError::Cut(len)));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_sound_header_or_an_error(
            tail in prop::collection::vec(any::<u8>(), 0..200),
            fixed in prop::array::uniform4(prop_oneof![Just(3u64), Just(4096), 0u64..99999, any::<u64>()]),
            mappings in prop::collection::vec(
                (0u64..8, 0u64..8, 0u8..3, prop_oneof![0u64..8, any::<u64>()]), 0..6),
            scaled: bool,
        ) {
            let scale = if scaled { GRANULE } else { 1 };
            let mut at = 0;
            let mappings: Vec<_> = mappings.into_iter().map(|(gap, len, id, build_offset)| {
                let offset = at + if gap > 5 { gap } else { 0 } * scale;
                at = offset + len * scale;
                (offset, len * scale, id, build_offset.wrapping_mul(scale))
            }).collect();
            for fixed in [fixed, [3, 4096, at, 0]] {
                let mut wire = bytes(fixed, &mappings);
                for wire in [wire.clone(), { wire.extend(&tail); wire }, tail.clone()] {
                    let Ok(header) = Header::parse(&wire) else { continue };
                    if wire.len() > FIXED_LEN {
                        prop_assert_eq!(header.to_bytes(), wire);
                    }
                    let mut next = 0;
                    for extent in header.extents(0..u64::MAX) {
                        prop_assert_eq!(extent.offset, next);
                        next += extent.len;
                    }
                    prop_assert_eq!(next, header.size());
                }
            }
        }
    }
}
