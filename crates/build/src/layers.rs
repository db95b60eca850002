//! The index of layers: which build a key stands for. One small file for each, on this node's disk.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nidus_storage::BuildId;
use nidus_template::{Context, Start};
use serde::{Deserialize, Serialize};

use crate::key::LayerKey;

/// A layer, as the index has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The build that has its state.
    pub build_id: BuildId,
    /// Whether that build is this layer's alone, rather than a template's or an earlier layer's.
    pub owned: bool,
    /// What later steps find.
    pub context: Context,
    /// Variables that only later steps find.
    #[serde(default)]
    pub args: std::collections::BTreeMap<String, String>,
    /// What was started.
    #[serde(default)]
    pub start: Start,
    /// What it is, for people.
    pub what: String,
    /// Bytes that it stores, as far as is known.
    pub bytes: u64,
}

/// What [`LayerIndex`] knows of one layer besides.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its key.
    pub key: LayerKey,
    /// The layer.
    pub layer: Layer,
    /// When it was used last.
    pub used: SystemTime,
}

/// What was removed to make room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Layers that are forgotten.
    pub layers: u64,
    /// Bytes that are free again.
    pub bytes: u64,
    /// Layers that are left, and their bytes.
    pub left: u64,
    /// Their bytes.
    pub left_bytes: u64,
}

/// Layers by key. Clones share the directory. All methods block for a few system calls.
#[derive(Debug, Clone)]
pub struct LayerIndex {
    dir: PathBuf,
}

impl LayerIndex {
    /// The index in the directory `dir`, which is made.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    fn path(&self, key: LayerKey) -> PathBuf {
        self.dir.join(format!("{key}.json"))
    }

    /// The layer of this key; this is a use of it.
    pub fn get(&self, key: LayerKey) -> Option<Layer> {
        let path = self.path(key);
        let layer = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        if let Ok(file) = fs::File::options().append(true).open(&path)
            && let Err(e) = file.set_modified(SystemTime::now())
        {
            tracing::warn!("the use of a layer was not noted: {e}");
        }
        Some(layer)
    }

    /// Notes a layer, in place of one that had the key.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, key: LayerKey, layer: &Layer) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        serde_json::to_writer(&mut file, layer)?;
        file.persist(self.path(key)).map(drop).map_err(|e| e.error)
    }

    /// Forgets a layer.
    ///
    /// # Errors
    /// When that cannot be done.
    pub fn remove(&self, key: LayerKey) -> io::Result<()> {
        match fs::remove_file(self.path(key)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// All layers, those that were used last at the end.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> io::Result<Vec<Listed>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let key = path.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse().ok());
            if let (Some(key), Ok((layer, used))) = (key, read(&path)) {
                all.push(Listed { key, layer, used });
            }
        }
        all.sort_by_key(|l| (l.used, l.key));
        Ok(all)
    }

    /// The builds that layers are.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn builds(&self) -> io::Result<HashSet<BuildId>> {
        Ok(self.list()?.into_iter().map(|l| l.layer.build_id).collect())
    }
}

fn read(path: &Path) -> io::Result<(Layer, SystemTime)> {
    let layer = serde_json::from_slice(&fs::read(path)?)?;
    Ok((layer, fs::metadata(path)?.modified()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(what: &str) -> Layer {
        Layer {
            build_id: BuildId::random(),
            owned: true,
            context: Context::default(),
            args: Default::default(),
            start: Start::default(),
            what: what.into(),
            bytes: 7,
        }
    }

    #[test]
    fn layers_are_found_by_key_and_listed_by_use() {
        let dir = tempfile::tempdir().unwrap();
        let index = LayerIndex::open(dir.path().join("layers")).unwrap();
        let key = |n: u32| LayerKey::of("test", &n);
        assert_ne!(key(1), key(2));
        assert_eq!(key(1).to_string().parse(), Ok(key(1)));
        for n in 1..=3 {
            index.put(key(n), &layer(&n.to_string())).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        std::fs::write(dir.path().join("layers/junk.json"), "{").unwrap();
        assert_eq!(index.get(key(1)).unwrap().what, "1");
        let order: Vec<String> = index.list().unwrap().into_iter().map(|l| l.layer.what).collect();
        assert_eq!(order, ["2", "3", "1"]);
        index.remove(key(2)).unwrap();
        index.remove(key(2)).unwrap();
        assert!(index.get(key(2)).is_none());
        assert_eq!(index.builds().unwrap().len(), 2);
    }
}
