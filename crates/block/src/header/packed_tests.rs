//! Versions 4 and 5, byte by byte and with any bytes.

use std::io::{Read, Write};

use lz4_flex::frame::{FrameDecoder, FrameEncoder};
use proptest::prelude::*;

use super::*;

const PAGE: u64 = GRANULE;
const A: BuildId = BuildId::from_bytes([0xaa; 16]);
const B: BuildId = BuildId::from_bytes([0xbb; 16]);

fn fixed(version: u64, block_size: u64, size: u64) -> Vec<u8> {
    let mut out: Vec<u8> = [version, block_size, size, 7].iter().flat_map(|n| n.to_le_bytes()).collect();
    out.extend([0xaa; 16]);
    out.extend([0xbb; 16]);
    out
}

/// An LZ4 frame, by hand: one block, not compressed, without sums.
fn lz4(block: &[u8]) -> Vec<u8> {
    let mut out = vec![0x04, 0x22, 0x4d, 0x18, 0x60, 0x40, 0x82];
    out.extend((block.len() as u32 | 1 << 31).to_le_bytes());
    out.extend(block);
    out.extend([0; 4]);
    out
}

fn header(version: u64, size: u64, block: &[u8]) -> Vec<u8> {
    let mut out = fixed(version, PAGE, size);
    out.push(0);
    out.extend((block.len() as u32).to_le_bytes());
    out.extend(lz4(block));
    out
}

/// Two builds: `A` of 0x5000 bytes with a sum and two frames, `B` of which nothing is known.
fn stored_section() -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0];
    out.extend([0xaa; 16]);
    out.extend([0x00, 0x50, 0, 0, 0, 0, 0, 0]);
    out.extend([0xcc; 32]);
    out.extend([1, 0, 0, 0, 2, 0, 0, 0]);
    // Offset 0, stored at 0, 0x2000 bytes in 0x123.
    out.extend([0; 16]);
    out.extend([0x00, 0x20, 0, 0, 0x23, 0x01, 0, 0]);
    // Offset 0x4000, stored at 0x200, 0x1000 bytes in 0x80.
    out.extend([0x00, 0x40, 0, 0, 0, 0, 0, 0, 0x00, 0x02, 0, 0, 0, 0, 0, 0]);
    out.extend([0x00, 0x10, 0, 0, 0x80, 0, 0, 0]);
    out.extend([0xbb; 16]);
    out.extend([0; 8 + 32 + 8]);
    out
}

fn stored_builds() -> BTreeMap<BuildId, StoredBuild> {
    let frames = vec![
        Frame { offset: 0, len: 0x2000, stored_offset: 0, stored_len: 0x123 },
        Frame { offset: 0x4000, len: 0x1000, stored_offset: 0x200, stored_len: 0x80 },
    ];
    let frames = Some(FrameTable { compression: Compression::Zstd, frames });
    let a = StoredBuild { size: 0x5000, sha256: Some([0xcc; 32]), frames };
    BTreeMap::from([(A, a), (B, StoredBuild::default())])
}

/// Page 0 zeros, 1 to 300 in `A` from page 200, 301 and 302 in `B` from page 3, 303 zeros.
fn mappings() -> Vec<Mapping> {
    let m = |from: u64, to: u64, build, page: u64| {
        let (offset, len) = (from * PAGE, (to - from) * PAGE);
        Mapping { offset, len, build, build_offset: page * PAGE }
    };
    let nil = BuildId::NIL;
    vec![m(0, 1, nil, 0), m(1, 301, A, 200), m(301, 303, B, 3), m(303, 304, nil, 0)]
}

/// The block of a header, which must be one LZ4 frame of the kind that others write: with blocks of up to
/// 4 MiB, independent, with sums of each and of all.
fn block(bytes: &[u8]) -> Vec<u8> {
    assert_eq!(bytes[64], 0);
    assert_eq!(bytes[69..75], [0x04, 0x22, 0x4d, 0x18, 0x74, 0x70]);
    let mut block = Vec::new();
    FrameDecoder::new(&bytes[69..]).read_to_end(&mut block).unwrap();
    assert_eq!(bytes[65..69], (block.len() as u32).to_le_bytes());
    block
}

#[test]
fn version_5_is_laid_out_as_described() {
    let mut wire = stored_section();
    wire.extend([2, 0, 0, 0]);
    wire.extend([0xaa; 16]);
    wire.extend([0xbb; 16]);
    wire.extend([2, 0, 0, 0]);
    wire.extend([1, 0xac, 0x02]); // begin at page 1, and 300 later
    wire.extend([0xac, 0x02, 2]); // 300 and 2 pages
    wire.extend([0x90, 0x03, 0x89, 0x03]); // 200 pages in; 197 less
    wire.extend([0, 1]);
    let header = Header::parse(&header(5, 304 * PAGE, &wire)).unwrap();
    assert_eq!((header.block_size(), header.size(), header.generation()), (PAGE, 304 * PAGE, 7));
    assert_eq!((header.build(), header.base(), header.is_upload_pending()), (A, B, false));
    assert_eq!(header.mappings(), mappings());
    assert_eq!(*header.stored_builds(), stored_builds());
    let written = header.encode(Version::V5).unwrap();
    assert_eq!(written[..64], fixed(5, PAGE, 304 * PAGE));
    assert_eq!(block(&written), wire);
}

#[test]
fn version_4_is_laid_out_as_described() {
    let mut wire = stored_section();
    wire.extend([4, 0, 0, 0]);
    for m in mappings() {
        wire.extend(m.offset.to_le_bytes());
        wire.extend(m.len.to_le_bytes());
        wire.extend(m.build.as_bytes());
        wire.extend(m.build_offset.to_le_bytes());
    }
    let header = Header::parse(&header(4, 304 * PAGE, &wire)).unwrap();
    assert_eq!(header.mappings(), mappings());
    assert_eq!(*header.stored_builds(), stored_builds());
    let written = header.encode(Version::V4).unwrap();
    assert_eq!(written[..64], fixed(4, PAGE, 304 * PAGE));
    assert_eq!(block(&written), wire);
}

#[test]
fn without_mappings_version_4_is_the_identity_and_version_5_zeros() {
    let whole = |build| [Mapping { offset: 0, len: 2 * PAGE, build, build_offset: 0 }];
    assert_eq!(Header::parse(&header(4, PAGE + 1, &[0; 8])).unwrap().mappings(), whole(A));
    assert_eq!(Header::parse(&header(5, PAGE + 1, &[0; 12])).unwrap().mappings(), whole(BuildId::NIL));
}

#[test]
fn the_flag_of_an_upload_under_way_is_kept_and_others_are_refused() {
    let mut wire = header(5, PAGE, &[0; 12]);
    wire[64] = 1;
    let pending = Header::parse(&wire).unwrap();
    assert!(pending.is_upload_pending());
    assert!(Header::parse(&pending.encode(Version::V4).unwrap()).unwrap().is_upload_pending());
    wire[64] = 3;
    assert_eq!(Header::parse(&wire), Err(HeaderError::Flags(3)));
}

#[test]
fn wrong_numbers_are_named() {
    let five = |columns: &[u8]| {
        let mut block = vec![0, 0, 0, 0, 1, 0, 0, 0];
        block.extend([0xaa; 16]);
        block.extend(columns);
        Header::parse(&header(5, 4 * PAGE, &block))
    };
    let one = [1, 0, 0, 0];
    assert!(five(&[&one[..], &[0, 1, 0, 0]].concat()).is_ok());
    assert_eq!(
        five(&[&one[..], &[0, 1, 0]].concat()),
        Err(HeaderError::Count { what: "mappings", count: 1 })
    );
    assert_eq!(five(&[&one[..], &[0, 1, 0, 1]].concat()), Err(HeaderError::UnknownId { index: 0 }));
    assert_eq!(five(&[&one[..], &[0, 0, 0, 0]].concat()), Err(HeaderError::BadRange { index: 0 }));
    assert_eq!(five(&[&one[..], &[0, 1, 1, 0]].concat()), Err(HeaderError::BadRange { index: 0 }));
    assert_eq!(five(&[&one[..], &[4, 1, 0, 0]].concat()), Err(HeaderError::BeyondEnd { index: 1 }));
    assert_eq!(five(&[&one[..], &[0, 1, 0, 0, 9]].concat()), Err(HeaderError::Trailing(1)));
    assert_eq!(five(&[&one[..], &[0x80; 4]].concat()), Err(HeaderError::CutBlock));
    let large = [0xff, 0xff, 0xff, 0xff, 0x10];
    assert_eq!(five(&[&one[..], &large, &[1, 0, 0]].concat()), Err(HeaderError::BadRange { index: 0 }));
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
    assert_eq!(five(&[&one[..], &huge].concat()), Err(HeaderError::Varint));
    assert_eq!(five(&[0, 0, 0, 1, 0, 0]), Err(HeaderError::Count { what: "mappings", count: 1 << 24 }));
    let overlap = [2, 0, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0];
    assert_eq!(five(&overlap), Err(HeaderError::OutOfOrder { index: 1 }));

    let stored = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut block = stored_section();
        change(&mut block);
        block.extend([0; 8]);
        Header::parse(&header(5, PAGE, &block))
    };
    assert!(stored(&|_| {}).is_ok());
    assert_eq!(stored(&|b| b[27] = 0x80), Err(HeaderError::StoredSize { build: A, size: 1 << 63 | 0x5000 }));
    assert_eq!(stored(&|b| b[60] = 3), Err(HeaderError::Compression { build: A, number: 3 }));
    assert_eq!(stored(&|b| b[60] = 0), Err(HeaderError::Compression { build: A, number: 0 }));
    assert_eq!(stored(&|b| b[67] = 1), Err(HeaderError::Count { what: "frames", count: 1 << 24 | 2 }));
    assert_eq!(stored(&|b| b[87] = 0x80), Err(HeaderError::BadFrame { build: A, index: 0 }));
    assert_eq!(stored(&|b| b[93] = 0x10), Err(HeaderError::BadFrame { build: A, index: 1 }));
    assert_eq!(stored(&|b| b[101] = 0), Err(HeaderError::BadFrame { build: A, index: 1 }));
    assert_eq!(stored(&|b| b[116..132].fill(0xaa)), Err(HeaderError::Twice(A)));
    assert_eq!(stored(&|b| b[3] = 1), Err(HeaderError::Count { what: "builds", count: 1 << 24 | 2 }));
}

#[test]
fn what_unpacks_to_more_than_it_says_is_refused_early() {
    let bomb = |stated: u32| {
        let mut encoder = FrameEncoder::new(Vec::new());
        encoder.write_all(&vec![0; 32 << 20]).unwrap();
        let mut wire = fixed(5, PAGE, PAGE);
        wire.push(0);
        wire.extend(stated.to_le_bytes());
        wire.extend(encoder.finish().unwrap());
        Header::parse(&wire)
    };
    assert_eq!(bomb(100), Err(HeaderError::BlockLength(100)));
    assert_eq!(bomb((32 << 20) + 1), Err(HeaderError::BlockLength((32 << 20) + 1)));
    assert_eq!(bomb(u32::MAX), Err(HeaderError::Count { what: "bytes", count: u32::MAX.into() }));
}

#[test]
fn a_damaged_or_extended_frame_is_refused() {
    let good = Header::identity(A, 64 * PAGE, PAGE).unwrap().encode(Version::V5).unwrap();
    assert!(Header::parse(&good).is_ok());
    for len in 0..good.len() {
        assert!(Header::parse(&good[..len]).is_err(), "cut at {len}");
    }
    for at in 69..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 0x40;
        assert!(Header::parse(&damaged).is_err(), "damaged at {at}");
    }
    let mut extended = good;
    extended.extend([1, 2, 3]);
    assert_eq!(Header::parse(&extended), Err(HeaderError::Trailing(3)));
}

#[test]
fn what_a_version_has_no_room_for_is_not_written() {
    let far = Mapping { offset: 0, len: PAGE, build: B, build_offset: PAGE << 32 };
    let header = Header::identity(A, PAGE, PAGE).unwrap().child(B, &[far]).unwrap();
    let unwritable = HeaderError::Unwritable { version: Version::V5, what: "pages" };
    assert_eq!(header.encode(Version::V5), Err(unwritable));
    assert_eq!(Header::parse(&header.encode(Version::V4).unwrap()), Ok(header));
}

#[test]
fn a_child_says_how_those_are_stored_that_it_still_refers_to() {
    let parent = Header::identity(A, 2 * PAGE, PAGE).unwrap().with_stored_builds(stored_builds()).unwrap();
    let (c, d) = (BuildId::random(), BuildId::random());
    let change = |page, build| Mapping { offset: page * PAGE, len: PAGE, build, build_offset: 0 };
    let child = parent.child(c, &[change(0, c)]).unwrap();
    assert!(child.stored_builds().keys().eq([&A]));
    let grandchild = child.child(d, &[change(1, d)]).unwrap();
    assert!(grandchild.stored_builds().is_empty());
}

/// Headers with up to 40 pages in runs of several builds and zeros, and some builds' storage.
fn headers() -> impl Strategy<Value = Header> {
    let runs = prop::collection::vec((1u64..5, 0u8..4, prop_oneof![0u64..50, 0u64..1 << 32]), 1..12);
    let frames = prop::collection::vec((0u64..9, 1u32..9999, 0u64..9, 1u32..9999), 0..4);
    let stored = (0u64..1 << 40, any::<[u8; 32]>(), prop::option::of((any::<bool>(), frames)));
    (runs, prop::collection::vec(stored, 0..3), 0..PAGE, any::<u64>()).prop_map(
        |(runs, stored, cut, generation)| {
            let (mut mappings, mut at) = (Vec::new(), 0);
            for (pages, id, build_page) in runs {
                let build_offset = if id == 0 { 0 } else { build_page * PAGE };
                let m = Mapping {
                    offset: at,
                    len: pages * PAGE,
                    build: BuildId::from_bytes([id; 16]),
                    build_offset,
                };
                at = m.end();
                merge::append(&mut mappings, m);
            }
            let stored = stored.into_iter().enumerate().map(|(n, (size, sum, frames))| {
                let frames = frames.map(|(zstd, sizes)| {
                    let (mut offset, mut stored_offset) = (0, 0);
                    let frames = sizes.into_iter().map(|(gap, len, stored_gap, stored_len)| {
                        (offset, stored_offset) = (offset + gap, stored_offset + stored_gap);
                        let frame = Frame { offset, len, stored_offset, stored_len };
                        (offset, stored_offset) =
                            (offset + u64::from(len), stored_offset + u64::from(stored_len));
                        frame
                    });
                    let compression = if zstd { Compression::Zstd } else { Compression::Lz4 };
                    FrameTable { compression, frames: frames.collect() }
                });
                let sha256 = Some(sum).filter(|s| *s != [0; 32]);
                (BuildId::from_bytes([n as u8 + 1; 16]), StoredBuild { size, sha256, frames })
            });
            let header = Header::identity(A, at - cut, PAGE).unwrap();
            Header { mappings, generation, stored: stored.collect(), ..header }.checked().unwrap()
        },
    )
}

fn assert_sound(header: &Header) {
    let mut next = 0;
    for extent in header.extents(0..u64::MAX) {
        assert_eq!(extent.offset, next);
        next += extent.len;
    }
    assert_eq!(next, header.size());
    let again = Header::parse(&header.encode(Version::V4).unwrap());
    assert_eq!(again.as_ref(), Ok(header));
}

proptest! {
    #[test]
    fn what_was_written_is_read(header in headers()) {
        for version in [Version::V4, Version::V5] {
            prop_assert_eq!(Header::parse(&header.encode(version).unwrap()).unwrap(), header.clone());
        }
        let five = Header::parse(&header.encode(Version::V5).unwrap()).unwrap();
        let three = Header::parse(&five.encode(Version::V3).unwrap()).unwrap();
        prop_assert_eq!(three.to_bytes(), header.to_bytes());
        prop_assert_eq!(&three, &Header { stored: BTreeMap::new(), ..header });
    }

    #[test]
    fn any_block_is_a_sound_header_or_an_error(
        base in headers(), four: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let (version, number) = if four { (Version::V4, 4) } else { (Version::V5, 5) };
        let mut changed = block(&base.encode(version).unwrap());
        for (at, byte) in changes {
            let at = at.index(changed.len());
            changed[at] = byte;
        }
        if let Some(cut) = cut {
            changed.truncate(cut.index(changed.len()));
            changed.extend(tail);
        }
        if let Ok(header) = Header::parse(&header(number, base.size(), &changed)) {
            assert_sound(&header);
        }
    }

    #[test]
    fn any_bytes_are_a_sound_header_or_an_error(
        four: bool, flags in 0u8..3, len in prop_oneof![0u32..300, any::<u32>()],
        tail in prop::collection::vec(any::<u8>(), 0..200), as_frame: bool,
    ) {
        let mut wire = fixed(if four { 4 } else { 5 }, PAGE, 5 * PAGE);
        wire.push(flags);
        wire.extend(if as_frame { tail.len() as u32 } else { len }.to_le_bytes());
        wire.extend(if as_frame { lz4(&tail) } else { tail });
        if let Ok(header) = Header::parse(&wire) {
            assert_sound(&header);
        }
    }
}
