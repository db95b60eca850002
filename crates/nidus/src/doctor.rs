//! `nidus doctor`: what works here, found out by trying.

use std::path::Path;
use std::process::ExitCode;

use nidus_vmm::cgroup::CgroupRoot;
use nidus_vmm::guest::Kernel;
use nidus_vmm::qemu::probe;
use serde::Serialize;

use crate::config::Config;
use crate::output::Output;

#[derive(Debug, Serialize)]
struct Finding {
    name: String,
    ok: bool,
    /// The daemon runs without it.
    optional: bool,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn of(name: &str, result: Result<String, String>, fix: &str) -> Self {
        let ok = result.is_ok();
        let detail = result.unwrap_or_else(|e| e);
        Self {
            name: name.into(),
            ok,
            optional: false,
            detail,
            fix: (!ok && !fix.is_empty()).then(|| fix.into()),
        }
    }

    fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

pub async fn run(config: &Config, out: Output) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    let root = nix::unistd::geteuid().is_root();
    let as_root = if root { Ok("yes".to_owned()) } else { Err("no".to_owned()) };
    all.push(Finding::of("runs as root", as_root, "sudo nidus doctor"));
    let qemu = probe::find(&config.qemu).await;
    let qemu = qemu.map(|(path, version)| format!("{} {version}", path.display())).map_err(|e| e.to_string());
    all.push(Finding::of("QEMU", qemu, "make setup"));
    all.push(accelerator(config).await);
    if root {
        for c in nidus_network::probe() {
            let result = c.error.map_or_else(|| Ok("works".to_owned()), Err);
            all.push(Finding::of(c.name, result, c.fix));
        }
        let name = format!("nidus-doctor-{}", std::process::id());
        let cgroups = CgroupRoot::new(&name).map(|c| {
            c.remove();
            "memory and cpu limits work".to_owned()
        });
        let fix = "enable the memory and cpu controllers of cgroup v2, or mount those of v1";
        all.push(Finding::of("control groups", cgroups.map_err(|e| e.to_string()), fix));
    }
    for (program, package) in [
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
        ("xz", "xz-utils"),
    ] {
        let found = in_path(program).ok_or_else(|| "not found".to_owned());
        let fix = format!("apt-get install {package}");
        all.push(Finding::of(&format!("{program} (builds templates)"), found, &fix).optional());
    }
    for (named, name) in [(config.envd.as_ref(), "envd"), (config.guest_init.as_ref(), "guest-init")] {
        let found = config.program(named, name).map(|p| p.display().to_string()).map_err(|e| e.to_string());
        all.push(Finding::of(name, found, "make build"));
    }
    all.push(space(&config.data_dir));
    for (what, address) in
        [("API", config.api_addr), ("proxy", config.proxy_addr), ("node", config.node_addr)]
    {
        let free = std::net::TcpListener::bind(address).map(|_| "free".to_owned());
        let free = free.map_err(|e| format!("{e} (a running nidus, or another program)"));
        let fix = format!("end what uses it, or set NIDUS_{}_ADDR", what.to_uppercase());
        all.push(Finding::of(&format!("{what} address {address}"), free, &fix).optional());
    }
    let good = all.iter().all(|f| f.ok || f.optional);
    if out.json {
        out.value(&all)?;
    } else {
        let rows = all
            .iter()
            .map(|f| {
                let mark = if f.ok {
                    "ok"
                } else if f.optional {
                    "note"
                } else {
                    "FAIL"
                };
                let fix = f.fix.as_ref().map(|x| format!(" -> {x}")).unwrap_or_default();
                vec![mark.to_owned(), f.name.clone(), format!("{}{fix}", f.detail)]
            })
            .collect();
        out.table(&["", "what", "found"], rows, "");
        println!(
            "\n{}",
            if good { "Sandboxes can run here." } else { "Sandboxes cannot run here yet: see FAIL." }
        );
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// KVM can only be tried with a kernel, which the first start of the daemon brings.
async fn accelerator(config: &Config) -> Finding {
    let name = "hardware acceleration (KVM)";
    let kernels = Kernel::list(&config.data_dir.join("kernels"));
    let result = match (kernels.last(), config.program(config.guest_init.as_ref(), "guest-init")) {
        (Some(kernel), Ok(init)) => {
            let chosen =
                crate::accel::choose(config.accel, &config.qemu, kernel, &init, &config.data_dir).await;
            match chosen {
                Ok((nidus_vmm::qemu::Accel::Kvm, reason)) => Ok(reason),
                Ok((_, reason)) => Err(reason),
                Err(e) => Err(format!("{e:#}")),
            }
        }
        _ => Err("is tried with the guest's kernel at the first nidus serve".to_owned()),
    };
    Finding::of(name, result, "").optional()
}

fn in_path(program: &str) -> Option<String> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|d| d.join(program))
        .find(|p| p.is_file())
        .map(|p| p.display().to_string())
}

fn space(dir: &Path) -> Finding {
    let existing = dir.ancestors().find(|d| d.is_dir()).unwrap_or(Path::new("/"));
    let result = match crate::serve::free_mib(existing) {
        Ok(free) if free >= crate::serve::BUILD_MIB => Ok(format!("{free} MiB free at {}", dir.display())),
        Ok(free) => Err(format!("only {free} MiB free at {}", dir.display())),
        Err(e) => Err(format!("{e:#}")),
    };
    Finding::of("disk space", result, "free some, or set NIDUS_DATA_DIR to a larger disk")
}
