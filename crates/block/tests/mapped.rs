//! Lines of builds against a plain byte array: what is read is what was written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs::File, path::Path, sync::Arc};

use bytes::Bytes;
use nidus_block::{
    BLOCK_SIZE, BlockDevice, BlockError, DiffWriter, MappedDevice, Overlay, ReadDevice, header::Header,
};
use nidus_storage::BuildId;
use proptest::prelude::*;
use tempfile::TempDir;

const BLOCKS: usize = 24;
const BLOCK: usize = BLOCK_SIZE as usize;

async fn open(dir: &Path, header: &Header) -> Arc<MappedDevice> {
    let dir = dir.to_owned();
    Arc::new(MappedDevice::open(header.clone(), move |b| dir.join(b.to_string())).await.unwrap())
}

/// What a pause does with a disk: every dirty block is a candidate.
async fn pause(dir: &Path, parent: &MappedDevice, overlay: &Overlay) -> (Header, u64) {
    let build = BuildId::random();
    let path = dir.join(build.to_string());
    let file = File::create_new(&path).unwrap();
    let frozen = overlay.freeze().await.unwrap();
    let mut diff = DiffWriter::new(parent, build, &file, &path);
    for range in frozen.ranges() {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        frozen.read_blocking(range.start, &mut bytes).unwrap();
        diff.push(range.start, &bytes).unwrap();
    }
    let diff = diff.finish().unwrap();
    assert!(file.metadata().unwrap().len() <= diff.stored);
    (Header::parse(&diff.header.to_bytes()).unwrap(), diff.stored)
}

/// A write of a byte (0 is zeros, which must not be stored) somewhere in the device.
fn writes() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
    let byte = prop_oneof![2 => Just(0u8), 3 => 1u8..4];
    prop::collection::vec((0..BLOCKS * BLOCK, 1usize..5 * BLOCK, byte), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_was_written_before_any_number_of_pauses_is_read(
        lives in prop::collection::vec(writes(), 1..7),
        cut in prop_oneof![Just(0usize), 1..BLOCK],
        reads in prop::collection::vec((0..BLOCKS * BLOCK, 0usize..6 * BLOCK), 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = TempDir::new().unwrap();
            let size = BLOCKS * BLOCK - cut;
            let mut model: Vec<u8> = (0..size).map(|i| (i / BLOCK % 3) as u8).collect();
            let base = BuildId::random();
            std::fs::write(dir.path().join(base.to_string()), &model).unwrap();
            let mut header = Header::identity(base, size as u64, BLOCK_SIZE).unwrap();
            assert!(header.is_identity());
            for (life, writes) in lives.iter().enumerate() {
                let parent = open(dir.path(), &header).await;
                let overlay = Overlay::create(parent.clone(), dir.path().join(format!("o{life}"))).await.unwrap();
                let before = model.clone();
                for (at, len, byte) in writes {
                    let end = (at + len).min(size);
                    if *at < end {
                        model[*at..end].fill(*byte);
                        overlay.write_at(*at as u64, Bytes::from(vec![*byte; end - at])).await.unwrap();
                    }
                }
                let (child, stored) = pause(dir.path(), &parent, &overlay).await;
                // No more is stored than what differs and is not zeros.
                let differ = model.chunks(BLOCK).zip(before.chunks(BLOCK))
                    .filter(|(new, old)| new != old && new.iter().any(|b| *b != 0)).count();
                assert_eq!(stored, (differ * BLOCK) as u64);
                assert!(!child.is_identity() || child.build() != header.build());
                header = child;
                let device = open(dir.path(), &header).await;
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

#[tokio::test]
async fn a_missing_or_cut_file_is_named() {
    let dir = TempDir::new().unwrap();
    let build = BuildId::random();
    let header = Header::identity(build, 3 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    let path = dir.path().join(build.to_string());
    let try_open = || {
        let path = path.clone();
        MappedDevice::open(header.clone(), move |_| path.clone())
    };
    let error = try_open().await.unwrap_err();
    assert!(error.to_string().contains(&build.to_string()), "{error}");
    std::fs::write(&path, vec![1; 2 * BLOCK]).unwrap();
    assert!(matches!(try_open().await.unwrap_err(), BlockError::Truncated { offset: 8192, .. }));
    std::fs::write(&path, vec![1; 3 * BLOCK]).unwrap();
    let device = try_open().await.unwrap();
    assert_eq!(device.builds().collect::<Vec<_>>(), [build]);
    assert!(matches!(device.read_at(8192, &mut [0; 4097]).await, Err(BlockError::OutOfRange { .. })));
}
