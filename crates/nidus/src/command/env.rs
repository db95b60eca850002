//! `nidus env`.

use std::process::ExitCode;

use serde_json::json;

use crate::client;
use crate::config::Config;
use crate::output::Output;

pub async fn run(config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let api = format!("http://{}", config.api_addr);
    let sandbox = format!("http://{}", config.proxy_addr);
    let key = client::own_key(config).await?;
    if out.json {
        out.value(&json!({ "E2B_API_URL": api, "E2B_SANDBOX_URL": sandbox, "E2B_API_KEY": key,
                             "E2B_VOLUME_API_URL": api }))?;
    } else {
        println!("export E2B_API_URL={api}\nexport E2B_SANDBOX_URL={sandbox}\nexport E2B_API_KEY={key}");
        println!("export E2B_VOLUME_API_URL={api}");
    }
    Ok(ExitCode::SUCCESS)
}
