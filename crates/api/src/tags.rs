//! Names with tags, and tags over REST.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth::Team;
use crate::input::Input;
use crate::model::stamp;
use crate::observe::Asked;
use crate::store::{AssignmentRow, BuildRow, BuildStatus, TagRow, TemplateRow};
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
        "createdAt": stamp(t.created_at),
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

/// Tags and assignments in one answer, at most and by default.
const MAX_PAGE: usize = 100;
const DEFAULT_PAGE: usize = 20;

fn assignment_json(a: &AssignmentRow) -> Value {
    json!({
        "assignmentId": a.id, "buildId": a.build_id, "assignedAt": stamp(a.assigned_at),
        "buildCreatedAt": stamp(a.build_created_at), "buildFinishedAt": a.build_finished_at.map(stamp),
    })
}

fn page_size(asked: &Asked, name: &str) -> Result<usize, ApiError> {
    match asked.number(name)? {
        None => Ok(DEFAULT_PAGE),
        Some(0) => Err(ApiError::bad(format!("{name} '0' is not a number from 1 to {MAX_PAGE}"))),
        Some(n) => Ok(usize::try_from(n).unwrap_or(MAX_PAGE).min(MAX_PAGE)),
    }
}

/// A page of what is after the item that the cursor names, and the next cursor.
fn page<T>(
    all: Vec<T>,
    cursor: Option<&str>,
    size: usize,
    key: impl Fn(&T) -> &str,
) -> Result<(Vec<T>, Option<String>), ApiError> {
    let from = match cursor {
        None => 0,
        Some(c) => {
            let at = all.iter().position(|t| key(t) == c);
            1 + at.ok_or_else(|| ApiError::bad("the cursor is not one of this list"))?
        }
    };
    let more = all.len() > from + size;
    let page: Vec<T> = all.into_iter().skip(from).take(size).collect();
    let next = page.last().filter(|_| more).map(|last| key(last).to_owned());
    Ok((page, next))
}

/// The tags of a template, each with what it stood for.
fn grouped(all: Vec<AssignmentRow>, sort: &str) -> Vec<Vec<AssignmentRow>> {
    let mut groups: Vec<Vec<AssignmentRow>> = Vec::new();
    for a in all {
        match groups.iter_mut().find(|g| g.first().is_some_and(|first| first.tag == a.tag)) {
            Some(group) => group.push(a),
            None => groups.push(vec![a]),
        }
    }
    // They come with the newest first.
    match sort {
        "latest_asc" => groups.reverse(),
        "name_asc" => groups.sort_by(|a, b| name_of(a).cmp(name_of(b))),
        "name_desc" => groups.sort_by(|a, b| name_of(b).cmp(name_of(a))),
        _ => {}
    }
    groups
}

fn name_of(group: &[AssignmentRow]) -> &str {
    group.first().map_or("", |a| &a.tag)
}

pub async fn groups(
    State(api): Shared,
    team: Team,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let t = api.seen(&team, &id).await?;
    let sorts = ["latest_asc", "latest_desc", "name_asc", "name_desc"];
    let mut all =
        grouped(api.store.assignments(&t.id).await?, asked.one_of("sort", &sorts)?.unwrap_or("latest_desc"));
    if let Some(search) = asked.text("search") {
        let search = search.to_lowercase();
        all.retain(|g| name_of(g).contains(&search));
    }
    let each = page_size(&asked, "assignmentLimit")?;
    let (groups, next) =
        page(all, asked.text("tagsCursor"), page_size(&asked, "tagsLimit")?, |g| name_of(g))?;
    let groups: Vec<Value> = groups
        .iter()
        .map(|g| {
            let shown: Vec<Value> = g.iter().take(each).map(assignment_json).collect();
            json!({ "tag": name_of(g), "assignments": shown, "hasMore": g.len() > each })
        })
        .collect();
    Ok(Json(json!({ "tags": groups, "nextCursor": next })))
}

pub async fn assignments(
    State(api): Shared,
    team: Team,
    Path((id, tag)): Path<(String, String)>,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let t = api.seen(&team, &id).await?;
    let tag = check_tag(&tag)?;
    let mut all = api.store.assignments(&t.id).await?;
    all.retain(|a| a.tag == tag);
    if all.is_empty() {
        return Err(ApiError::not_found(format!("The template has no tag '{tag}'")));
    }
    let (data, next) = page(all, asked.text("cursor"), page_size(&asked, "limit")?, |a| &a.id)?;
    let data: Vec<Value> = data.iter().map(assignment_json).collect();
    Ok(Json(json!({ "data": data, "nextCursor": next })))
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
    // As they were asked for: `latest` is one name of the default tag.
    let said: Vec<String> = a.tags.iter().map(|t| t.to_ascii_lowercase()).collect();
    Ok((StatusCode::CREATED, Json(json!({ "tags": said, "buildID": build.id }))))
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

    fn stood_for(tag: &str, id: &str) -> AssignmentRow {
        let now = chrono::Utc::now();
        AssignmentRow {
            id: id.to_owned(),
            tag: tag.to_owned(),
            build_id: String::new(),
            assigned_at: now,
            build_created_at: now,
            build_finished_at: None,
        }
    }

    #[test]
    fn tags_are_grouped_and_come_in_pages() {
        let all = || vec![stood_for("b", "3"), stood_for("a", "2"), stood_for("b", "1")];
        let names = |sort| grouped(all(), sort).iter().map(|g| name_of(g).to_owned()).collect::<Vec<_>>();
        assert_eq!(names("latest_desc"), ["b", "a"]);
        assert_eq!(names("latest_asc"), ["a", "b"]);
        assert_eq!(names("name_asc"), ["a", "b"]);
        assert_eq!(names("name_desc"), ["b", "a"]);
        assert_eq!(grouped(all(), "name_desc")[0].len(), 2);
        let ids = |cursor, size| {
            page(all(), cursor, size, |a| a.id.as_str())
                .map(|(p, next)| (p.into_iter().map(|a| a.id).collect::<Vec<_>>(), next))
        };
        assert_eq!(ids(None, 2).unwrap(), (vec!["3".into(), "2".into()], Some("2".into())));
        assert_eq!(ids(Some("2"), 2).unwrap(), (vec!["1".into()], None));
        assert_eq!(ids(None, 3).unwrap().1, None);
        assert_eq!(ids(Some("9"), 2).unwrap_err().status, 400);
    }

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
