//! Uploading a build.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use object_store::path::Path;
use tokio::{sync::mpsc, task::JoinSet};
use tracing::{info, warn};

use super::{
    Manifest, RemoteError, RemoteStore, data_path, joined, manifest,
    manifest::{FrameMap, MAX_FRAME, MAX_OBJECT, MIN_FRAME},
    manifest_path, object_path, off_runtime,
    pack::{Cut, pack},
};
use crate::{ArtifactFile, BuildId, LocalStore, StorageError, error::blocking};

/// How a build is uploaded.
#[derive(Debug, Clone, Copy)]
pub struct UploadOptions {
    /// How many bytes of content one frame has: what a reader fetches at least. A power of two
    /// between 4 KiB and 4 MiB.
    pub frame_size: u32,
    /// An object is closed once it has this many bytes, of at most 32 MiB.
    pub object_size: u32,
    /// zstd's level.
    pub level: i32,
    /// How many objects are sent at once. As many objects, and two more, are held in memory.
    pub parallel: usize,
}

impl Default for UploadOptions {
    fn default() -> Self {
        Self { frame_size: 256 << 10, object_size: 8 << 20, level: 1, parallel: 4 }
    }
}

impl UploadOptions {
    /// The nearest options that are allowed.
    fn cut(self) -> Cut {
        Cut {
            frame_size: self.frame_size.clamp(MIN_FRAME, MAX_FRAME).next_power_of_two(),
            object_size: self.object_size.clamp(1, MAX_OBJECT / 2),
            level: self.level,
        }
    }
}

/// What an upload did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uploaded {
    /// How many objects were sent, without the manifest.
    pub sent: usize,
    /// How many bytes they have.
    pub bytes: u64,
    /// How many objects an earlier upload had left there.
    pub kept: usize,
}

impl RemoteStore {
    /// Uploads a published build. Does nothing if the store has it.
    ///
    /// What is uploaded is checked: a damaged artifact is an error, as it is when it is read here.
    /// The build is seen by nobody until all of it is there. If this fails or its process dies, the
    /// next call sends what is missing. The local build must not be removed meanwhile.
    pub async fn upload(
        &self,
        local: &LocalStore,
        build: BuildId,
        options: UploadOptions,
    ) -> Result<Uploaded, RemoteError> {
        if self.exists(build).await? {
            return Ok(Uploaded::default());
        }
        self.upload_again(local, build, options).await
    }

    /// Uploads a published build in the place of what the store has of it, if anything: until this
    /// is done the store has what it had. What the new one does not need of the old is left for a
    /// sweep, since others may be reading it.
    pub async fn upload_again(
        &self,
        local: &LocalStore,
        build: BuildId,
        options: UploadOptions,
    ) -> Result<Uploaded, RemoteError> {
        let store = local.clone();
        let files = blocking("open a build", move || store.open_build(build)).await?;
        // First of all, so that a sweep sees that someone is at work here.
        let marker = marker_path(build);
        self.put(&marker, Bytes::new()).await?;
        self.put_owner(build).await?;
        let mut upload = Upload {
            store: self,
            build,
            there: self.sizes(build).await?,
            sending: JoinSet::new(),
            parallel: options.parallel.max(1),
            done: Uploaded::default(),
        };
        let mut artifacts = BTreeMap::new();
        for file in files {
            let artifact = file.artifact();
            if let Some(map) = upload.artifact(file, options.cut()).await? {
                artifacts.insert(artifact, Arc::new(map));
            }
        }
        while upload.sent_one().await? {}
        let done = upload.done;

        let manifest = Arc::new(Manifest::new(build, artifacts));
        self.check_objects(&manifest).await?;
        let bytes = off_runtime("write a manifest", move || manifest.to_bytes()).await?;
        if bytes.len() > manifest::MAX_MANIFEST {
            let source = manifest::ManifestError::Invalid("the build has too many frames");
            return Err(RemoteError::Manifest { build, source });
        }
        self.put(&manifest_path(build), bytes.into()).await?;
        if let Err(error) = self.delete(&marker).await {
            warn!(%error, %build, "cannot remove the mark of an upload; a sweep will");
        }
        info!(%build, sent = done.sent, bytes = done.bytes, kept = done.kept, "uploaded");
        Ok(done)
    }

    /// The objects of a build, whether it is visible or not, and their sizes.
    async fn sizes(&self, build: BuildId) -> Result<HashMap<Path, u64>, RemoteError> {
        let objects = self.list_objects(data_path(build)).await?;
        Ok(objects.into_iter().map(|o| (o.location, o.size)).collect())
    }

    /// Whether all that the manifest names is there: a sweep may have come between.
    async fn check_objects(&self, manifest: &Manifest) -> Result<(), RemoteError> {
        let build = manifest.build();
        let there = self.sizes(build).await?;
        for (artifact, map) in manifest.artifacts() {
            for object in map.objects() {
                let path = object_path(build, artifact, &object.checksum);
                if there.get(&path) != Some(&u64::from(object.len)) {
                    return Err(RemoteError::Vanished { build, object: path.to_string() });
                }
            }
        }
        Ok(())
    }
}

/// The object that says that an upload is under way.
pub(super) fn marker_path(build: BuildId) -> Path {
    Path::from(format!("data/{build}/upload"))
}

/// An upload under way. Dropping it stops what is being sent.
struct Upload<'a> {
    store: &'a RemoteStore,
    build: BuildId,
    there: HashMap<Path, u64>,
    sending: JoinSet<Result<(), RemoteError>>,
    parallel: usize,
    done: Uploaded,
}

impl Upload<'_> {
    /// Sends the objects of an artifact; the last ones may still be on their way afterwards.
    async fn artifact(&mut self, file: ArtifactFile, cut: Cut) -> Result<Option<FrameMap>, RemoteError> {
        let artifact = file.artifact();
        let (objects, mut packed) = mpsc::channel(1);
        let packing = tokio::task::spawn_blocking(move || {
            pack(&file, cut, |object| objects.blocking_send(object).is_ok())
        });
        // On failure the receiver is dropped, which ends the packing.
        while let Some(object) = packed.recv().await {
            self.send(object_path(self.build, artifact, &object.checksum), object.bytes.into()).await?;
        }
        let map: Result<_, StorageError> = joined("pack an artifact", packing.await)?;
        Ok(map?)
    }

    async fn send(&mut self, path: Path, bytes: Bytes) -> Result<(), RemoteError> {
        let len = bytes.len() as u64;
        if self.there.get(&path) == Some(&len) {
            self.done.kept += 1;
            return Ok(());
        }
        while self.sending.len() >= self.parallel {
            self.sent_one().await?;
        }
        // A piece that occurs twice is sent once.
        self.there.insert(path.clone(), len);
        let store = self.store.clone();
        self.sending.spawn(async move { store.put(&path, bytes).await });
        self.done.sent += 1;
        self.done.bytes += len;
        Ok(())
    }

    /// Waits for one object to be sent; `false` if none was on its way.
    async fn sent_one(&mut self) -> Result<bool, RemoteError> {
        match self.sending.join_next().await {
            None => Ok(false),
            Some(result) => joined("send an object", result)?.map(|()| true),
        }
    }
}
