//! Damaged builds: every read gives the bytes that were published or an error that names the artifact.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod builds;

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use builds::{pause, store, template};
use bytes::Bytes;
use nidus_block::{BLOCK_SIZE, BlockDevice, BlockError, MappedDevice, Overlay, ReadDevice, header::Header};
use nidus_storage::{Artifact, BuildId, Damaged, LocalStore, StorageError};
use proptest::prelude::*;

const BLOCK: usize = BLOCK_SIZE as usize;
/// The last block is short.
const SIZE: usize = 11 * BLOCK + 700;

#[derive(Debug, Clone)]
enum Fault {
    Flip { at: prop::sample::Index, bit: u8 },
    Cut(prop::sample::Index),
    Extend(Vec<u8>),
    Replace(Vec<u8>),
}

fn fault() -> impl Strategy<Value = Fault> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..9000);
    prop_oneof![
        4 => (any::<prop::sample::Index>(), 0u8..8).prop_map(|(at, bit)| Fault::Flip { at, bit }),
        1 => any::<prop::sample::Index>().prop_map(Fault::Cut),
        1 => bytes().prop_map(Fault::Extend),
        1 => bytes().prop_map(Fault::Replace),
    ]
}

impl Fault {
    /// Damages a file; returns what it was.
    fn apply(&self, path: &Path) -> Vec<u8> {
        let before = fs::read(path).unwrap();
        let mut bytes = before.clone();
        match self {
            Self::Flip { at, bit } => {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Extend(more) => bytes.extend(more),
            Self::Replace(other) => bytes = other.clone(),
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(path, bytes).unwrap();
        before
    }
}

fn damaged(e: &BlockError) -> Option<&Damaged> {
    match e {
        BlockError::Storage(StorageError::Damaged(damaged)) => Some(damaged),
        _ => None,
    }
}

/// Opens a build's disk as a resume does.
async fn resume(store: &LocalStore, build: BuildId) -> Result<MappedDevice, BlockError> {
    store.read(build, Artifact::Metadata).await?;
    let header = Header::parse(&store.read(build, Artifact::RootfsHeader).await?).unwrap();
    let store = store.clone();
    MappedDevice::open(header, move |b| store.open_artifact(b, Artifact::Rootfs)).await
}

/// Reads that all give the published bytes or an error that names `culprit`.
async fn read_all(
    device: &MappedDevice,
    model: &[u8],
    reads: &[(usize, usize)],
    culprit: (BuildId, Artifact),
) {
    for (at, len) in reads {
        let at = (*at).min(SIZE);
        let expected = &model[at..(at + len).min(SIZE)];
        let mut bufs = [(); 3].map(|()| vec![0xee; expected.len()]);
        let [cached, any, blocking] = &mut bufs;
        let outcomes = [
            device.try_read_at(at as u64, cached),
            device.read_at(at as u64, any).await.map(|()| true),
            device.read_blocking(at as u64, blocking).map(|()| true),
        ];
        for (outcome, buf) in outcomes.iter().zip(&bufs) {
            match outcome {
                Ok(done) => assert!(!done || buf == expected, "wrong bytes at {at}"),
                Err(e) => assert_named(e, culprit),
            }
        }
    }
}

fn assert_named(e: &BlockError, (build, artifact): (BuildId, Artifact)) {
    let found = damaged(e).unwrap_or_else(|| panic!("{e}"));
    assert_eq!((found.build, found.artifact), (build, artifact), "{e}");
    let text = e.to_string();
    assert!(text.contains(&build.to_string()) && text.contains(artifact.file_name()), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_damaged_artifact_is_named_and_never_read_wrong(
        writes in prop::collection::vec((0..SIZE, 1usize..3 * BLOCK, 0u8..4), 1..6),
        reads in prop::collection::vec((0..SIZE, 0usize..6 * BLOCK), 1..12),
        // Of the build or its parent, in one of four artifacts, before or after it was opened.
        faults in prop::collection::vec((any::<bool>(), 0usize..4, fault(), any::<bool>()), 1..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (dir, store) = store();
            let mut model: Vec<u8> = (0..SIZE).map(|i| (i / BLOCK % 3) as u8).collect();
            let base = template(&store, &model).await;
            let below = builds::open(&store, &base).await;
            let overlay = Overlay::create(below.clone(), dir.path().join("overlay")).await.unwrap();
            for (at, len, byte) in writes {
                let end = (at + len).min(SIZE);
                model[at..end].fill(byte);
                overlay.write_at(at as u64, Bytes::from(vec![byte; end - at])).await.unwrap();
            }
            let (header, stored) = pause(&store, &below, &overlay).await;
            drop((below, overlay));
            for (parent, which, fault, opened) in faults {
                let build = if parent { base.build() } else { header.build() };
                let files = [Artifact::Rootfs, Artifact::RootfsHeader, Artifact::Metadata, Artifact::Checksums];
                let artifact = match files[which] {
                    // A pause may have had nothing to store.
                    Artifact::Rootfs if !parent && stored == 0 => Artifact::RootfsHeader,
                    artifact => artifact,
                };
                let before = if opened { Some(resume(&store, header.build()).await.unwrap()) } else { None };
                let path = store.path(build, artifact);
                let good = fault.apply(&path);
                if fs::read(&path).unwrap() == good {
                    continue;
                }
                if let Some(device) = &before {
                    read_all(device, &model, &reads, (build, artifact)).await;
                }
                drop(before);
                // A new process knows nothing of before.
                let later = LocalStore::open(store.root()).unwrap();
                match resume(&later, header.build()).await {
                    Ok(device) => read_all(&device, &model, &reads, (build, artifact)).await,
                    Err(e) => assert_named(&e, (build, artifact)),
                }
                // Whoever reads all of it finds out.
                let whole = later.open_artifact(build, artifact).and_then(|a| a.read_all());
                assert_named(&whole.unwrap_err().into(), (build, artifact));
                fs::write(&path, good).unwrap();
            }
        });
    }
}

#[tokio::test]
async fn a_build_without_sums_is_refused() {
    let (_dir, store) = store();
    let build = template(&store, &[1; BLOCK]).await.build();
    fs::remove_file(store.path(build, Artifact::Checksums)).unwrap();
    let error = resume(&store, build).await.unwrap_err();
    assert!(matches!(error, BlockError::Storage(StorageError::Unchecked(b)) if b == build), "{error}");
    assert!(error.to_string().contains("older nidus"), "{error}");
}
