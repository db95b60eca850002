//! One artifact of a build in the object store, read at any offset.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::{AccessOrder, FrameMap, RemoteError, RemoteReader, order::Recorder, reader::Need};
use crate::{Artifact, BuildId, BuildPin, cache::FrameKey};

/// How many frames of one read are fetched at once.
const WIDTH: usize = 8;

/// An artifact whose frames are fetched when they are read. Clones share it.
///
/// What is read is what was uploaded, or an error that names build, artifact and frame.
#[derive(Debug, Clone)]
pub struct RemoteArtifact {
    shared: Arc<ArtifactShared>,
}

#[derive(Debug)]
struct ArtifactShared {
    reader: RemoteReader,
    build: BuildId,
    artifact: Artifact,
    map: Arc<FrameMap>,
    recorder: Recorder,
    /// Whether the store has an order, as far as is known here.
    has_order: AtomicBool,
    _pin: Arc<BuildPin>,
}

impl fmt::Display for RemoteArtifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.build(), self.artifact())
    }
}

impl RemoteArtifact {
    pub(super) fn new(
        reader: RemoteReader,
        build: BuildId,
        artifact: Artifact,
        map: Arc<FrameMap>,
        pin: Arc<BuildPin>,
    ) -> Self {
        let recorder = Recorder::new(map.count());
        let has_order = AtomicBool::new(false);
        let shared = ArtifactShared { reader, build, artifact, map, recorder, has_order, _pin: pin };
        Self { shared: Arc::new(shared) }
    }

    /// The build that it is of.
    pub fn build(&self) -> BuildId {
        self.shared.build
    }

    /// Which artifact of the build.
    pub fn artifact(&self) -> Artifact {
        self.shared.artifact
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.shared.map.size()
    }

    /// Where its content lies.
    pub fn map(&self) -> &FrameMap {
        &self.shared.map
    }

    /// Fills `buf` from `offset` if all of that is in memory or known to be zeros, and says whether
    /// it did. When it did not, the contents of `buf` are unspecified. Never blocks.
    pub fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> Result<bool, RemoteError> {
        self.check(offset, buf.len() as u64)?;
        for piece in self.pieces(offset, buf.len()) {
            let part = &mut buf[piece.of_buf];
            if self.map().is_zero(piece.frame) {
                part.fill(0);
            } else if let Some(content) = self.shared.reader.hot(&self.key(piece.frame)) {
                self.shared.recorder.note(piece.frame);
                part.copy_from_slice(&content[piece.of_frame]);
            } else {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills `buf` from `offset`.
    pub async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), RemoteError> {
        if self.try_read_at(offset, buf)? {
            return Ok(());
        }
        let pieces = self.pieces(offset, buf.len()).collect::<Vec<_>>();
        let mut contents = stream::iter(pieces)
            .map(|piece| {
                let artifact = self.clone();
                async move {
                    if artifact.map().is_zero(piece.frame) {
                        return Ok((piece, None));
                    }
                    artifact.shared.recorder.note(piece.frame);
                    let content = artifact.frame(piece.frame, Need::Now).await?;
                    Ok::<_, RemoteError>((piece, Some(content)))
                }
            })
            .buffer_unordered(WIDTH);
        while let Some((piece, content)) = contents.try_next().await? {
            let part = &mut buf[piece.of_buf];
            match content {
                Some(content) => part.copy_from_slice(&content[piece.of_frame]),
                None => part.fill(0),
            }
        }
        Ok(())
    }

    /// All of it. For artifacts that are small.
    pub async fn read_all(&self) -> Result<Vec<u8>, RemoteError> {
        let mut bytes = vec![0; self.size() as usize];
        self.read_at(0, &mut bytes).await?;
        Ok(bytes)
    }

    /// Fills `buf` from `offset` on this thread, which waits for the store if it must. For threads
    /// of their own: on a runtime's thread it would hold up all that runs there.
    pub fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> Result<(), RemoteError> {
        if self.try_read_at(offset, buf)? {
            return Ok(());
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let (artifact, len) = (self.clone(), buf.len());
        self.shared.reader.runtime().spawn(async move {
            let mut bytes = vec![0; len];
            let result = artifact.read_at(offset, &mut bytes).await;
            // There is always one who waits.
            let _ = sender.send(result.map(|()| bytes));
        });
        let bytes = receiver.recv().map_err(|_| RemoteError::Shutdown { action: "read an artifact" })??;
        buf.copy_from_slice(&bytes);
        Ok(())
    }

    /// Begins to fetch frames in this order, those that are not here, up to `limit` bytes of
    /// content. Ends when that is done or when the returned value is dropped.
    pub fn read_ahead(&self, order: &AccessOrder, limit: u64) -> ReadAhead {
        let (artifact, order) = (self.clone(), order.clone());
        let work = async move { artifact.fetch_ahead(&order, limit).await };
        ReadAhead(AbortOnDropHandle::new(self.shared.reader.runtime().spawn(work)))
    }

    /// The same in the order that the store has, if it has one.
    pub fn read_ahead_as_recorded(&self, limit: u64) -> ReadAhead {
        let artifact = self.clone();
        let work = async move {
            let store = artifact.shared.reader.store();
            match store.order(artifact.build(), artifact.artifact()).await {
                Ok(Some(order)) => {
                    artifact.shared.has_order.store(true, Relaxed);
                    artifact.fetch_ahead(&order, limit).await;
                }
                Ok(None) => {}
                // A hint alone is lost.
                Err(error) => warn!(%error, "cannot read ahead"),
            }
        };
        ReadAhead(AbortOnDropHandle::new(self.shared.reader.runtime().spawn(work)))
    }

    /// Gives the store the order of the reads so far, unless it has one.
    pub async fn save_recording(&self) -> Result<(), RemoteError> {
        let order = self.recording();
        if order.frames().is_empty() || self.shared.has_order.swap(true, Relaxed) {
            return Ok(());
        }
        self.shared.reader.store().put_order(self.build(), self.artifact(), &order).await
    }

    async fn fetch_ahead(&self, order: &AccessOrder, limit: u64) {
        let most = usize::try_from(limit / u64::from(self.map().frame_size())).unwrap_or(usize::MAX);
        let stored = order.frames().iter().copied().filter(|f| !self.map().is_zero(*f));
        let frames: Vec<u32> = stored.take(most).collect();
        let fetch = |frame| async move {
            if self.shared.reader.cache().contains(&self.key(frame)) {
                return;
            }
            // Whoever needs it will be told.
            if let Err(error) = self.frame(frame, Need::Ahead).await {
                debug!(%error, "cannot read ahead");
            }
        };
        let width = self.shared.reader.ahead_width();
        stream::iter(frames).map(fetch).buffer_unordered(width).collect::<()>().await;
    }

    /// The order in which frames were first read through this value and its clones.
    pub fn recording(&self) -> AccessOrder {
        self.shared.recorder.order()
    }

    pub(super) async fn frame(&self, frame: u32, need: Need) -> Result<Bytes, RemoteError> {
        self.shared.reader.frame(&self.shared.map, self.key(frame), need).await
    }

    fn key(&self, frame: u32) -> FrameKey {
        FrameKey { build: self.build(), artifact: self.shared.artifact, frame }
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), RemoteError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(RemoteError::OutOfRange {
                build: self.build(),
                artifact: self.shared.artifact,
                offset,
                len,
                size: self.size(),
            }),
        }
    }

    /// Which part of which frame goes where, for a range within the artifact.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = Piece> + use<> {
        let frame_size = u64::from(self.map().frame_size());
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = offset + done as u64;
            let start = (at % frame_size) as usize;
            let part = (frame_size as usize - start).min(len - done);
            let piece = Piece {
                frame: (at / frame_size) as u32,
                of_frame: start..start + part,
                of_buf: done..done + part,
            };
            done += part;
            Some(piece)
        })
    }
}

struct Piece {
    frame: u32,
    of_frame: Range<usize>,
    of_buf: Range<usize>,
}

/// A read-ahead under way; dropping it ends it.
#[derive(Debug)]
pub struct ReadAhead(AbortOnDropHandle<()>);

impl ReadAhead {
    /// Waits until all is fetched that could be.
    pub async fn done(self) {
        // It ends by itself, or with the runtime.
        let _ = self.0.await;
    }
}
