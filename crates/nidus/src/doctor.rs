//! `nidus doctor`: what works here, found out by trying.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nidus_block::ublk::Ublk;
use nidus_memfs::MemFs;
use nidus_vmm::cgroup::CgroupRoot;
use nidus_vmm::guest::Kernel;
use nidus_vmm::qemu::probe;
use serde::Serialize;

use crate::config::Config;
use crate::driver::{Answer, Probes};
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
    all.extend(drivers(config).await);
    if root {
        for c in nidus_network::probe() {
            let result = c.error.map_or_else(|| Ok("works".to_owned()), Err);
            all.push(Finding::of(c.name, result, c.fix));
        }
        let served = MemFs::start(1).map(|_| "can be served (FUSE)".to_owned());
        all.push(Finding::of("memory files", served.map_err(|e| e.to_string()), "modprobe fuse"));
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
        let found = in_path(program).map(|p| p.display().to_string()).ok_or_else(|| "not found".to_owned());
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

/// Drivers can only be tried with a kernel, which the first start of the daemon brings.
async fn drivers(config: &Config) -> Vec<Finding> {
    let (kvm, fc) = ("QEMU with KVM", "Firecracker");
    let kernels = Kernel::list(&config.data_dir.join("kernels"));
    let init = config.program(config.guest_init.as_ref(), "guest-init");
    let (Some(kernel), Ok(guest_init)) = (kernels.last(), init) else {
        let later = || Err("is tried with the guest's kernel at the first nidus serve".to_owned());
        return vec![Finding::of(kvm, later(), "").optional(), Finding::of(fc, later(), "").optional()];
    };
    let probes = Probes { config, kernel, guest_init: &guest_init };
    let text = |answer: anyhow::Result<Answer>| match answer {
        Ok(Answer { works: true, reason }) => Ok(reason),
        Ok(Answer { reason, .. }) => Err(reason),
        Err(e) => Err(format!("{e:#}")),
    };
    let firecracker = match probes.firecracker_program().await {
        Ok(Some(program)) => text(probes.firecracker(&program).await),
        Ok(None) => Err("not found".to_owned()),
        Err(e) => Err(format!("{e:#}")),
    };
    let fix = if matches!(&firecracker, Err(e) if e == "not found") {
        "take a release from its project's page and set NIDUS_FIRECRACKER to the program"
    } else {
        ""
    };
    let ublk = nidus_block::ublk::probe();
    let door = if ublk == Ublk::Absent { Err(ublk.to_string()) } else { Ok(ublk.to_string()) };
    vec![
        Finding::of(kvm, text(probes.qemu_kvm().await), "").optional(),
        Finding::of(fc, firecracker, fix).optional(),
        Finding::of("kernel NBD devices", nbd(), "").optional(),
        Finding::of("ublk", door, "").optional(),
    ]
}

fn nbd() -> Result<String, String> {
    nidus_block::nbd::kernel::probe().map(|()| "work".to_owned()).map_err(|e| e.to_string())
}

/// The program of this name in PATH.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join(program)).find(|p| p.is_file())
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
