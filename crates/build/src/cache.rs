//! The cache of layers: the index, and who is using what.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use nidus_sandbox::{Factory, RemoveError, Use};
use nidus_storage::{BuildId, StorageError};
use parking_lot::Mutex;

use crate::PipelineError;
use crate::key::LayerKey;
use crate::layers::{Layer, LayerIndex, Listed, Pruned};

/// Layers and their builds.
pub(crate) struct Cache {
    pub index: LayerIndex,
    factory: Arc<Factory>,
    turns: Mutex<HashMap<LayerKey, Weak<tokio::sync::Mutex<()>>>>,
}

impl Cache {
    pub fn new(index: LayerIndex, factory: Arc<Factory>) -> Self {
        Self { index, factory, turns: Default::default() }
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

    /// The layer of a key whose build is there; it is `held` from then on.
    pub async fn find(&self, key: LayerKey, held: &mut Vec<Use>) -> Result<Option<Layer>, StorageError> {
        let index = self.index.clone();
        let found = tokio::task::spawn_blocking(move || index.get(key)).await.ok().flatten();
        let Some(layer) = found else { return Ok(None) };
        let here = self.hold(layer.build_id, held).await?;
        Ok(here.then_some(layer))
    }

    /// Keeps a build from being removed; whether it is there.
    pub async fn hold(&self, build: BuildId, held: &mut Vec<Use>) -> Result<bool, StorageError> {
        let hold = self.factory.lineages().hold(build).await?;
        let here = hold.is_some();
        held.extend(hold);
        Ok(here)
    }

    pub async fn put(&self, key: LayerKey, layer: &Layer, held: &mut Vec<Use>) -> Result<(), PipelineError> {
        self.hold(layer.build_id, held).await?;
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

    pub async fn prune(&self, bytes: u64) -> Result<Pruned, PipelineError> {
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
                if self.remove(key, &layer).await? {
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
    async fn remove(&self, key: LayerKey, layer: &Layer) -> Result<bool, PipelineError> {
        // Nobody finds or makes it meanwhile; whose turn it is needs it.
        let turn = self.turn(key);
        let Ok(_turn) = turn.try_lock() else { return Ok(false) };
        if layer.owned {
            match self.factory.remove(layer.build_id).await {
                Ok(()) | Err(RemoveError::Storage(StorageError::NotFound(_))) => {}
                Err(RemoveError::InUse { .. } | RemoveError::Running { .. }) => return Ok(false),
                Err(RemoveError::Storage(e)) => return Err(e.into()),
            }
        }
        self.index.remove(key).map_err(|e| PipelineError::io("forget a layer", e))?;
        Ok(true)
    }
}
