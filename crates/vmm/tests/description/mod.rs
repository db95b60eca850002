//! As much of Swagger 2.0 as Firecracker's description uses.

use serde_json::{Map, Value, json};

/// An API's description.
pub struct Description(Value);

type Check = Result<(), String>;

impl Description {
    pub fn parse(text: &str) -> Self {
        Self(serde_saphyr::from_str(text).unwrap_or_else(|e| panic!("the description is no YAML: {e}")))
    }

    pub fn version(&self) -> &str {
        self.0["info"]["version"].as_str().unwrap_or("of no version")
    }

    /// The operation and the parameters in its path.
    fn operation(&self, method: &str, path: &str) -> Result<&Value, String> {
        let paths = self.0["paths"].as_object().ok_or("there are no paths")?;
        let fits = |template: &str| {
            let (mut a, mut b) = (template.split('/'), path.split('/'));
            loop {
                match (a.next(), b.next()) {
                    (None, None) => return true,
                    (Some(x), Some(y)) if x == y || x.starts_with('{') && !y.is_empty() => {}
                    _ => return false,
                }
            }
        };
        let exact = paths.get(path).or_else(|| paths.iter().find(|(t, _)| fits(t)).map(|(_, v)| v));
        exact.and_then(|p| p.get(method)).ok_or_else(|| format!("{method} {path} is not described"))
    }

    fn resolve<'a>(&'a self, schema: &'a Value) -> Result<&'a Value, String> {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(r) => {
                let name = r.rsplit('/').next().unwrap_or_default();
                self.0["definitions"].get(name).ok_or_else(|| format!("{r} is not defined"))
            }
            None => Ok(schema),
        }
    }

    /// The request is one that is described, and its body is as described.
    pub fn check_request(&self, method: &str, path: &str, body: Option<&Value>) -> Check {
        let operation = self.operation(method, path)?;
        let parameters = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
        let described = parameters.iter().find(|p| p["in"] == "body");
        match (described, body) {
            (Some(p), Some(body)) => self.check(&p["schema"], body, &format!("{method} {path}")),
            (Some(p), None) if p["required"] == true => Err(format!("{method} {path} needs a body")),
            (None, Some(_)) => Err(format!("{method} {path} has no body")),
            _ => Ok(()),
        }
    }

    /// The operation's errors have the form that the client reads.
    pub fn check_error(&self, method: &str, path: &str) -> Check {
        let responses = self.operation(method, path)?["responses"].as_object().ok_or("no responses")?;
        let error = responses.get("default").ok_or_else(|| format!("{method} {path} has no error"))?;
        let fault = self.resolve(&error["schema"])?.pointer("/properties/fault_message/type");
        match fault.and_then(Value::as_str) {
            Some("string") => Ok(()),
            _ => Err(format!("the error of {method} {path} has no fault_message")),
        }
    }

    /// The value is as the schema says, with no property that it does not know.
    fn check(&self, schema: &Value, value: &Value, at: &str) -> Check {
        let schema = self.resolve(schema)?;
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            // YAML reads some of the words as something else.
            let as_text: Vec<String> = allowed.iter().map(|v| v.to_string().replace('"', "")).collect();
            let word = value.as_str().unwrap_or_default();
            if !as_text.iter().any(|a| a == word || (a == "null" && word == "None")) {
                return Err(format!("{at} is {value}, not one of {as_text:?}"));
            }
        }
        let fits = match schema["type"].as_str() {
            Some("object") => return self.check_object(schema, value, at),
            Some("array") => {
                let items = value.as_array().ok_or_else(|| format!("{at} is no array"))?;
                return items.iter().try_for_each(|v| self.check(&schema["items"], v, at));
            }
            Some("string") => value.is_string(),
            Some("boolean") => value.is_boolean(),
            Some("integer") => {
                let within = |n: i64| {
                    schema["minimum"].as_i64().is_none_or(|m| n >= m)
                        && schema["maximum"].as_i64().is_none_or(|m| n <= m)
                };
                value.as_i64().is_some_and(within)
            }
            other => return Err(format!("{at}: type {other:?} is not known to this test")),
        };
        if fits { Ok(()) } else { Err(format!("{at} is {value}, which is not as described: {schema}")) }
    }

    fn check_object(&self, schema: &Value, value: &Value, at: &str) -> Check {
        let object = value.as_object().ok_or_else(|| format!("{at} is no object"))?;
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                return Err(format!("{at} lacks {name}"));
            }
        }
        let Some(properties) = schema["properties"].as_object() else {
            return Ok(());
        };
        object.iter().try_for_each(|(name, v)| {
            let property = properties.get(name).ok_or_else(|| format!("{at} has no {name}"))?;
            self.check(property, v, &format!("{at}.{name}"))
        })
    }

    /// An answer as the description has it, with every property.
    pub fn sample_answer(&self, method: &str, path: &str) -> Result<Value, String> {
        let schema = self.operation(method, path)?.pointer("/responses/200/schema");
        self.sample(schema.ok_or_else(|| format!("{method} {path} has no answer"))?)
    }

    fn sample(&self, schema: &Value) -> Result<Value, String> {
        let schema = self.resolve(schema)?;
        if let Some(Value::String(first)) = schema["enum"].get(0) {
            return Ok(json!(first));
        }
        Ok(match schema["type"].as_str() {
            Some("object") => {
                let mut object = Map::new();
                for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                    object.insert(name.clone(), self.sample(property)?);
                }
                Value::Object(object)
            }
            Some("array") => json!([self.sample(&schema["items"])?]),
            Some("string") => json!(schema["default"].as_str().unwrap_or("text")),
            Some("boolean") => json!(true),
            Some("integer") => json!(schema["minimum"].as_i64().unwrap_or(7).max(7)),
            other => return Err(format!("type {other:?} is not known to this test")),
        })
    }
}
