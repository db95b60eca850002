//! The cache of layers: the index, and who is using what.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use nidus_sandbox::{Factory, RemoveError};
use nidus_storage::{BuildId, Builds, StorageError};
use parking_lot::Mutex;

use crate::PipelineError;
use crate::key::LayerKey;
use crate::layers::{Layer, LayerIndex, Listed, Pruned};

type Counts = Arc<Mutex<HashMap<BuildId, usize>>>;

/// Layers and their builds.
pub(crate) struct Cache {
    pub index: LayerIndex,
    store: Arc<Builds>,
    held: Counts,
    /// Held while a layer is looked up and while one is removed.
    steady: tokio::sync::Mutex<()>,
    turns: Mutex<HashMap<LayerKey, Weak<tokio::sync::Mutex<()>>>>,
}

/// The layers that one build uses: they are not removed before its end.
pub(crate) struct Held {
    counts: Counts,
    mine: Vec<BuildId>,
}

impl Held {
    fn add(&mut self, build: BuildId) {
        *self.counts.lock().entry(build).or_default() += 1;
        self.mine.push(build);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        for build in &self.mine {
            if let Some(count) = counts.get_mut(build) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(build);
                }
            }
        }
    }
}

impl Cache {
    pub fn new(index: LayerIndex, store: Arc<Builds>) -> Self {
        let (held, steady, turns) = (Counts::default(), Default::default(), Default::default());
        Self { index, store, held, steady, turns }
    }

    pub fn hold(&self) -> Held {
        Held { counts: self.held.clone(), mine: Vec::new() }
    }

    /// What those who make the layer of one key lock.
    pub fn turn(&self, key: LayerKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock();
        turns.retain(|_, t| t.strong_count() > 0);
        if let Some(turn) = turns.get(&key).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(key, Arc::downgrade(&turn));
        turn
    }

    /// The layer of a key whose build is there.
    pub async fn find(&self, key: LayerKey, held: &mut Held) -> Result<Option<Layer>, StorageError> {
        let _steady = self.steady.lock().await;
        let index = self.index.clone();
        let found = tokio::task::spawn_blocking(move || index.get(key)).await.ok().flatten();
        let Some(layer) = found else { return Ok(None) };
        if !self.store.exists(layer.build_id).await? {
            return Ok(None);
        }
        held.add(layer.build_id);
        Ok(Some(layer))
    }

    /// Keeps a build that others began with.
    pub async fn hold_build(&self, build: BuildId, held: &mut Held) -> Result<bool, StorageError> {
        let _steady = self.steady.lock().await;
        held.add(build);
        self.store.exists(build).await
    }

    pub async fn put(&self, key: LayerKey, layer: &Layer, held: &mut Held) -> Result<(), PipelineError> {
        held.add(layer.build_id);
        let (index, layer) = (self.index.clone(), layer.clone());
        let put = tokio::task::spawn_blocking(move || index.put(key, &layer)).await;
        let put = put.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        put.map_err(|e| PipelineError::io("note a layer", e))
    }

    async fn list(&self) -> Result<Vec<Listed>, PipelineError> {
        let index = self.index.clone();
        let list = tokio::task::spawn_blocking(move || index.list()).await;
        let list = list.unwrap_or_else(|e| Err(std::io::Error::other(e)));
        list.map_err(|e| PipelineError::io("read the index of layers", e))
    }

    pub async fn prune(&self, factory: &Factory, bytes: u64) -> Result<Pruned, PipelineError> {
        let mut pruned = Pruned::default();
        // A layer that another one reads goes after that: as long as there is progress, once more.
        loop {
            let before = pruned.layers;
            let list = self.list().await?;
            let mut builds = HashSet::new();
            let mut total: u64 =
                list.iter().filter(|l| builds.insert(l.layer.build_id)).map(|l| l.layer.bytes).sum();
            (pruned.left, pruned.left_bytes) = (list.len() as u64, total);
            for Listed { key, layer, .. } in list {
                if total <= bytes {
                    break;
                }
                if self.remove(factory, key, &layer).await? {
                    total = total.saturating_sub(layer.bytes);
                    pruned.layers += 1;
                    pruned.bytes += layer.bytes;
                    pruned.left -= 1;
                    pruned.left_bytes = pruned.left_bytes.saturating_sub(layer.bytes);
                }
            }
            if pruned.layers == before {
                return Ok(pruned);
            }
        }
    }

    /// Removes a layer that nobody needs; whether it is gone.
    async fn remove(&self, factory: &Factory, key: LayerKey, layer: &Layer) -> Result<bool, PipelineError> {
        let _steady = self.steady.lock().await;
        let build = layer.build_id;
        if self.held.lock().contains_key(&build) {
            return Ok(false);
        }
        if layer.owned {
            match factory.remove(build).await {
                Ok(()) | Err(RemoveError::Storage(StorageError::NotFound(_))) => {}
                Err(RemoveError::InUse { .. } | RemoveError::Running { .. }) => return Ok(false),
                Err(RemoveError::Storage(e)) => return Err(e.into()),
            }
        }
        self.index.remove(key).map_err(|e| PipelineError::io("forget a layer", e))?;
        Ok(true)
    }
}
