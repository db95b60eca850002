//! One configuration: defaults, then a file, then the environment.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use figment::Figment;
use figment::providers::{Env, Format as _, Serialized, Toml};
use ipnet::Ipv4Net;
use nidus_egress::GatewayConfig;
use nidus_oci::{RegistryHost, RegistrySettings};
use nidus_proxy::{Certificate, ProxyConfig};
use nidus_telemetry::Format;
use serde::{Deserialize, Deserializer, Serialize};

/// Read when it is there and no other file is named.
const DEFAULT_FILE: &str = "/etc/nidus/nidus.toml";

/// E2B's names of variables, and ours. Ours win.
const ALIASES: &[(&str, &str)] = &[
    ("NODE_ID", "node_id"),
    ("DOMAIN_NAME", "domain"),
    ("ORCHESTRATOR_BASE_PATH", "data_dir"),
    ("HOST_ENVD_PATH", "envd"),
    ("FIRECRACKER_VERSIONS_DIR", "firecracker"),
];

const DNS_PORT: u16 = 53;
/// Connections and questions of one sandbox that the gateway carries at once.
const MAX_FLOWS: usize = 512;
const MAX_QUESTIONS: usize = 64;

/// Everything that can be set. Each field is `NIDUS_` and its name in capitals in the environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the REST API.
    pub api_addr: SocketAddr,
    /// Address of the sandbox proxy.
    pub proxy_addr: SocketAddr,
    /// Address at which the sandbox proxy speaks TLS, by the certificate below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_tls_addr: Option<SocketAddr>,
    /// PEM chain of that certificate; looked at again while it is in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_tls_cert: Option<PathBuf>,
    /// And its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_tls_key: Option<PathBuf>,
    /// Seconds in which nothing may move in an answer or a tunnel of the proxy, before it is cut; 0 for ever.
    pub proxy_idle_timeout_s: u64,
    /// Seconds that a request and its answer may take, or a tunnel, before it is cut; 0 for ever.
    pub proxy_total_timeout_s: u64,
    /// Address of the node's gRPC and HTTP.
    pub node_addr: SocketAddr,
    /// Everything that is kept.
    pub data_dir: PathBuf,
    /// The object store that builds are kept in beside the data directory: `s3://BUCKET/PREFIX`,
    /// `gs://BUCKET/PREFIX` or `file:///DIRECTORY`. Keys, region and endpoint are those of the
    /// provider's own tools: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and so on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// Room on the disk for what was read from the object store, in MiB.
    pub storage_cache_mb: u64,
    /// Domain of sandboxes' host names, when there is one with a wildcard that leads to the proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Id of this node; made at the first start when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
    /// Labels of this node.
    pub node_labels: Vec<String>,
    /// What runs the guests: `auto`, `qemu` or `firecracker`.
    pub vmm: VmmChoice,
    /// Firecracker's program, or a directory with `VERSION/firecracker`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firecracker: Option<PathBuf>,
    /// Version to take of that directory; the newest when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firecracker_version: Option<String>,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// `auto`, `tcg` or `kvm`.
    pub accel: Accel,
    /// Program that runs in guests; found beside this one when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envd: Option<PathBuf>,
    /// First program of guests; found beside this one when not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_init: Option<PathBuf>,
    /// Name of the default template, built at the first start.
    pub base_template: String,
    /// What it is made of.
    pub base_image: String,
    /// Its virtual processors.
    pub base_cpu: i32,
    /// Its memory in MiB.
    pub base_memory_mb: i32,
    /// Root disk of new templates in MiB.
    pub disk_mb: u32,
    /// Whether the memory of new templates consists of pages of 2 MiB; Firecracker has them, and the host must
    /// keep a pool of them (`vm.nr_hugepages`).
    pub huge_pages: bool,
    /// Machines kept ready for each template in use; 0 turns it off.
    pub warm: usize,
    /// Whether machines that are kept ready run their template's ready command before they are used, so that the
    /// first request to what the template started is as fast as later ones.
    pub rehearse: bool,
    /// Postgres server that keeps what the API knows, `postgres://user:password@host/database`; by default that is
    /// a file in the data directory.
    #[serde(skip_serializing)]
    pub database: Option<String>,
    /// What nodes and all teams are managed with, in `X-Admin-Token`; nobody may where there is none.
    #[serde(skip_serializing)]
    pub admin_token: Option<String>,
    /// Requests a second that a team may make of the API, and twice as many for a moment; 0 is without a limit.
    pub request_rate: u32,
    /// Seconds between two looks at the processor, memory and disk figures of each sandbox; 0 turns them off.
    pub metrics_interval_s: u64,
    /// How long a template stays open after its last use, in seconds.
    pub template_ttl_s: u64,
    /// Templates that stay open for good, by name or id, or by the id of a build; the base template
    /// when not set. In the environment with commas between.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "names")]
    pub pinned_templates: Option<Vec<String>>,
    /// Sandboxes at once.
    pub max_sandboxes: usize,
    /// Sandboxes that start at the same instant.
    pub max_starting: usize,
    /// Network slots kept ready.
    pub slots: usize,
    /// Base of the /16 with a host address for each slot.
    pub host_range: Ipv4Addr,
    /// Base of the /16 with an address pair for each slot.
    pub pair_range: Ipv4Addr,
    /// Resolvers for sandboxes whose policy has something to say about names and names no resolver itself;
    /// this host's (`/etc/resolv.conf`) when not set. In the environment with commas between.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "names")]
    pub dns: Option<Vec<String>>,
    /// PEM certificates that are trusted beside the system's where headers are set in sandboxes' requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_roots: Option<PathBuf>,
    /// Private ranges that sandboxes may reach like public ones. In the environment with commas between.
    #[serde(deserialize_with = "ranges")]
    pub allowed_private: Vec<Ipv4Net>,
    /// Bytes a second that a sandbox may send, and as many that it may receive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_bandwidth: Option<u64>,
    /// Connections that a sandbox may have open at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_connections: Option<u32>,
    /// Template builds at once; each has a VM.
    pub max_builds: usize,
    /// Seconds that a template build may take.
    pub build_timeout_s: u64,
    /// Most MiB that clients may upload for one step of a build.
    pub upload_limit_mb: u64,
    /// Room on the disk for layers of template builds, in MiB: those that were not used for the longest time go first.
    pub layer_cache_mb: u64,
    /// What is to be known of registries, by HOST or HOST:PORT: `mirror` is asked in its place, `plain_http` is without TLS,
    /// `private` may have a private address. In the environment: `HOST=OPTION+OPTION`, several with
    /// commas between, as `docker.io=mirror:127.0.0.1:5000,127.0.0.1:5000=plain_http+private`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "registries")]
    pub registries: BTreeMap<String, RegistryHost>,
    /// VMMs run as the user ids from here on.
    pub uid_base: u32,
    /// What is logged, as `info,nidus_proxy=debug`.
    pub log: String,
    /// `text` or `json`.
    pub log_format: Format,
    /// Root file systems that are files of this host (ext4 images), by the name under which templates
    /// ask for them. In the environment: `NAME=PATH`, several with commas between.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "images")]
    pub local_images: BTreeMap<String, PathBuf>,
}

/// What runs the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VmmChoice {
    /// Firecracker where it boots the guest's kernel, else QEMU.
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker or nothing.
    Firecracker,
}

/// Which accelerator QEMU uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where it boots the guest's kernel, else software emulation.
    Auto,
    /// Software emulation.
    Tcg,
    /// KVM or nothing.
    Kvm,
}

impl Default for Config {
    fn default() -> Self {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            api_addr: local(3000),
            proxy_addr: local(5007),
            proxy_tls_addr: None,
            proxy_tls_cert: None,
            proxy_tls_key: None,
            proxy_idle_timeout_s: 0,
            proxy_total_timeout_s: 0,
            node_addr: local(5008),
            data_dir: PathBuf::from("/var/lib/nidus"),
            storage: None,
            storage_cache_mb: 10 << 10,
            domain: None,
            node_id: None,
            node_labels: Vec::new(),
            vmm: VmmChoice::Auto,
            firecracker: None,
            firecracker_version: None,
            qemu: PathBuf::from("qemu-system-x86_64"),
            accel: Accel::Auto,
            envd: None,
            guest_init: None,
            base_template: "base".into(),
            base_image: "debian:bookworm".into(),
            base_cpu: 1,
            base_memory_mb: 512,
            disk_mb: 2048,
            huge_pages: false,
            warm: 4,
            rehearse: true,
            // Longer than a sandbox may live.
            database: None,
            admin_token: None,
            request_rate: 200,
            metrics_interval_s: 5,
            template_ttl_s: 25 * 3600,
            pinned_templates: None,
            max_sandboxes: 100,
            max_starting: 4,
            slots: 4,
            host_range: Ipv4Addr::new(10, 11, 0, 0),
            pair_range: Ipv4Addr::new(10, 12, 0, 0),
            dns: None,
            egress_roots: None,
            allowed_private: Vec::new(),
            sandbox_bandwidth: None,
            sandbox_connections: None,
            max_builds: 2,
            build_timeout_s: 3600,
            upload_limit_mb: 4 << 10,
            layer_cache_mb: 20 << 10,
            registries: BTreeMap::new(),
            uid_base: 1_879_000_000,
            log: "info,sqlx=warn,h2=warn,hyper=warn".into(),
            log_format: Format::Text,
            local_images: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Reads defaults, the file and the environment.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        match file {
            Some(path) if !path.is_file() => bail!("The configuration file {} is not there", path.display()),
            Some(path) => figment = figment.merge(Toml::file_exact(path)),
            None if Path::new(DEFAULT_FILE).is_file() => {
                figment = figment.merge(Toml::file_exact(DEFAULT_FILE))
            }
            None => {}
        }
        for (name, field) in ALIASES {
            if let Ok(value) = std::env::var(name) {
                figment = figment.merge((*field, value));
            }
        }
        for (name, field) in [("GRPC_PORT", "node_addr"), ("PROXY_PORT", "proxy_addr")] {
            if let Ok(port) = std::env::var(name) {
                let port: u16 = port.parse().map_err(|_| anyhow!("{name}={port} is not a port"))?;
                figment = figment.merge((field, SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string()));
            }
        }
        if let Ok(labels) = std::env::var("NODE_LABELS") {
            let labels: Vec<&str> = labels.split(',').filter(|l| !l.is_empty()).collect();
            figment = figment.merge(("node_labels", labels));
        }
        // These are read elsewhere; Nidus's own tests and tools may add more of their own.
        let known: Vec<String> = match serde_json::to_value(Self {
            domain: Some(String::new()),
            storage: Some(String::new()),
            node_id: Some(String::new()),
            firecracker: Some(PathBuf::new()),
            firecracker_version: Some(String::new()),
            envd: Some(PathBuf::new()),
            guest_init: Some(PathBuf::new()),
            pinned_templates: Some(Vec::new()),
            proxy_tls_addr: Some(SocketAddr::from(([127, 0, 0, 1], 443))),
            proxy_tls_cert: Some(PathBuf::new()),
            proxy_tls_key: Some(PathBuf::new()),
            dns: Some(Vec::new()),
            egress_roots: Some(PathBuf::new()),
            sandbox_bandwidth: Some(0),
            sandbox_connections: Some(0),
            local_images: [(String::new(), PathBuf::new())].into(),
            registries: [(String::new(), RegistryHost::default())].into(),
            ..Self::default()
        }) {
            Ok(serde_json::Value::Object(fields)) => fields.keys().cloned().collect(),
            _ => Vec::new(),
        };
        let ours = Env::prefixed("NIDUS_").filter(move |k| known.iter().any(|n| k == n.as_str()));
        let mut figment = figment.merge(ours);
        // Those that are never printed, hence not among the known ones; texts, whatever they look like.
        for (name, field) in [("NIDUS_ADMIN_TOKEN", "admin_token"), ("NIDUS_DATABASE", "database")] {
            if let Ok(value) = std::env::var(name) {
                figment = figment.merge((field, value));
            }
        }
        let config: Self = figment.extract().map_err(|e| explain(&e))?;
        config.check()
    }

    fn check(self) -> anyhow::Result<Self> {
        if !self.data_dir.is_absolute() {
            bail!("data_dir '{}' is not an absolute path", self.data_dir.display());
        }
        if self.max_sandboxes == 0 || self.max_sandboxes > 4000 {
            bail!("max_sandboxes {} is not between 1 and 4000", self.max_sandboxes);
        }
        if self.sandbox_bandwidth.is_some_and(|b| b < 1024) {
            bail!("sandbox_bandwidth is below 1024 bytes a second: nothing would work");
        }
        if self.sandbox_connections == Some(0) {
            bail!("sandbox_connections is 0: nothing would work");
        }
        if self.dns.is_some() {
            self.resolvers()?;
        }
        if self.template_ttl_s == 0 {
            bail!("template_ttl_s is 0: templates are closed after one second at the earliest");
        }
        for (name, path) in &self.local_images {
            if name.is_empty() || !path.is_absolute() {
                bail!("local_images: '{name}={}' is not a name and an absolute path", path.display());
            }
        }
        Ok(self)
    }

    /// The resolvers for sandboxes.
    fn resolvers(&self) -> anyhow::Result<Vec<SocketAddr>> {
        let Some(named) = &self.dns else {
            return Ok(resolvers_of(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()));
        };
        let parse = |server: &String| {
            let whole = server.parse::<SocketAddr>();
            let alone = || server.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DNS_PORT));
            whole.or_else(|_| alone()).map_err(|_| anyhow!("dns: '{server}' is not IP or IP:PORT"))
        };
        named.iter().map(parse).collect()
    }

    /// Where the index of layers of template builds is.
    pub fn layers_dir(&self) -> PathBuf {
        self.data_dir.join("layers")
    }

    /// How registries may be asked.
    pub fn registry_settings(&self) -> RegistrySettings {
        let allowed = self.allowed_private.clone();
        let is_denied = move |ip: IpAddr| match ip.to_canonical() {
            IpAddr::V4(ip) => nidus_network::is_denied(ip, &allowed),
            // Loopback, unspecified, unique local and link-local.
            IpAddr::V6(ip) => {
                ip.is_loopback() || ip.is_unspecified() || ip.is_unique_local() || ip.is_unicast_link_local()
            }
        };
        RegistrySettings { hosts: self.registries.clone(), is_denied: Arc::new(is_denied) }
    }

    /// How the egress gateway works.
    pub fn gateway(&self) -> anyhow::Result<GatewayConfig> {
        let range = |base: Ipv4Addr| Ipv4Net::new_assert(base, 16).trunc();
        Ok(GatewayConfig {
            dns: self.resolvers()?,
            extra_roots: self.egress_roots.clone(),
            allowed_private: self.allowed_private.clone(),
            never: vec![range(self.host_range), range(self.pair_range)],
            ca_folder: self.data_dir.clone(),
            max_connections: self.sandbox_connections.map_or(MAX_FLOWS, |n| n as usize),
            max_questions: MAX_QUESTIONS,
        })
    }

    /// How the sandbox proxy works.
    pub fn proxy(&self) -> ProxyConfig {
        let time = |seconds| (seconds > 0).then(|| Duration::from_secs(seconds));
        ProxyConfig {
            idle_timeout: time(self.proxy_idle_timeout_s),
            total_timeout: time(self.proxy_total_timeout_s),
            ..ProxyConfig::default()
        }
    }

    /// Where the proxy speaks TLS, and by which certificate.
    pub fn proxy_tls(&self) -> anyhow::Result<Option<(SocketAddr, Arc<Certificate>)>> {
        match (self.proxy_tls_addr, &self.proxy_tls_cert, &self.proxy_tls_key) {
            (None, None, None) => Ok(None),
            (Some(address), Some(chain), Some(key)) => {
                Ok(Some((address, Certificate::open(chain.clone(), key.clone())?)))
            }
            _ => bail!("proxy_tls_addr, proxy_tls_cert and proxy_tls_key belong together: set all or none"),
        }
    }

    /// The templates that stay open for good.
    pub fn pinned(&self) -> &[String] {
        self.pinned_templates.as_deref().unwrap_or(std::slice::from_ref(&self.base_template))
    }

    /// The program `name` of this release: named, beside this one, or installed.
    pub fn program(&self, named: Option<&PathBuf>, name: &str) -> anyhow::Result<PathBuf> {
        if let Some(path) = named {
            return path
                .is_file()
                .then(|| path.clone())
                .ok_or_else(|| anyhow!("{} is not there", path.display()));
        }
        let own = std::env::current_exe().context("Cannot find this program's own path")?;
        let beside = own.parent().map(|d| d.join(name));
        [beside, Some(PathBuf::from("/usr/lib/nidus").join(name))]
            .into_iter()
            .flatten()
            .find(|p| p.is_file())
            .ok_or_else(|| {
                let variable = format!("NIDUS_{}", name.to_uppercase().replace('-', "_"));
                anyhow!("{name} was not found beside {}. Run make build, or set {variable}", own.display())
            })
    }
}

/// Those that a resolv.conf(5) names; public ones where it names none.
fn resolvers_of(text: &str) -> Vec<SocketAddr> {
    let named = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let mut found: Vec<_> = named
        .filter_map(|rest| rest.trim().parse::<IpAddr>().ok())
        .map(|ip| SocketAddr::new(ip, DNS_PORT))
        .collect();
    if found.is_empty() {
        found = [[8, 8, 8, 8], [8, 8, 4, 4]].map(|ip| SocketAddr::from((ip, DNS_PORT))).to_vec();
    }
    found
}

/// A list, or the environment's `RANGE,RANGE`.
fn ranges<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Ipv4Net>, D::Error> {
    let texts = names(from)?.unwrap_or_default();
    let parse = |text: &String| {
        text.parse::<Ipv4Net>()
            .map(|net| net.trunc())
            .map_err(|_| serde::de::Error::custom(format!("'{text}' is not an IPv4 range as 10.1.0.0/16")))
    };
    texts.iter().map(parse).collect()
}

/// A list, or the environment's `NAME,NAME`.
fn names<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        List(Vec<String>),
        Text(String),
    }
    Ok(Some(match Form::deserialize(from)? {
        Form::List(list) => list,
        Form::Text(text) => text.split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect(),
    }))
}

/// A table, or the environment's `NAME=PATH,NAME=PATH`.
/// A table, or one line of the environment.
fn registries<'de, D: Deserializer<'de>>(de: D) -> Result<BTreeMap<String, RegistryHost>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Table(BTreeMap<String, RegistryHost>),
        Line(String),
    }
    let text = match Form::deserialize(de)? {
        Form::Table(table) => return Ok(table),
        Form::Line(text) => text,
    };
    let entry = |entry: &str| {
        let bad = || serde::de::Error::custom(format!("registries: '{entry}' is not HOST=OPTION+OPTION"));
        let (host, options) = entry.split_once('=').ok_or_else(bad)?;
        let mut said = RegistryHost::default();
        for option in options.split('+') {
            match option.split_once(':') {
                Some(("mirror", mirror)) => said.mirror = Some(mirror.to_owned()),
                None if option == "plain_http" => said.plain_http = true,
                None if option == "private" => said.private = true,
                _ => return Err(bad()),
            }
        }
        Ok((host.to_owned(), said))
    };
    text.split(',').filter(|e| !e.is_empty()).map(entry).collect()
}

fn images<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Table(BTreeMap<String, PathBuf>),
        Text(String),
    }
    match Form::deserialize(from)? {
        Form::Table(table) => Ok(table),
        Form::Text(text) => text
            .split(',')
            .filter(|pair| !pair.is_empty())
            .map(|pair| match pair.split_once('=') {
                Some((name, path)) => Ok((name.to_owned(), PathBuf::from(path))),
                None => Err(serde::de::Error::custom(format!("'{pair}' is not NAME=PATH"))),
            })
            .collect(),
    }
}

fn explain(e: &figment::Error) -> anyhow::Error {
    let field = e.path.join(".");
    let source = e.metadata.as_ref().map(|m| m.name.to_string()).unwrap_or_default();
    let source = if source.contains("environment") {
        format!("environment variable NIDUS_{}", field.to_uppercase())
    } else {
        source
    };
    if field.is_empty() {
        return anyhow!("The configuration cannot be read ({source}): {}", e.kind);
    }
    anyhow!("The configuration's {field} cannot be read ({source}): {}", e.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_sets_what_it_names_and_errors_name_the_field() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nidus.toml");
        std::fs::write(&path, "warm = 7\nlog_format = \"json\"\n").unwrap();
        let c = Config::load(Some(&path)).unwrap();
        assert_eq!((c.warm, c.log_format), (7, Format::Json));
        assert_eq!(c.base_template, "base");
        std::fs::write(&path, "api_addr = \"nonsense\"\n").unwrap();
        let e = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(e.contains("api_addr"), "{e}");
        std::fs::write(&path, "no_such_thing = 1\n").unwrap();
        assert!(Config::load(Some(&path)).unwrap_err().to_string().contains("no_such_thing"));
        assert!(Config::load(Some(&dir.path().join("x"))).unwrap_err().to_string().contains("is not there"));
    }

    #[test]
    fn local_images_are_a_table_or_a_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nidus.toml");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::load(Some(&path))
        };
        let table = load("[local_images]\n\"debian:bookworm\" = \"/b.ext4\"\nmine = \"/m.ext4\"\n").unwrap();
        let list = load("local_images = \"debian:bookworm=/b.ext4,mine=/m.ext4\"\n").unwrap();
        assert_eq!(table.local_images["debian:bookworm"], PathBuf::from("/b.ext4"));
        assert_eq!(table, list);
        let shown = load(&toml::to_string_pretty(&table).unwrap()).unwrap();
        assert_eq!(table, shown);
        let error = |text: &str| load(text).unwrap_err().to_string();
        assert!(error("local_images = \"mine\"\n").contains("local_images"));
        assert!(error("local_images = \"mine=m.ext4\"\n").contains("absolute"));
    }

    #[test]
    fn the_base_template_is_pinned_unless_others_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nidus.toml");
        let pinned = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::load(Some(&path)).unwrap().pinned().to_vec()
        };
        assert_eq!(pinned("base_template = \"mine\"\n"), ["mine"]);
        assert_eq!(pinned("pinned_templates = [\"a\", \"b\"]\n"), ["a", "b"]);
        assert_eq!(pinned("pinned_templates = \"a,b\"\n"), ["a", "b"]);
        assert!(pinned("pinned_templates = []\n").is_empty());
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nidus.toml");
        std::fs::write(&path, toml::to_string_pretty(&Config::default()).unwrap()).unwrap();
        assert_eq!(Config::load(Some(&path)).unwrap(), Config::default());
    }
}
