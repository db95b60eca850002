//! `InfoService`: what the node is and how full it is, read from /proc.

use std::sync::Arc;

use nidus_proto::node::info_service_server::InfoService;
use nidus_proto::node::*;
use parking_lot::Mutex;
use tonic::{Request, Response, Status};

use crate::Node;
use crate::sandbox_service::from_time;

/// Use of the processors since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct CpuMeter(Mutex<(u64, u64)>);

impl CpuMeter {
    /// Percent busy since the last call, over all processors (proc_stat(5)).
    fn percent(&self) -> u32 {
        let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let Some((busy, total)) = cpu_times(&text) else { return 0 };
        let mut last = self.0.lock();
        let (b, t) = (busy.saturating_sub(last.0), total.saturating_sub(last.1));
        *last = (busy, total);
        u32::try_from((b * 100).checked_div(t).unwrap_or(0)).unwrap_or(100).min(100)
    }
}

fn cpu_times(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let times: Vec<u64> = line.split_whitespace().take(8).filter_map(|n| n.parse().ok()).collect();
    let total = times.iter().sum();
    let idle = times.get(3)? + times.get(4)?;
    Some((total - idle, total))
}

/// A value of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    let kib = line.is_some_and(|l| l.trim_end().ends_with("kB"));
    number.unwrap_or(0) * if kib { 1024 } else { 1 }
}

fn cpuinfo(text: &str, name: &str) -> String {
    text.lines()
        .filter_map(|l| l.split_once(':'))
        .find(|(k, _)| k.trim() == name)
        .map(|(_, v)| v.trim().to_owned())
        .unwrap_or_default()
}

fn machine() -> MachineInfo {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    MachineInfo {
        cpu_architecture: std::env::consts::ARCH.to_owned(),
        cpu_family: cpuinfo(&text, "cpu family"),
        cpu_model: cpuinfo(&text, "model"),
        cpu_model_name: cpuinfo(&text, "model name"),
        cpu_flags: cpuinfo(&text, "flags").split_whitespace().map(str::to_owned).collect(),
    }
}

/// The service over a node.
pub(crate) struct Info(pub Arc<Node>);

fn measure(node: &Node) -> ServiceInfoResponse {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let (total, free) = (meminfo(&memory, "MemTotal"), meminfo(&memory, "MemAvailable"));
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let disks: Vec<DiskMetrics> = nix::sys::statvfs::statvfs(&node.config.data_dir)
        .map(|d| DiskMetrics {
            mount_point: node.config.data_dir.display().to_string(),
            used_bytes: (d.blocks() - d.blocks_free()) * d.fragment_size(),
            total_bytes: d.blocks() * d.fragment_size(),
            ..Default::default()
        })
        .into_iter()
        .collect();
    let (mut vcpus, mut ram_mb, mut disk_mb, mut running) = (0u64, 0u64, 0u64, 0u32);
    for e in node.sandboxes.lock().values() {
        let c = &e.config;
        vcpus += u64::try_from(c.vcpu).unwrap_or(0);
        ram_mb += u64::try_from(c.ram_mb).unwrap_or(0);
        disk_mb += u64::try_from(c.total_disk_size_mb).unwrap_or(0);
        running += u32::from(e.is_running());
    }
    ServiceInfoResponse {
        node_id: node.config.node_id.clone(),
        service_id: node.service_id.to_string(),
        service_version: node.config.version.clone(),
        service_commit: option_env!("NIDUS_COMMIT").unwrap_or("unknown").to_owned(),
        service_status: node.status() as i32,
        service_roles: vec![ServiceInfoRole::Orchestrator as i32, ServiceInfoRole::TemplateBuilder as i32],
        service_startup: Some(from_time(node.started_at)),
        machine_info: Some(machine()),
        labels: node.config.labels.clone(),
        service_status_changed_at: Some(from_time(*node.status_changed_at.lock())),
        metric_vcpu_used: vcpus.cast_signed(),
        metric_memory_used_mb: ram_mb.cast_signed(),
        metric_disk_mb: disk_mb.cast_signed(),
        metric_sandboxes_running: running,
        metric_cpu_percent: node.cpu.percent(),
        metric_memory_used_bytes: total.saturating_sub(free),
        metric_cpu_count: cpus,
        metric_memory_total_bytes: total,
        metric_cpu_allocated: u32::try_from(vcpus).unwrap_or(u32::MAX),
        metric_memory_allocated_bytes: ram_mb << 20,
        metric_disk_allocated_bytes: disk_mb << 20,
        metric_disks: disks,
        metric_hugepages_total: meminfo(&memory, "HugePages_Total"),
        metric_hugepages_used: meminfo(&memory, "HugePages_Total")
            .saturating_sub(meminfo(&memory, "HugePages_Free")),
        metric_hugepages_reserved: meminfo(&memory, "HugePages_Rsvd"),
        metric_hugepage_size_bytes: meminfo(&memory, "Hugepagesize"),
    }
}

#[tonic::async_trait]
impl InfoService for Info {
    async fn service_info(&self, _: Request<()>) -> Result<Response<ServiceInfoResponse>, Status> {
        let node = self.0.clone();
        let info = tokio::task::spawn_blocking(move || measure(&node)).await;
        info.map(Response::new).map_err(|e| Status::internal(format!("the measurement did not finish: {e}")))
    }

    async fn service_status_override(
        &self,
        request: Request<ServiceStatusChangeRequest>,
    ) -> Result<Response<()>, Status> {
        let status = ServiceInfoStatus::try_from(request.into_inner().service_status)
            .map_err(|_| Status::invalid_argument("no such status"))?;
        self.0.set_status(status);
        Ok(Response::new(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read() {
        assert_eq!(cpu_times("cpu  10 0 20 60 10 0 0 0 0 0\ncpu0 1 1 1 1"), Some((30, 100)));
        let text = "MemTotal:  100 kB\nHugePages_Total:   7\n";
        assert_eq!((meminfo(text, "MemTotal"), meminfo(text, "HugePages_Total")), (102_400, 7));
        assert_eq!(cpuinfo("model\t\t: 85\nmodel name\t: A CPU\n", "model name"), "A CPU");
    }
}
