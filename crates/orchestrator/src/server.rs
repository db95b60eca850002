//! gRPC and HTTP on one port.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{get, put};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use nidus_proto::node::ServiceInfoStatus;
use nidus_proto::node::chunk_service_server::ChunkServiceServer;
use nidus_proto::node::garbage_service_server::GarbageServiceServer;
use nidus_proto::node::info_service_server::InfoServiceServer;
use nidus_proto::node::sandbox_service_server::SandboxServiceServer;
use nidus_proto::node::template_service_server::TemplateServiceServer;
use nidus_proto::node::volume_service_server::VolumeServiceServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::chunk_service::Chunks;
use crate::garbage::GarbageOf;
use crate::info::Info;
use crate::sandbox_service::Sandboxes;
use crate::template_service::Templates;
use crate::volume_service::VolumesOf;
use crate::{Node, edge, metrics};

/// Requests in flight get this long when the node ends.
const DRAIN_TIME: Duration = Duration::from_secs(10);

async fn health(State(node): State<Arc<Node>>) -> (StatusCode, Json<serde_json::Value>) {
    let status = node.status();
    let code = match status {
        ServiceInfoStatus::Healthy | ServiceInfoStatus::Draining => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let name = status.as_str_name().to_lowercase();
    (code, Json(serde_json::json!({ "status": name, "version": node.config.version })))
}

/// Takes the files of a build step, which were announced by `InitLayerFileUpload`.
async fn upload(
    State(node): State<Arc<Node>>,
    axum::extract::Path(ticket): axum::extract::Path<String>,
    body: axum::body::Body,
) -> (StatusCode, String) {
    use nidus_build::FilesError;
    match node.builds.pipeline.files().receive(&ticket, body.into_data_stream()).await {
        Ok(()) => (StatusCode::OK, String::new()),
        Err(e) => {
            let status = match &e {
                FilesError::NoTicket => StatusCode::FORBIDDEN,
                FilesError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
                FilesError::Broken(_) | FilesError::BadHash(_) | FilesError::Missing(_) => {
                    StatusCode::BAD_REQUEST
                }
                FilesError::Busy => StatusCode::SERVICE_UNAVAILABLE,
                FilesError::Io { .. } => {
                    tracing::error!("an upload was not stored: {e}");
                    return (StatusCode::INTERNAL_SERVER_ERROR, "the files could not be stored".into());
                }
            };
            (status, e.to_string())
        }
    }
}

/// Path of uploads, before the ticket.
pub(crate) const UPLOADS: &str = "/build-files/";

/// Serves until `stop`: gRPC over HTTP/2 (prior knowledge) and over any HTTP `GET /health`, uploads, and
/// the logs and figures of sandboxes.
///
/// # Errors
/// Never for a single connection.
pub async fn serve(listener: TcpListener, node: Arc<Node>, stop: CancellationToken) -> io::Result<()> {
    let (reporter, grpc_health) = tonic_health::server::health_reporter();
    reporter.set_serving::<SandboxServiceServer<Sandboxes>>().await;
    reporter.set_serving::<TemplateServiceServer<Templates>>().await;
    reporter.set_serving::<ChunkServiceServer<Chunks>>().await;
    reporter.set_serving::<VolumeServiceServer<VolumesOf>>().await;
    let router = Routes::new(SandboxServiceServer::new(Sandboxes(node.clone())))
        .add_service(TemplateServiceServer::new(Templates(node.clone())))
        .add_service(GarbageServiceServer::new(GarbageOf(node.clone())))
        .add_service(InfoServiceServer::new(Info(node.clone())))
        .add_service(ChunkServiceServer::new(Chunks(node.factory.store().clone())))
        .add_service(VolumeServiceServer::new(VolumesOf(node.network.exports.volumes().clone())))
        .add_service(grpc_health)
        .into_axum_router()
        .merge(
            axum::Router::new()
                .route("/health", get(health))
                // The store of files has a limit of its own.
                .route(&format!("{UPLOADS}{{ticket}}"), put(upload).layer(DefaultBodyLimit::disable()))
                .with_state(node.clone()),
        )
        .merge(edge::router(node.clone()));
    let metrics = tokio::spawn(metrics::run(node, stop.clone()));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(15));
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Some(Duration::from_secs(20)));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            a = listener.accept() => a,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: what is open must end first.
                tracing::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!("a connection to the node ended: {e}");
            }
        });
    }
    drop(listener);
    if let Err(e) = metrics.await {
        tracing::error!("the task that reads the sandboxes' figures broke off: {e}");
    }
    if tokio::time::timeout(DRAIN_TIME, graceful.shutdown()).await.is_err() {
        tracing::warn!("connections to the node were cut after {} s", DRAIN_TIME.as_secs());
    }
    Ok(())
}
