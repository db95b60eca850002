//! Files that clients upload for COPY: archives under the hash that the client gives them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

/// How long an upload may begin after it was announced.
const TICKET_TIME: Duration = Duration::from_secs(3600);
/// Most uploads that are announced at once.
const MAX_TICKETS: usize = 10_000;

/// Why files cannot be had or taken.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Not a hash, or a scope that is none.
    #[error("'{0}' is not the hash of files")]
    BadHash(String),
    /// The step's files were never uploaded.
    #[error("the files of this step ({0}) were not uploaded")]
    Missing(String),
    /// No such upload was announced, or its time is over.
    #[error("this upload was not announced, or its time is over")]
    NoTicket,
    /// Too many uploads.
    #[error("too many uploads are announced")]
    Busy,
    /// Larger than may be.
    #[error("the files have more than {0} MiB")]
    TooLarge(u64),
    /// The client went away.
    #[error("the upload broke off: {0}")]
    Broken(String),
    /// A file operation.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was being done, and to what.
        action: String,
        /// The cause.
        source: std::io::Error,
    },
}

fn io(action: &str, path: &Path, source: std::io::Error) -> FilesError {
    FilesError::Io { action: format!("{action} {}", path.display()), source }
}

/// An upload that was announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Whether the files are here already.
    pub present: bool,
    /// What the upload is to name: only who announced it knows it.
    pub ticket: String,
}

struct Ticket {
    path: PathBuf,
    until: Instant,
}

/// Uploaded archives, by scope (a team) and hash: what one team uploaded no other one finds.
#[derive(Clone)]
pub struct FileStore {
    dir: PathBuf,
    max_bytes: u64,
    tickets: Arc<Mutex<HashMap<String, Ticket>>>,
}

impl FileStore {
    /// In the directory `dir`, which is made; archives may have `max_bytes`. What was left of uploads that were cut
    /// off is removed.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub fn open(dir: PathBuf, max_bytes: u64) -> Result<Self, FilesError> {
        std::fs::create_dir_all(&dir).map_err(|e| io("make", &dir, e))?;
        for scope in std::fs::read_dir(&dir).map_err(|e| io("read", &dir, e))?.flatten() {
            for file in std::fs::read_dir(scope.path()).into_iter().flatten().flatten() {
                if file.file_name().to_string_lossy().starts_with(".part-") {
                    std::fs::remove_file(file.path()).map_err(|e| io("remove", &file.path(), e))?;
                }
            }
        }
        Ok(Self { dir, max_bytes, tickets: Arc::default() })
    }

    fn path(&self, scope: &str, hash: &str) -> Result<PathBuf, FilesError> {
        let plain = |t: &str| {
            (1..=128).contains(&t.len())
                && t.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let bad = |t: &str| FilesError::BadHash(t.chars().filter(|c| !c.is_control()).take(80).collect());
        if !plain(hash) {
            return Err(bad(hash));
        }
        let scope = if scope.is_empty() { "none" } else { scope };
        if !plain(scope) {
            return Err(bad(scope));
        }
        Ok(self.dir.join(scope).join(hash))
    }

    /// Announces an upload.
    ///
    /// # Errors
    /// When the hash is none.
    pub async fn begin(&self, scope: &str, hash: &str) -> Result<Upload, FilesError> {
        let path = self.path(scope, hash)?;
        let present = tokio::fs::try_exists(&path).await.map_err(|e| io("look for", &path, e))?;
        let (now, ticket) = (Instant::now(), Uuid::new_v4().simple().to_string());
        let mut tickets = self.tickets.lock();
        tickets.retain(|_, t| t.until > now);
        if tickets.len() >= MAX_TICKETS {
            return Err(FilesError::Busy);
        }
        tickets.insert(ticket.clone(), Ticket { path, until: now + TICKET_TIME });
        Ok(Upload { present, ticket })
    }

    /// Takes an upload that was announced.
    ///
    /// # Errors
    /// When it was not, when it is too large or breaks off: nothing of it is left then.
    pub async fn receive<E: std::fmt::Display>(
        &self,
        ticket: &str,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<(), FilesError> {
        let path = {
            let tickets = self.tickets.lock();
            let known = tickets.get(ticket).filter(|t| t.until > Instant::now());
            known.ok_or(FilesError::NoTicket)?.path.clone()
        };
        let dir = path.parent().unwrap_or(&self.dir).to_owned();
        tokio::fs::create_dir_all(&dir).await.map_err(|e| io("make", &dir, e))?;
        let part = tempfile::Builder::new().prefix(".part-").tempfile_in(&dir);
        let (file, part) = part.map_err(|e| io("make a file in", &dir, e))?.into_parts();
        let mut file = tokio::fs::File::from_std(file);
        let mut left = self.max_bytes;
        let mut body = std::pin::pin!(body);
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|e| FilesError::Broken(e.to_string()))?;
            left = left.checked_sub(piece.len() as u64).ok_or(FilesError::TooLarge(self.max_bytes >> 20))?;
            file.write_all(&piece).await.map_err(|e| io("write", &part, e))?;
        }
        file.sync_all().await.map_err(|e| io("write", &part, e))?;
        part.persist(&path).map_err(|e| io("keep", &path, e.error))?;
        self.tickets.lock().remove(ticket);
        Ok(())
    }

    /// Where the archive of a hash is.
    ///
    /// # Errors
    /// When it was not uploaded.
    pub(crate) async fn get(&self, scope: &str, hash: &str) -> Result<PathBuf, FilesError> {
        let path = self.path(scope, hash)?;
        match tokio::fs::try_exists(&path).await.map_err(|e| io("look for", &path, e))? {
            true => Ok(path),
            false => Err(FilesError::Missing(hash.to_owned())),
        }
    }

    /// Removes archives that nobody uploaded or asked for since `age`, and returns the bytes.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn remove_older(&self, age: Duration) -> Result<u64, FilesError> {
        let mut bytes = 0;
        for scope in std::fs::read_dir(&self.dir).map_err(|e| io("read", &self.dir, e))?.flatten() {
            for file in std::fs::read_dir(scope.path()).into_iter().flatten().flatten() {
                let path = file.path();
                let Ok(meta) = file.metadata() else { continue };
                let old = meta.modified().ok().and_then(|m| m.elapsed().ok()).is_some_and(|a| a >= age);
                if old && meta.is_file() {
                    std::fs::remove_file(&path).map_err(|e| io("remove", &path, e))?;
                    bytes += meta.len();
                }
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(pieces: &[&'static str]) -> impl Stream<Item = Result<Bytes, String>> {
        futures::stream::iter(pieces.iter().map(|p| Ok(Bytes::from_static(p.as_bytes()))).collect::<Vec<_>>())
    }

    #[tokio::test]
    async fn uploads_are_announced_bounded_and_found_by_their_team() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open(dir.path().join("files"), 10).unwrap();
        let first = store.begin("team", "abc").await.unwrap();
        assert!(!first.present);
        assert!(matches!(store.receive("no", body(&["x"])).await, Err(FilesError::NoTicket)));
        let large = store.receive(&first.ticket, body(&["12345", "123456"])).await;
        assert!(matches!(large, Err(FilesError::TooLarge(_))));
        let broken = futures::stream::iter([Ok(Bytes::from_static(b"x")), Err("gone")]);
        assert!(matches!(store.receive(&first.ticket, broken).await, Err(FilesError::Broken(_))));
        assert!(matches!(store.get("team", "abc").await, Err(FilesError::Missing(_))));
        let left = std::fs::read_dir(dir.path().join("files/team")).unwrap().count();
        assert_eq!(left, 0);
        store.receive(&first.ticket, body(&["hello"])).await.unwrap();
        assert!(matches!(store.receive(&first.ticket, body(&["x"])).await, Err(FilesError::NoTicket)));
        assert!(store.begin("team", "abc").await.unwrap().present);
        assert!(!store.begin("other", "abc").await.unwrap().present);
        assert_eq!(std::fs::read(store.get("team", "abc").await.unwrap()).unwrap(), b"hello");
        for bad in ["", "../x", "a/b", "a b", &"x".repeat(200)] {
            assert!(matches!(store.begin("team", bad).await, Err(FilesError::BadHash(_))), "{bad}");
        }
        assert_eq!(store.remove_older(Duration::from_secs(60)).unwrap(), 0);
        assert_eq!(store.remove_older(Duration::ZERO).unwrap(), 5);
    }
}
