//! `GET /openapi.json`: what the API serves, in OpenAPI 3.1, made of two tables beside this file. A test
//! holds them against the routes.

use std::sync::LazyLock;

use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::{Map, Value, json};

const ROUTES: &str = include_str!("openapi/routes.txt");
const SCHEMAS: &str = include_str!("openapi/schemas.txt");

/// The document, as it is sent.
static DOCUMENT: LazyLock<String> = LazyLock::new(|| made().to_string());

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'))
}

/// The schema of a type as the tables write it.
fn schema(kind: &str) -> Value {
    let kind = kind.trim();
    if let Some(inner) = kind.strip_suffix('!') {
        return json!({ "anyOf": [schema(inner), { "type": "null" }] });
    }
    if let Some(inner) = kind.strip_prefix('[').and_then(|k| k.strip_suffix(']')) {
        return json!({ "type": "array", "items": schema(inner) });
    }
    if let Some(inner) = kind.strip_prefix('{').and_then(|k| k.strip_suffix('}')) {
        return json!({ "type": "object", "additionalProperties": schema(inner) });
    }
    if kind.contains('|') {
        return json!({ "type": "string", "enum": kind.split('|').collect::<Vec<_>>() });
    }
    match kind {
        "string" => json!({ "type": "string" }),
        "uuid" => json!({ "type": "string", "format": "uuid" }),
        "time" => json!({ "type": "string", "format": "date-time" }),
        "int" => json!({ "type": "integer", "format": "int64" }),
        "number" => json!({ "type": "number" }),
        "bool" => json!({ "type": "boolean" }),
        "any" => json!({}),
        name => json!({ "$ref": format!("#/components/schemas/{name}") }),
    }
}

fn object(fields: &str) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for field in fields.split(", ") {
        let Some((name, kind)) = field.split_once(':') else { continue };
        if !name.ends_with('?') {
            required.push(json!(name));
        }
        properties.insert(name.trim_end_matches('?').to_owned(), schema(kind));
    }
    json!({ "type": "object", "properties": properties, "required": required })
}

/// A line of the routes' table.
struct Route<'a> {
    method: String,
    path: &'a str,
    who: &'a str,
    query: Vec<&'a str>,
    body: Option<&'a str>,
    status: &'a str,
    answer: Option<&'a str>,
    summary: &'a str,
}

fn route(line: &str) -> Option<Route<'_>> {
    let (front, back) = line.split_once(" > ")?;
    let (result, summary) = back.split_once(" : ")?;
    let (front, query, body) = match front.split_once('[') {
        Some((front, rest)) => {
            let (query, body) = rest.split_once(']')?;
            (front, query.split(", ").collect(), body.trim())
        }
        None => (front, Vec::new(), ""),
    };
    let mut words = front.split_whitespace();
    let (method, path, who) = (words.next()?.to_lowercase(), words.next()?, words.next()?);
    let body = words.next().or(Some(body)).filter(|b| !b.is_empty());
    let (status, answer) = result.split_once(' ').map_or((result, None), |(s, a)| (s, Some(a)));
    Some(Route { method, path, who, query, body, status, answer, summary })
}

fn content(kind: &str) -> Value {
    match kind {
        "bytes" => {
            json!({ "application/octet-stream": { "schema": { "type": "string", "format": "binary" } } })
        }
        kind => json!({ "application/json": { "schema": schema(kind) } }),
    }
}

fn security(who: &str) -> Value {
    match who {
        "team" => json!([{ "apiKey": [] }, { "bearer": [] }, { "adminToken": [], "teamID": [] }]),
        "keys" => json!([{ "bearer": [] }, { "adminToken": [], "teamID": [] }]),
        "admin" => json!([{ "adminToken": [] }]),
        "volume" => json!([{ "volumeToken": [] }]),
        _ => json!([]),
    }
}

fn operation(r: &Route<'_>) -> Value {
    let in_path = r.path.split('{').skip(1).filter_map(|p| p.split_once('}')).map(
        |(name, _)| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }),
    );
    let in_query = r.query.iter().map(
        |name| json!({ "name": name, "in": "query", "required": false, "schema": { "type": "string" } }),
    );
    let mut answer = json!({ "description": r.summary });
    if let Some(kind) = r.answer {
        answer["content"] = content(kind);
    }
    let mut operation = json!({
        "summary": r.summary,
        "tags": [r.path.split('/').find(|p| !p.is_empty() && !p.starts_with('v')).unwrap_or("volumes")],
        "security": security(r.who),
        "parameters": in_path.chain(in_query).collect::<Vec<_>>(),
        "responses": { r.status: answer, "default": { "$ref": "#/components/responses/Error" } },
    });
    if let Some(body) = r.body {
        let required = !body.ends_with('?');
        operation["requestBody"] =
            json!({ "required": required, "content": content(body.trim_end_matches('?')) });
    }
    operation
}

fn made() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for r in lines(ROUTES).filter_map(route) {
        let path = paths.entry(r.path.to_owned()).or_insert_with(|| json!({}));
        path[r.method.as_str()] = operation(&r);
    }
    let schemas: Map<String, Value> = lines(SCHEMAS)
        .filter_map(|l| l.split_once(" = "))
        .map(|(name, fields)| (name.to_owned(), object(fields)))
        .collect();
    let header = |name: &str, text: &str| json!({ "type": "apiKey", "in": "header", "name": name, "description": text });
    let bearer = |text: &str| json!({ "type": "http", "scheme": "bearer", "description": text });
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Nidus",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Sandboxes for code that nobody trusts. Errors are {code, message}; 429 and 503 say in Retry-After when to come again.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": { "Error": { "description": "What went wrong", "content": content("Error") } },
            "securitySchemes": {
                "apiKey": header("X-API-Key", "A team's key (nidus key create)"),
                "bearer": bearer("A team's access token (nidus team token), or its key"),
                "adminToken": header("X-Admin-Token", "The installation's admin token (NIDUS_ADMIN_TOKEN)"),
                "teamID": header("X-Team-ID", "The team that the administrator acts for"),
                "volumeToken": bearer("The token of the volume"),
            },
        },
    })
}

/// Serves the document.
pub async fn document() -> Response {
    let mut response = DOCUMENT.as_str().into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_that_is_served_is_described_and_nothing_else() {
        let described: BTreeSet<(String, String)> =
            lines(ROUTES).map(|l| route(l).unwrap()).map(|r| (r.path.to_owned(), r.method)).collect();
        let mut served = BTreeSet::new();
        let source = include_str!("server.rs");
        let source = &source[..source.find(".fallback(nothing_there)").unwrap()];
        for call in source.split(".route(").skip(1) {
            let mut parts = call.splitn(3, '"');
            let (path, rest) = (parts.nth(1).unwrap(), parts.next().unwrap());
            for method in ["get", "post", "put", "patch", "delete"] {
                if rest.contains(&format!("{method}(")) {
                    served.insert((path.to_owned(), method.to_owned()));
                }
            }
        }
        assert_eq!(described, served);
    }

    #[test]
    fn every_schema_that_is_named_is_there() {
        let text = made().to_string();
        let known: BTreeSet<&str> =
            lines(SCHEMAS).filter_map(|l| l.split_once(" = ")).map(|(n, _)| n).collect();
        for name in text.split("#/components/schemas/").skip(1) {
            let name = name.split('"').next().unwrap();
            assert!(known.contains(name), "{name}");
        }
        for name in &known {
            assert!(text.contains(&format!("#/components/schemas/{name}\"")), "nothing has a {name}");
        }
    }

    #[test]
    fn types_become_schemas() {
        assert_eq!(schema("[time!]")["items"]["anyOf"][0]["format"], "date-time");
        assert_eq!(
            schema("{[Build]}")["additionalProperties"]["items"]["$ref"],
            "#/components/schemas/Build"
        );
        assert_eq!(schema("a|b")["enum"][1], "b");
        let o = object("a: int, b?: string");
        assert_eq!((&o["required"], &o["properties"]["b"]["type"]), (&json!(["a"]), &json!("string")));
        let r = route("PUT /x/{id} volume [a, b] bytes > 201 Node : Writes").unwrap();
        assert_eq!((r.query.len(), r.body, r.status, r.answer), (2, Some("bytes"), "201", Some("Node")));
    }
}
