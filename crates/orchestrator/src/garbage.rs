//! `GarbageService`: lists builds that nothing refers to, and deletes them if that is asked for.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nidus_build::LayerIndex;
use nidus_proto::node::garbage_service_server::GarbageService;
use nidus_proto::node::{
    CollectGarbageRequest, CollectGarbageResponse, Garbage, PruneLayersRequest, PruneLayersResponse,
};
use nidus_sandbox::{GarbageError, Lineages, RemoveError};
use nidus_storage::BuildId;
use tonic::{Request, Response, Status};

use crate::Node;
use crate::template_service::build_id;

/// The service over a node.
pub(crate) struct GarbageOf(pub Arc<Node>);

/// Finds garbage among the builds of `lineages`, and has `remove` delete it if the request says so.
///
/// # Errors
/// When the request or the builds cannot be read. What cannot be deleted is named in the answer.
pub async fn collect<F: Future<Output = Result<(), RemoveError>>>(
    lineages: &Lineages,
    request: &CollectGarbageRequest,
    remove: impl Fn(BuildId) -> F,
) -> Result<CollectGarbageResponse, Status> {
    let bad = |what: &str| Status::invalid_argument(format!("{what} is missing or out of range"));
    let kept: HashSet<BuildId> =
        request.kept_build_ids.iter().map(|id| build_id(id)).collect::<Result<_, _>>()?;
    let at: SystemTime =
        request.kept_at.and_then(|t| t.try_into().ok()).ok_or_else(|| bad("the time kept_at"))?;
    let grace: Duration =
        request.grace.and_then(|d| d.try_into().ok()).ok_or_else(|| bad("the time of grace"))?;
    let internal = |e: GarbageError| match e {
        GarbageError::Unreadable(_) => Status::failed_precondition(e.to_string()),
        GarbageError::Storage(_) => Status::internal(e.to_string()),
    };
    let found = lineages.garbage(kept, at, grace).await.map_err(internal)?;
    let mut garbage = Vec::with_capacity(found.len());
    for g in &found {
        let removed = if request.delete && g.is_build { remove(g.build).await } else { Ok(()) };
        garbage.push(Garbage {
            build_id: g.build.to_string(),
            disk_bytes: g.disk,
            remote_bytes: g.remote,
            age: g.age.and_then(|a| a.try_into().ok()),
            why: g.why.clone(),
            error: removed.err().map(|e| e.to_string()),
        });
    }
    if request.delete {
        let swept = lineages.store().sweep(grace, false).await;
        swept.map_err(|e| Status::internal(format!("what is left over was not removed: {e}")))?;
    }
    Ok(CollectGarbageResponse { garbage })
}

/// Layers of template builds are no garbage: they have a limit of their own.
///
/// # Errors
/// When the index cannot be read.
pub async fn keep_layers(request: &mut CollectGarbageRequest, layers: &LayerIndex) -> Result<(), Status> {
    let layers = layers.clone();
    let builds = tokio::task::spawn_blocking(move || layers.builds()).await;
    let builds = builds.unwrap_or_else(|e| Err(std::io::Error::other(e)));
    let builds = builds.map_err(|e| Status::internal(format!("cannot read the index of layers: {e}")))?;
    request.kept_build_ids.extend(builds.iter().map(BuildId::to_string));
    Ok(())
}

#[tonic::async_trait]
impl GarbageService for GarbageOf {
    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Result<Response<CollectGarbageResponse>, Status> {
        let (factory, mut request) = (self.0.factory.clone(), request.into_inner());
        keep_layers(&mut request, self.0.builds.pipeline.layers()).await?;
        // A task of its own: deleting goes on when the caller goes away.
        let done = tokio::spawn(async move {
            let remove = |build| {
                let factory = factory.clone();
                async move { factory.remove(build).await }
            };
            collect(factory.lineages(), &request, remove).await
        });
        let lost = |e| Status::internal(format!("the collection did not finish: {e}"));
        done.await.map_err(lost)?.map(Response::new)
    }

    async fn prune_layers(
        &self,
        request: Request<PruneLayersRequest>,
    ) -> Result<Response<PruneLayersResponse>, Status> {
        let pruned = self.0.builds.pipeline.prune(request.into_inner().max_bytes).await;
        let pruned = pruned.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(PruneLayersResponse {
            removed_layers: pruned.layers,
            removed_bytes: pruned.bytes,
            left_layers: pruned.left,
            left_bytes: pruned.left_bytes,
        }))
    }
}
