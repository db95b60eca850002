//! Lines of builds against a plain byte array: what is read is what was written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod builds;

use std::{collections::BTreeMap, fs::File};

use builds::{open, pause, store, template};
use bytes::Bytes;
use nidus_block::{
    BLOCK_SIZE, BlockDevice, BlockError, MappedDevice, Overlay, ReadDevice, compact,
    header::{Compression, Frame, FrameTable, Header, StoredBuild, Version},
    wants_compaction,
};
use nidus_storage::{Artifact, BuildId, StorageError};
use proptest::prelude::*;

const BLOCKS: usize = 24;
const BLOCK: usize = BLOCK_SIZE as usize;

/// A write of a byte (0 is zeros, which must not be stored) somewhere in the device.
fn writes() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
    let byte = prop_oneof![2 => Just(0u8), 3 => 1u8..4];
    prop::collection::vec((0..BLOCKS * BLOCK, 1usize..5 * BLOCK, byte), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_was_written_before_any_number_of_pauses_is_read(
        lives in prop::collection::vec(writes(), 1..7),
        cut in prop_oneof![Just(0usize), 1..BLOCK],
        reads in prop::collection::vec((0..BLOCKS * BLOCK, 0usize..6 * BLOCK), 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (dir, store) = store();
            let size = BLOCKS * BLOCK - cut;
            let mut model: Vec<u8> = (0..size).map(|i| (i / BLOCK % 3) as u8).collect();
            let mut header = template(&store, &model).await;
            assert!(header.is_identity());
            for (life, writes) in lives.iter().enumerate() {
                let parent = open(&store, &header).await;
                let overlay = Overlay::create(parent.clone(), dir.path().join(format!("o{life}"))).await.unwrap();
                let before = model.clone();
                for (at, len, byte) in writes {
                    let end = (at + len).min(size);
                    if *at < end {
                        model[*at..end].fill(*byte);
                        overlay.write_at(*at as u64, Bytes::from(vec![*byte; end - at])).await.unwrap();
                    }
                }
                let (child, stored) = pause(&store, &parent, &overlay).await;
                // No more is stored than what differs and is not zeros.
                let differ = model.chunks(BLOCK).zip(before.chunks(BLOCK))
                    .filter(|(new, old)| new != old && new.iter().any(|b| *b != 0)).count();
                assert_eq!(stored, (differ * BLOCK) as u64);
                assert!(!child.is_identity() || child.build() != header.build());
                header = child;
                let device = open(&store, &header).await;
                for (at, len) in &reads {
                    let at = (*at).min(size);
                    let len = (*len).min(size - at);
                    let mut buf = vec![0xee; len];
                    device.read_at(at as u64, &mut buf).await.unwrap();
                    assert!(buf == model[at..at + len], "life {life}: {len} bytes at {at}");
                    buf.fill(0xee);
                    if device.try_read_at(at as u64, &mut buf).unwrap() {
                        assert!(buf == model[at..at + len]);
                    }
                    buf.fill(0xee);
                    device.read_blocking(at as u64, &mut buf).unwrap();
                    assert!(buf == model[at..at + len]);
                    if device.is_unstored(at as u64..(at + len) as u64) {
                        assert!(buf.iter().all(|b| *b == 0));
                    }
                }
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_compacted_build_and_its_children_read_as_before(
        lives in prop::collection::vec(writes(), 1..7),
        cut in prop_oneof![Just(0usize), 1..BLOCK],
        middle in any::<prop::sample::Index>(), stop in prop::option::weighted(0.2, 0usize..3),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (dir, store) = store();
            let mut model: Vec<u8> = (0..BLOCKS * BLOCK - cut).map(|i| (i / BLOCK % 3) as u8).collect();
            let size = model.len();
            let mut line = vec![(template(&store, &model).await, model.clone())];
            for (life, writes) in lives.iter().enumerate() {
                let parent = open(&store, &line.last().unwrap().0).await;
                let overlay = Overlay::create(parent.clone(), dir.path().join(format!("o{life}"))).await.unwrap();
                for (at, len, byte) in writes {
                    let end = (at + len).min(size);
                    if *at < end {
                        model[*at..end].fill(*byte);
                        overlay.write_at(*at as u64, Bytes::from(vec![*byte; end - at])).await.unwrap();
                    }
                }
                line.push((pause(&store, &parent, &overlay).await.0, model.clone()));
            }
            // Any but the first, which others may have children of.
            let middle = 1 + middle.index(lives.len());
            let (header, expected) = &line[middle];
            let (before, build) = (open(&store, header).await, header.build());
            let staged = store.stage_again(build).unwrap();
            let path = staged.path(Artifact::Rootfs);
            let file = File::create_new(&path).unwrap();
            store.open_artifact(build, Artifact::Rootfs).unwrap().copy_to(&file, &path).unwrap();
            let pieces = std::cell::Cell::new(0);
            let go_on = || stop.is_none_or(|stop| { pieces.set(pieces.get() + 1); pieces.get() <= stop });
            let compacted = match compact(&before, &file, &path, go_on).unwrap() {
                Some(diff) => {
                    assert_eq!(diff.stored, file.metadata().unwrap().len().next_multiple_of(BLOCK_SIZE));
                    staged.write(Artifact::RootfsHeader, diff.header.to_bytes()).await.unwrap();
                    staged.write(Artifact::Metadata, "{}").await.unwrap();
                    store.replace(staged).unwrap();
                    diff.header
                }
                None => {
                    assert!(stop.is_some());
                    drop(staged);
                    header.clone()
                }
            };
            if stop.is_none() {
                let base = compacted.base();
                assert!(compacted.mappings().iter().all(|m| m.build.is_nil() || m.build == build || m.build == base));
                assert!(!wants_compaction(&compacted));
                assert_eq!(compacted.generation(), header.generation());
                let stored = store.read(build, Artifact::RootfsHeader).await.unwrap();
                assert_eq!(Header::parse(&stored).unwrap(), compacted);
            }
            // Those that have it open still, those that open it now, and its children.
            let mut all = vec![(before, expected), (open(&store, &compacted).await, expected)];
            for (header, expected) in &line[middle + 1..] {
                all.push((open(&store, header).await, expected));
            }
            for (device, expected) in all {
                let mut bytes = vec![0xee; size];
                device.read_blocking(0, &mut bytes).unwrap();
                assert!(bytes == *expected);
            }
            assert!(std::fs::read_dir(store.root().join(".staging")).unwrap().next().is_none());
        });
    }
}

#[tokio::test]
async fn a_missing_or_cut_file_is_named() {
    let (_dir, store) = store();
    let build = template(&store, &vec![1; 3 * BLOCK]).await.build();
    let path = store.path(build, Artifact::Rootfs);
    let try_open = |header| {
        let store = store.clone();
        MappedDevice::open(header, move |b| store.open_artifact(b, Artifact::Rootfs))
    };
    let header = Header::identity(build, 3 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    let device = try_open(header.clone()).await.unwrap();
    assert_eq!(device.builds().collect::<Vec<_>>(), [build]);
    assert!(matches!(device.read_at(8192, &mut [0; 4097]).await, Err(BlockError::OutOfRange { .. })));
    // A header that needs more than the build has.
    let longer = Header::identity(build, 4 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    assert!(matches!(try_open(longer).await.unwrap_err(), BlockError::Truncated { offset: 12288, .. }));
    let other = Header::identity(BuildId::random(), BLOCK_SIZE, BLOCK_SIZE).unwrap();
    let error = try_open(other.clone()).await.unwrap_err();
    assert!(matches!(error, BlockError::Storage(StorageError::NotFound(b)) if b == other.build()), "{error}");
    File::options().write(true).open(&path).unwrap().set_len(2 * BLOCK_SIZE).unwrap();
    for error in [
        try_open(header).await.unwrap_err(),
        device.read_at(BLOCK_SIZE, &mut [0; 2 * BLOCK]).await.unwrap_err(),
        device.try_read_at(2 * BLOCK_SIZE, &mut [0; 9]).unwrap_err(),
    ] {
        assert!(matches!(error, BlockError::Storage(StorageError::Damaged(_))), "{error}");
        let text = error.to_string();
        assert!(text.contains(&build.to_string()) && text.contains("rootfs.ext4"), "{text}");
    }
}

#[tokio::test]
async fn a_build_that_is_stored_compressed_is_refused_by_name() {
    let (_dir, store) = store();
    let build = template(&store, &vec![1; 3 * BLOCK]).await.build();
    let open = |stored| {
        let header = Header::identity(build, 3 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
        let header = header.with_stored_builds(BTreeMap::from([(build, stored)])).unwrap();
        let header = Header::parse(&header.encode(Version::V5).unwrap()).unwrap();
        let store = store.clone();
        MappedDevice::open(header, move |b| store.open_artifact(b, Artifact::Rootfs))
    };
    let size = 3 * BLOCK_SIZE;
    let device = open(StoredBuild { size, ..StoredBuild::default() }).await.unwrap();
    let mut bytes = vec![0; 3 * BLOCK];
    device.read_at(0, &mut bytes).await.unwrap();
    assert!(bytes.iter().all(|b| *b == 1));

    let frame = Frame { offset: 0, len: size as u32, stored_offset: 0, stored_len: 100 };
    let frames = Some(FrameTable { compression: Compression::Lz4, frames: vec![frame] });
    let error = open(StoredBuild { size, frames, ..StoredBuild::default() }).await.unwrap_err();
    assert!(matches!(error, BlockError::Compressed { build: b, .. } if b == build), "{error}");
    assert_eq!(
        error.to_string(),
        format!("build {build} is stored in lz4 frames, as a header says, and cannot be read")
    );
}
