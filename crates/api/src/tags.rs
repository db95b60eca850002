//! Names with tags, and tags over REST.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth::Team;
use crate::input::Input;
use crate::store::{BuildRow, BuildStatus, TagRow, TemplateRow};
use crate::{Api, ApiError};

/// The tag of a name without one. Clients may call it `latest`.
pub const DEFAULT_TAG: &str = "default";
const MAX_TAG: usize = 128;

type Shared = State<Arc<Api>>;

/// A template's name or id, and its tag.
pub fn split(name: &str) -> (&str, &str) {
    match name.split_once(':') {
        None | Some((_, "latest")) => (name.split(':').next().unwrap_or(name), DEFAULT_TAG),
        Some((name, tag)) => (name, tag),
    }
}

/// A tag as it is kept.
pub fn check_tag(tag: &str) -> Result<String, ApiError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if tag.is_empty() || tag.len() > MAX_TAG || !tag.bytes().all(plain) {
        let shown: String = tag.chars().filter(|c| !c.is_control()).take(100).collect();
        return Err(ApiError::bad(format!(
            "Tag '{shown}': a tag has 1 to {MAX_TAG} letters, digits, '-', '_' and '.'"
        )));
    }
    let tag = tag.to_ascii_lowercase();
    Ok(if tag == "latest" { DEFAULT_TAG.to_owned() } else { tag })
}

impl Api {
    /// The template of a name or id, and the build that its tag stands for, if that can be used.
    pub(crate) async fn named(
        &self,
        name: &str,
    ) -> Result<Option<(TemplateRow, Option<BuildRow>)>, ApiError> {
        let (plain, tag) = split(name);
        let Some(template) = self.store.template(plain).await? else { return Ok(None) };
        let tags = self.store.tags(&template.id).await?;
        let builds = self.store.builds(&template.id).await?;
        let mut ready = builds.into_iter().filter(|b| b.status == BuildStatus::Ready);
        let build = match tags.iter().find(|t| t.tag.eq_ignore_ascii_case(tag)) {
            Some(t) => ready.find(|b| b.id == t.build_id),
            // Snapshots and builds of older versions have none.
            None if tag == DEFAULT_TAG => ready.next(),
            None => None,
        };
        Ok(Some((template, build)))
    }
}

fn row(t: &TagRow) -> Value {
    json!({
        "tag": t.tag,
        "buildID": t.build_id,
        "createdAt": t.created_at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
    })
}

pub async fn list(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let t = api.seen(&team, &id).await?;
    Ok(Json(api.store.tags(&t.id).await?.iter().map(row).collect()))
}

pub async fn count(State(api): Shared, team: Team, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let t = api.seen(&team, &id).await?;
    Ok(Json(json!({ "total": api.store.tags(&t.id).await?.len() })))
}

#[derive(Debug, Deserialize)]
pub struct TagQuery {
    tag: String,
}

pub async fn exists(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    Query(q): Query<TagQuery>,
) -> Result<Json<Value>, ApiError> {
    let t = api.seen(&team, &id).await?;
    let tag = check_tag(&q.tag)?;
    let exists = api.store.tags(&t.id).await?.iter().any(|t| t.tag == tag);
    Ok(Json(json!({ "exists": exists, "normalizedTag": tag })))
}

#[derive(Debug, Deserialize)]
pub struct Assign {
    target: String,
    tags: Vec<String>,
}

pub async fn assign(
    State(api): Shared,
    team: Team,
    Input(a): Input<Assign>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let tags: Vec<String> = a.tags.iter().map(|t| check_tag(t)).collect::<Result<_, _>>()?;
    if tags.is_empty() {
        return Err(ApiError::bad("There are no tags to assign"));
    }
    let shown = || a.target.escape_debug().to_string();
    let found = api.named(&a.target).await?.filter(|(t, _)| t.team_id == team.id);
    let (t, build) =
        found.ok_or_else(|| ApiError::not_found(format!("Template '{}' was not found", shown())))?;
    let build =
        build.ok_or_else(|| ApiError::not_found(format!("'{}' has no build that can be used", shown())))?;
    api.store.put_tags(&t.id, &build.id, &tags).await?;
    Ok((StatusCode::CREATED, Json(json!({ "tags": tags, "buildID": build.id }))))
}

#[derive(Debug, Deserialize)]
pub struct Remove {
    name: String,
    tags: Vec<String>,
}

pub async fn remove(State(api): Shared, team: Team, Input(r): Input<Remove>) -> Result<StatusCode, ApiError> {
    let t = api.owned(&team, &r.name).await?;
    let tags: Vec<String> = r.tags.iter().map(|t| check_tag(t)).collect::<Result<_, _>>()?;
    if tags.iter().any(|t| t == DEFAULT_TAG) {
        return Err(ApiError::bad(format!(
            "The tag '{DEFAULT_TAG}' cannot be removed, only given to another build"
        )));
    }
    let known = api.store.tags(&t.id).await?;
    if let Some(tag) = tags.iter().find(|t| !known.iter().any(|k| k.tag == **t)) {
        return Err(ApiError::not_found(format!("The template has no tag '{tag}'")));
    }
    api.store.remove_tags(&t.id, &tags).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_tags() {
        assert_eq!(split("base"), ("base", "default"));
        assert_eq!(split("base:latest"), ("base", "default"));
        assert_eq!(split("base:v1.2"), ("base", "v1.2"));
        assert_eq!(check_tag("Latest").unwrap(), "default");
        assert_eq!(check_tag("V1").unwrap(), "v1");
        for bad in ["", "a b", "a:b", "a/b", &"x".repeat(129)] {
            assert_eq!(check_tag(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
