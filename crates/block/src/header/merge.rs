//! The header of a build that changed parts of its parent.

use std::collections::BTreeSet;

use nidus_storage::BuildId;

use super::{GRANULE, Header, HeaderError, Mapping, check_order, extents, padded};

impl Header {
    /// The header of `build`, which differs from this one's build in the ranges of `changed`:
    /// ascending and apart, each stored where it says (or by nobody, if it became zeros). How `build`
    /// itself is stored it does not say.
    pub fn child(&self, build: BuildId, changed: &[Mapping]) -> Result<Self, HeaderError> {
        let generation = self.generation.saturating_add(1);
        // Nothing is no build: the line begins with the first one that stores something.
        let base = if self.base.is_nil() { build } else { self.base };
        Self { generation, build, base, ..self.clone() }.relocated(changed)
    }

    /// The header of the same build with the ranges of `moved`, ascending and apart, stored where
    /// those say. How other builds are stored it says of those that it still refers to.
    pub fn relocated(&self, moved: &[Mapping]) -> Result<Self, HeaderError> {
        check_order(moved, padded(self.size, self.block_size)?)?;
        let mut mappings = Vec::with_capacity(self.mappings.len() + 2 * moved.len());
        let mut at = 0;
        for m in moved {
            extents(&self.mappings, at..m.offset).for_each(|m| append(&mut mappings, m));
            append(&mut mappings, *m);
            at = m.end();
        }
        extents(&self.mappings, at..u64::MAX).for_each(|m| append(&mut mappings, m));
        let read: BTreeSet<BuildId> = mappings.iter().map(|m| m.build).filter(|b| *b != self.build).collect();
        let mut stored = self.stored.clone();
        stored.retain(|build, _| read.contains(build));
        Self { mappings, stored, pending: false, ..self.clone() }.checked()
    }

    /// The header of a device that is larger: zeros follow, up to `size` bytes.
    ///
    /// Fails if that is less than it has, or no multiple of its block size.
    pub fn grown(&self, size: u64) -> Result<Self, HeaderError> {
        let end = padded(self.size, GRANULE)?;
        let mut mappings = self.mappings.clone();
        if let Some(len) = padded(size, GRANULE)?.checked_sub(end).filter(|len| *len > 0) {
            append(&mut mappings, Mapping { offset: end, len, build: BuildId::NIL, build_offset: 0 });
        }
        Self { size, mappings, ..self.clone() }.checked()
    }
}

/// Adds a mapping, as a part of the last one where it continues that.
pub(super) fn append(mappings: &mut Vec<Mapping>, next: Mapping) {
    match mappings.last_mut() {
        Some(last)
            if last.build == next.build
                && last.end() == next.offset
                && (next.build.is_nil() || last.build_offset + last.len == next.build_offset) =>
        {
            last.len += next.len;
        }
        _ => mappings.push(next),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_added_is_zeros() {
        let build = BuildId::random();
        let header = Header::identity(build, 4 * GRANULE, GRANULE).unwrap();
        let grown = header.grown(10 * GRANULE).unwrap();
        assert_eq!(Header::parse(&grown.to_bytes()).unwrap(), grown);
        let last = grown.mappings().last().unwrap();
        assert_eq!((grown.size(), last.offset, last.len), (10 * GRANULE, 4 * GRANULE, 6 * GRANULE));
        assert!(last.build.is_nil() && grown.mappings()[0].build == build);
        assert_eq!(header.grown(4 * GRANULE).unwrap(), header);
        assert!(header.grown(GRANULE).is_err());
    }

    const BLOCKS: u64 = 40;

    /// The plain model: for each block of the device, who stores it and where.
    type Model = Vec<(BuildId, u64)>;

    fn model(header: &Header) -> Model {
        let mut out = Vec::new();
        for block in 0..header.size().div_ceil(GRANULE) {
            let offset = block * GRANULE;
            let found: Vec<_> = header.extents(offset..offset + 1).collect();
            assert_eq!((found.len(), found[0].offset, found[0].len), (1, offset, 1));
            let at = if found[0].build.is_nil() { 0 } else { found[0].build_offset };
            out.push((found[0].build, at));
        }
        out
    }

    /// A change of the blocks whose fate is not `None`: stored (true) or zeroed (false).
    fn change(build: BuildId, fates: &[Option<bool>]) -> Vec<Mapping> {
        let (mut out, mut build_offset) = (Vec::new(), 0);
        for (block, stored) in fates.iter().enumerate().filter_map(|(b, f)| f.map(|f| (b as u64, f))) {
            let offset = block * GRANULE;
            if stored {
                out.push(Mapping { offset, len: GRANULE, build, build_offset });
                build_offset += GRANULE;
            } else {
                out.push(Mapping { offset, len: GRANULE, build: BuildId::NIL, build_offset: 0 });
            }
        }
        out
    }

    proptest! {
        #[test]
        fn a_line_of_builds_reads_like_the_plain_model(
            generations in prop::collection::vec(
                prop::collection::vec(prop::option::weighted(0.4, any::<bool>()), BLOCKS as usize), 1..6),
            cut in 0u64..GRANULE,
        ) {
            let base = BuildId::random();
            let mut header = Header::identity(base, BLOCKS * GRANULE - cut, GRANULE).unwrap();
            let mut expected: Model = (0..BLOCKS).map(|b| (base, b * GRANULE)).collect();
            for (generation, fates) in generations.iter().enumerate() {
                let build = BuildId::random();
                let changed = change(build, fates);
                for m in &changed {
                    expected[(m.offset / GRANULE) as usize] = (m.build, m.build_offset);
                }
                header = header.child(build, &changed).unwrap();
                prop_assert_eq!(&model(&header), &expected);
                prop_assert_eq!((header.build(), header.base()), (build, base));
                prop_assert_eq!(header.generation(), generation as u64 + 1);
                prop_assert_eq!(&Header::parse(&header.to_bytes()).unwrap(), &header);
                // No two neighbours could be one.
                let mut joined = Vec::new();
                header.mappings().iter().for_each(|m| append(&mut joined, *m));
                prop_assert_eq!(&joined, header.mappings());
            }
        }

        #[test]
        fn any_range_is_found_in_order_and_whole(
            fates in prop::collection::vec(prop::option::of(any::<bool>()), BLOCKS as usize),
            start in 0u64..BLOCKS * GRANULE, len in 0u64..BLOCKS * GRANULE,
        ) {
            let build = BuildId::random();
            let header = Header::identity(BuildId::random(), BLOCKS * GRANULE, GRANULE).unwrap();
            let header = header.child(build, &change(build, &fates)).unwrap();
            let blocks = model(&header);
            let mut at = start;
            for extent in header.extents(start..start + len) {
                prop_assert_eq!(extent.offset, at);
                prop_assert!(extent.len > 0);
                for byte in (at..at + extent.len).step_by(512) {
                    let (build, offset) = blocks[(byte / GRANULE) as usize];
                    prop_assert_eq!(extent.build, build);
                    if !build.is_nil() {
                        prop_assert_eq!(extent.build_offset + (byte - at), offset + byte % GRANULE);
                    }
                }
                at += extent.len;
            }
            prop_assert_eq!(at, (start + len).min(header.size()));
        }
    }

    #[test]
    fn changes_must_be_in_order_and_within() {
        let header = Header::identity(BuildId::random(), 2 * GRANULE, GRANULE).unwrap();
        let at =
            |block| Mapping { offset: block * GRANULE, len: GRANULE, build: BuildId::NIL, build_offset: 0 };
        let child = |changed: &[Mapping]| header.child(BuildId::random(), changed).unwrap_err();
        assert_eq!(child(&[at(1), at(0)]), HeaderError::OutOfOrder { index: 1 });
        assert_eq!(child(&[at(2)]), HeaderError::BeyondEnd { index: 0 });
    }
}
