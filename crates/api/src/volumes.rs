//! Volumes over REST: who has which, and, with a volume's own token, the files in it.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{FromRequestParts, Path, State};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, TryStreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use nidus_proto::node::*;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::auth::{Team, bearer, refused};
use crate::input::Input;
use crate::model::stamp;
use crate::observe::Asked;
use crate::pause::conflict;
use crate::sandboxes::{shown, time};
use crate::store::VolumeRow;
use crate::{Api, ApiError};

type Shared = State<Arc<Api>>;

const MAX_NAME: usize = 128;

#[derive(Debug, Deserialize)]
pub struct NewVolume {
    name: String,
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) {
        return Err(ApiError::bad(format!(
            "Volume name '{}': a name has 1 to {MAX_NAME} letters, digits, '-', '_' and '.'",
            shown(name)
        )));
    }
    Ok(())
}

fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!("Volume '{}' was not found", shown(id)))
}

impl Api {
    async fn volume(&self, team: &Team, id: &str) -> Result<VolumeRow, ApiError> {
        let found = self.store.volume(id).await?.filter(|v| v.team_id == team.id);
        found.ok_or_else(|| missing(id))
    }

    fn with_token(&self, v: &VolumeRow) -> Value {
        let token = self.config.master_key.token(&token_text(&v.id));
        let mut answer = json!({ "volumeID": v.id, "name": v.name, "token": token });
        if let Some(domain) = &self.config.domain {
            answer["domain"] = json!(domain);
        }
        answer
    }
}

/// What the token of a volume signs.
fn token_text(id: &str) -> String {
    format!("volume {id}")
}

fn info(v: &VolumeRow) -> Option<VolumeInfo> {
    Some(VolumeInfo { volume_id: v.id.clone(), volume_type: "local".to_owned(), team_id: v.team_id.clone() })
}

pub async fn create(
    State(api): Shared,
    team: Team,
    Input(new): Input<NewVolume>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    check_name(&new.name)?;
    let added = api.store.add_volume(&team.id, &new.name).await?;
    let v = added.ok_or_else(|| conflict(format!("There is a volume '{}' already", shown(&new.name))))?;
    let made = api.nodes.volumes().create_volume(CreateVolumeRequest { volume: info(&v) }).await;
    if let Err(e) = made {
        api.store.delete_volume(&v.id).await?;
        return Err(e.into());
    }
    Ok((StatusCode::CREATED, Json(api.with_token(&v))))
}

pub async fn list(State(api): Shared, team: Team) -> Result<Json<Vec<Value>>, ApiError> {
    let all = api.store.volumes(&team.id).await?;
    Ok(Json(all.iter().map(|v| json!({ "volumeID": v.id, "name": v.name })).collect()))
}

pub async fn detail(State(api): Shared, team: Team, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(api.with_token(&api.volume(&team, &id).await?)))
}

pub async fn delete(State(api): Shared, team: Team, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let v = api.volume(&team, &id).await?;
    match api.nodes.volumes().delete_volume(DeleteVolumeRequest { volume: info(&v) }).await {
        Ok(_) => {}
        // Its files are gone already; so shall it be.
        Err(e) if e.code() == tonic::Code::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    api.store.delete_volume(&v.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A volume whose own token came with the request.
pub struct Content(VolumeRow);

impl FromRequestParts<Arc<Api>> for Content {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, ApiError> {
        let Path(id) = Path::<String>::from_request_parts(parts, api)
            .await
            .map_err(|_| ApiError::not_found("There is no such volume"))?;
        let token = bearer(parts).ok_or_else(|| refused("The volume's token is missing"))?;
        // As it is kept, so that one volume has one name.
        let id = Uuid::try_parse(&id).map(|id| id.to_string()).unwrap_or_default();
        if !api.config.master_key.is_token(&token_text(&id), token) {
            return Err(refused("The token is not one of this volume"));
        }
        api.store.volume(&id).await?.map(Self).ok_or_else(|| missing(&id))
    }
}

fn path(asked: &Asked) -> Result<String, ApiError> {
    asked.text("path").map(str::to_owned).ok_or_else(|| ApiError::bad("path is missing"))
}

fn number(asked: &Asked, name: &str) -> Result<Option<u32>, ApiError> {
    let Some(n) = asked.number(name)? else { return Ok(None) };
    u32::try_from(n).map(Some).map_err(|_| ApiError::bad(format!("{name} {n} is too large")))
}

fn force(asked: &Asked) -> Result<bool, ApiError> {
    Ok(asked.one_of("force", &["true", "false"])? == Some("true"))
}

fn entry_json(e: Option<EntryInfo>) -> Value {
    let e = e.unwrap_or_default();
    let at = |t| stamp(time(t));
    let kind = match e.r#type() {
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Unspecified => "unknown",
    };
    let mut answer = json!({
        "name": e.name, "type": kind, "path": e.path, "size": e.size, "mode": e.mode,
        "uid": e.uid, "gid": e.gid, "atime": at(e.accessed_time), "mtime": at(e.modified_time),
        "ctime": at(e.created_time),
    });
    if let Some(target) = e.symlink_target {
        answer["target"] = json!(target);
    }
    answer
}

pub async fn stat(State(api): Shared, Content(v): Content, asked: Asked) -> Result<Json<Value>, ApiError> {
    let request = StatPathRequest { volume: info(&v), path: path(&asked)?, follow_symlinks: false };
    Ok(Json(entry_json(api.nodes.volumes().stat_path(request).await?.into_inner().entry)))
}

#[derive(Debug, Deserialize)]
pub struct Change {
    uid: Option<u32>,
    gid: Option<u32>,
    mode: Option<u32>,
}

pub async fn update(
    State(api): Shared,
    Content(v): Content,
    asked: Asked,
    Input(change): Input<Change>,
) -> Result<Json<Value>, ApiError> {
    let Change { uid, gid, mode } = change;
    let request = UpdatePathRequest { volume: info(&v), path: path(&asked)?, mode, uid, gid };
    Ok(Json(entry_json(api.nodes.volumes().update_path(request).await?.into_inner().entry)))
}

pub async fn remove(State(api): Shared, Content(v): Content, asked: Asked) -> Result<StatusCode, ApiError> {
    let request = DeletePathRequest { volume: info(&v), path: path(&asked)? };
    api.nodes.volumes().delete_path(request).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn list_dir(
    State(api): Shared,
    Content(v): Content,
    asked: Asked,
) -> Result<Json<Vec<Value>>, ApiError> {
    let depth = number(&asked, "depth")?;
    if depth == Some(0) {
        return Err(ApiError::bad("depth '0' is not a number from 1 on"));
    }
    let request = ListDirRequest { volume: info(&v), path: path(&asked)?, depth: depth.unwrap_or(1) };
    let found = api.nodes.volumes().list_dir(request).await?.into_inner();
    Ok(Json(found.files.into_iter().map(|f| entry_json(f.entry)).collect()))
}

pub async fn make_dir(
    State(api): Shared,
    Content(v): Content,
    asked: Asked,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let request = CreateDirRequest {
        volume: info(&v),
        path: path(&asked)?,
        mode: number(&asked, "mode")?,
        uid: number(&asked, "uid")?,
        gid: number(&asked, "gid")?,
        create_parents: force(&asked)?,
    };
    let made = api.nodes.volumes().create_dir(request).await?.into_inner();
    Ok((StatusCode::CREATED, Json(entry_json(made.entry))))
}

/// The messages of an upload. A body that breaks off has no finish, so that nothing is kept of it.
fn messages(start: VolumeFileCreateStart, body: BodyDataStream) -> impl Stream<Item = CreateFileRequest> {
    use create_file_request::Message as M;
    let content = body.map_ok(|content| M::Content(VolumeFileCreateContent { content }));
    let whole = futures::stream::iter([Ok(M::Start(start))])
        .chain(content)
        .chain(futures::stream::iter([Ok(M::Finish(VolumeFileCreateFinish {}))]));
    whole
        .take_while(|m| futures::future::ready(m.is_ok()))
        .filter_map(|m| futures::future::ready(m.ok()))
        .map(|m| CreateFileRequest { message: Some(m) })
}

pub async fn put_file(
    State(api): Shared,
    Content(v): Content,
    asked: Asked,
    body: Body,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let start = VolumeFileCreateStart {
        volume: info(&v),
        path: path(&asked)?,
        mode: number(&asked, "mode")?,
        uid: number(&asked, "uid")?,
        gid: number(&asked, "gid")?,
        force: force(&asked)?,
    };
    let made = api.nodes.volumes().create_file(messages(start, body.into_data_stream())).await?;
    Ok((StatusCode::CREATED, Json(entry_json(made.into_inner().entry))))
}

pub async fn get_file(State(api): Shared, Content(v): Content, asked: Asked) -> Result<Response, ApiError> {
    use get_file_response::Message as M;
    let request = GetFileRequest { volume: info(&v), path: path(&asked)? };
    let mut pieces = api.nodes.volumes().get_file(request).await?.into_inner();
    let Some(M::Start(start)) = pieces.message().await?.and_then(|m| m.message) else {
        return Err(ApiError::new(StatusCode::BAD_GATEWAY, "the node did not say how long the file is"));
    };
    let content = pieces.filter_map(|piece| {
        futures::future::ready(match piece {
            Ok(GetFileResponse { message: Some(M::Content(c)) }) => Some(Ok(c.content)),
            Ok(_) => None,
            // Cut off before its length: the client sees that.
            Err(e) => Some(Err(std::io::Error::other(e.to_string()))),
        })
    });
    let mut response = Body::from_stream(content).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(start.size));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_that_breaks_off_has_no_finish() {
        use create_file_request::Message as M;
        let kinds = |body: Body| async move {
            messages(VolumeFileCreateStart::default(), body.into_data_stream())
                .map(|m| match m.message {
                    Some(M::Start(_)) => 's',
                    Some(M::Content(_)) => 'c',
                    Some(M::Finish(_)) => 'f',
                    None => '?',
                })
                .collect::<String>()
                .await
        };
        assert_eq!(kinds(Body::from("x")).await, "scf");
        assert_eq!(kinds(Body::empty()).await, "sf");
        let broken = futures::stream::iter([Ok("x"), Err(std::io::Error::other("reset"))]);
        assert_eq!(kinds(Body::from_stream(broken)).await, "sc");
    }

    #[test]
    fn names_are_checked() {
        assert!(check_name("my-volume_1.2").is_ok());
        for bad in ["", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert_eq!(check_name(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
