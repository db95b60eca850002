//! Routes and the listener.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{delete, get, patch, post, put};
use http::StatusCode;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::auth::Team;
use crate::{
    Api, ApiError, admin, checkpoint, expiry, garbage, keys, network, observe, openapi, pause, sandboxes,
    secrets, tags, template_builds, templates, volumes,
};

const MAX_BODY_BYTES: usize = 1 << 20;
/// A client's connection without a request for this long is closed. The SDKs keep theirs for up to
/// 300 s and must be the first to close.
const IDLE_TIME: Duration = Duration::from_secs(310);
/// Requests in flight get this long when the API ends.
const DRAIN_TIME: Duration = Duration::from_secs(10);

async fn health(State(api): State<Arc<Api>>) -> Result<StatusCode, ApiError> {
    let not = |text| Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, text));
    if !api.is_ready() {
        return not("Not ready yet: the base template is being prepared");
    }
    if !api.nodes.is_healthy().await {
        return not("No node takes sandboxes");
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn teams(team: Team) -> axum::Json<serde_json::Value> {
    axum::Json(serde_json::json!([{ "teamID": team.id, "name": team.name, "apiKey": "", "isDefault": true }]))
}

async fn nothing_there(uri: http::Uri) -> ApiError {
    let path: String = uri.path().chars().take(100).collect();
    ApiError::not_found(format!("There is no {path}"))
}

async fn wrong_method(method: http::Method, uri: http::Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not for {}", uri.path()))
}

fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/openapi.json", get(openapi::document))
        .route("/teams", get(teams))
        .route("/sandboxes", get(sandboxes::list_v1).post(sandboxes::create_v1))
        .route("/v2/sandboxes", get(sandboxes::list_v2).post(sandboxes::create_v2))
        .route("/sandboxes/{id}", get(sandboxes::detail).delete(pause::kill))
        .route("/sandboxes/{id}/timeout", post(sandboxes::set_timeout))
        .route("/sandboxes/{id}/refreshes", post(sandboxes::refresh))
        .route("/sandboxes/{id}/pause", post(pause::pause))
        .route("/sandboxes/{id}/resume", post(pause::resume))
        .route("/sandboxes/{id}/connect", post(pause::connect))
        .route("/v2/sandboxes/{id}/connect", post(pause::connect_v2))
        .route("/sandboxes/{id}/snapshots", post(checkpoint::snapshot))
        .route("/sandboxes/{id}/fork", post(checkpoint::fork))
        .route("/sandboxes/{id}/network", put(network::update))
        .route("/sandboxes/metrics", get(observe::metrics_of_many))
        .route("/sandboxes/{id}/metrics", get(observe::metrics))
        .route("/sandboxes/{id}/logs", get(observe::logs_v1))
        .route("/v2/sandboxes/{id}/logs", get(observe::logs_v2))
        .route("/teams/{id}/metrics", get(observe::team_metrics))
        .route("/teams/{id}/metrics/max", get(observe::team_metrics_max))
        .route("/snapshots", get(checkpoint::list))
        .route("/admin/garbage", get(garbage::collect).delete(garbage::collect))
        .route("/templates", get(templates::list).post(template_builds::request_v1))
        .route("/v2/templates", get(templates::list).post(template_builds::request_v2))
        .route("/v3/templates", post(template_builds::request_v3))
        .route(
            "/templates/{id}",
            get(templates::detail)
                .delete(templates::delete)
                .patch(templates::update)
                .post(template_builds::request_v1),
        )
        .route("/v2/templates/{id}", axum::routing::patch(templates::update))
        .route("/templates/{id}/files/{hash}", get(template_builds::files))
        // The node has a limit of its own.
        .route("/build-files/{ticket}", put(template_builds::upload).layer(DefaultBodyLimit::disable()))
        .route("/templates/tags", post(tags::assign).delete(tags::remove))
        .route("/templates/{id}/tags", get(tags::list))
        .route("/templates/{id}/tags/count", get(tags::count))
        .route("/templates/{id}/tags/exists", get(tags::exists))
        .route("/templates/{id}/tags/groups", get(tags::groups))
        .route("/templates/{id}/tags/{tag}/assignments", get(tags::assignments))
        .route("/default-templates", get(templates::defaults))
        .route("/admin/layers/prune", post(template_builds::prune))
        .route("/templates/aliases/{alias}", get(templates::alias))
        .route("/v2/templates/{id}/builds/{build}", post(template_builds::start_build))
        .route("/templates/{id}/builds/{build}/status", get(templates::build_status))
        .route("/templates/{id}/builds/{build}/logs", get(templates::build_logs))
        .route("/api-keys", get(keys::list).post(keys::create))
        .route("/api-keys/{id}", patch(keys::rename).delete(keys::delete))
        .route("/access-tokens", post(keys::create_token))
        .route("/access-tokens/{id}", delete(keys::delete_token))
        .route("/secrets", get(secrets::list).post(secrets::create))
        .route("/secrets/{id}", get(secrets::detail).post(secrets::update).delete(secrets::delete))
        .route("/volumes", get(volumes::list).post(volumes::create))
        .route("/volumes/{id}", get(volumes::detail).delete(volumes::delete))
        .route("/volumecontent/{id}/path", get(volumes::stat).patch(volumes::update).delete(volumes::remove))
        .route("/volumecontent/{id}/dir", get(volumes::list_dir).post(volumes::make_dir))
        // The node has a limit of its own.
        .route(
            "/volumecontent/{id}/file",
            get(volumes::get_file).put(volumes::put_file).layer(DefaultBodyLimit::disable()),
        )
        .route("/nodes", get(admin::nodes))
        .route("/nodes/{id}", get(admin::node).post(admin::set_status))
        .route("/admin/sandboxes/running-counts", get(admin::running_counts))
        .route("/admin/teams/{team}/sandboxes/kill", post(admin::kill_all))
        .route("/admin/teams/{team}/builds/cancel", post(admin::cancel_builds))
        .route("/admin/teams/{team}/api-keys", post(keys::admin_create))
        .route("/admin/teams/{team}/api-keys/{key}", delete(keys::admin_delete))
        .fallback(nothing_there)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(api)
}

/// Serves HTTP/1.1 and HTTP/2 (prior knowledge) until `stop`.
///
/// # Errors
/// Never for a single connection.
pub async fn serve(listener: TcpListener, api: Arc<Api>, stop: CancellationToken) -> io::Result<()> {
    let expiry = tokio::spawn(expiry::run(api.clone(), stop.clone()));
    let router = router(api);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIME);
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
                tracing::debug!("a connection to the API ended: {e}");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN_TIME, graceful.shutdown()).await.is_err() {
        tracing::warn!("connections to the API were cut after {} s", DRAIN_TIME.as_secs());
    }
    if let Err(e) = expiry.await {
        tracing::error!("the task that pauses sandboxes at their end broke off: {e}");
    }
    Ok(())
}
