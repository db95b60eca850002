//! The wire contract, checked from both sides: the descriptors that were compiled, and the bytes that
//! come out of the generated types.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use nidus_proto::{FILE_DESCRIPTOR_SET, node};
use prost::Message;
use prost_types::FileDescriptorSet;

/// Fields by message, `number name`, and methods by service with their gRPC path.
fn tables() -> (BTreeMap<String, Vec<String>>, Vec<String>) {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mut messages = BTreeMap::new();
    let mut methods = Vec::new();
    for file in &set.file {
        if file.package().starts_with("google.") {
            continue;
        }
        let prefix = if file.package().is_empty() { String::new() } else { format!("{}.", file.package()) };
        for message in &file.message_type {
            // From 1000 on they are ours.
            let theirs = message.field.iter().filter(|f| f.number() < 1000);
            let mut fields: Vec<_> = theirs.map(|f| (f.number(), f.name())).collect();
            fields.sort_unstable();
            let fields = fields.into_iter().map(|(number, name)| format!("{number} {name}")).collect();
            let clash = messages.insert(format!("{prefix}{}", message.name()), fields);
            assert!(clash.is_none(), "two messages {}", message.name());
        }
        for service in &file.service {
            for method in &service.method {
                methods.push(format!("/{prefix}{}/{}", service.name(), method.name()));
            }
        }
    }
    (messages, methods)
}

#[test]
fn field_numbers_are_those_of_the_contract() {
    let (messages, _) = tables();
    let expect = |message: &str, fields: &str| {
        let expected: Vec<_> = fields.split(", ").map(str::to_owned).collect();
        assert_eq!(messages[message], expected, "{message}");
    };
    expect(
        "SandboxConfig",
        "1 template_id, 2 build_id, 3 kernel_version, 4 firecracker_version, 5 huge_pages, 6 sandbox_id, \
         7 env_vars, 8 metadata, 9 alias, 10 envd_version, 11 vcpu, 12 ram_mb, 13 team_id, \
         14 max_sandbox_length, 15 total_disk_size_mb, 16 snapshot, 17 base_template_id, 18 auto_pause, \
         19 envd_access_token, 20 execution_id, 21 allow_internet_access, 22 network, 23 volumeMounts, \
         24 auto_resume, 25 auto_pause_filesystem_only, 26 events_ttl_days, 27 iam",
    );
    expect(
        "RunningSandbox",
        "1 config, 2 client_id, 3 start_time, 4 end_time, 5 sandbox_id, 6 team_id, 7 execution_id, \
         8 vcpu, 9 ram_mb",
    );
    expect("SandboxCheckpointRequest", "1 sandbox_id, 3 build_id, 4 metadata");
    expect("CachedBuildInfo", "1 build_id, 2 expiration_time");
    expect(
        "TemplateConfig",
        "1 templateID, 2 buildID, 3 memoryMB, 4 vCpuCount, 5 diskSizeMB, 6 kernelVersion, \
         7 firecrackerVersion, 8 startCommand, 9 hugePages, 10 readyCommand, 11 fromImage, 12 force, \
         13 steps, 14 fromTemplate, 15 fromImageRegistry, 16 teamID",
    );
    expect("TemplateBuildStatusResponse", "1 status, 2 metadata, 5 logEntries, 6 reason");
    expect("ServiceStatusChangeRequest", "2 service_status");
    expect("ReadAtBuildSeekableRequest", "1 build_id, 2 name, 3 offset, 4 length");
    expect("proxy.SandboxResumeRequest", "1 sandbox_id");
    expect("VolumeInfo", "1 volume_id, 2 volume_type, 3 team_id");
    expect(
        "EntryInfo",
        "1 name, 2 type, 3 path, 4 size, 5 mode, 6 uid, 7 gid, 8 modified_time, 9 symlink_target, \
         10 created_time, 11 accessed_time",
    );
    expect("UserError", "1 code, 2 message, 3 http_status");
    expect("CreateDirRequest", "1 volume, 2 path, 3 mode, 4 uid, 5 gid, 6 create_parents");
    expect("VolumeFileCreateStart", "1 volume, 2 path, 3 mode, 4 uid, 5 gid, 6 force");
    expect("CreateFileRequest", "1 start, 2 content, 3 finish");
    expect("GetFileResponse", "1 start, 2 content, 3 finish");
    expect("StatPathRequest", "1 volume, 2 path, 3 follow_symlinks");
    let info = &messages["ServiceInfoResponse"];
    assert!(info.contains(&"51 service_status".to_owned()));
    assert!(info.contains(&"108 metric_cpu_count".to_owned()));
    assert!(!info.iter().any(|field| field.starts_with("107 ")), "107 is not in use");
}

#[test]
fn grpc_paths_are_those_of_the_contract() {
    let (_, methods) = tables();
    for rpc in ["Create", "Update", "List", "Delete", "Pause", "Checkpoint", "ListCachedBuilds"] {
        assert!(methods.contains(&format!("/SandboxService/{rpc}")), "{rpc}");
    }
    for path in [
        "/TemplateService/TemplateCreate",
        "/TemplateService/TemplateBuildStatus",
        "/TemplateService/TemplateBuildDelete",
        "/TemplateService/InitLayerFileUpload",
        "/InfoService/ServiceInfo",
        "/InfoService/ServiceStatusOverride",
        "/ChunkService/GetBuildFileSize",
        "/ChunkService/GetBuildFileExists",
        "/ChunkService/ReadAtBuildSeekable",
        "/ChunkService/GetBuildBlob",
        "/proxy.SandboxService/ResumeSandbox",
        "/VolumeService/CreateVolume",
        "/VolumeService/DeleteVolume",
        "/VolumeService/CreateDir",
        "/VolumeService/ListDir",
        "/VolumeService/CreateFile",
        "/VolumeService/GetFile",
        "/VolumeService/DeletePath",
        "/VolumeService/StatPath",
        "/VolumeService/UpdatePath",
    ] {
        assert!(methods.contains(&path.to_owned()), "{path}");
    }
    use node::sandbox_service_server::SERVICE_NAME;
    assert_eq!(SERVICE_NAME, "SandboxService");
    assert_eq!(nidus_proto::proxy::sandbox_service_server::SERVICE_NAME, "proxy.SandboxService");
}

#[test]
fn encoded_bytes_are_as_counted_by_hand() {
    // Tag = number << 3 | wire type (0 varint, 2 length-delimited), as the encoding guide defines it.
    let config = node::SandboxConfig {
        template_id: "t".into(),
        vcpu: 2,
        snapshot: true,
        envd_access_token: Some(String::new()),
        allow_internet_access: Some(false),
        ..Default::default()
    };
    let expected: &[u8] = &[
        0x0a, 0x01, b't', // 1: "t"
        0x58, 0x02, // 11: 2
        0x80, 0x01, 0x01, // 16: true
        0x9a, 0x01, 0x00, // 19: "" is present, so it is sent
        0xa8, 0x01, 0x00, // 21: false is present, so it is sent
    ];
    assert_eq!(config.encode_to_vec(), expected);
    assert_eq!(node::SandboxConfig::decode(expected).unwrap(), config);

    let info = node::ServiceInfoResponse {
        service_status: node::ServiceInfoStatus::Draining.into(),
        metric_cpu_count: 3,
        ..Default::default()
    };
    // 51 << 3 = 408 = 0x98 0x03; 108 << 3 = 864 = 0xe0 0x06
    assert_eq!(info.encode_to_vec(), [0x98, 0x03, 0x01, 0xe0, 0x06, 0x03]);

    let range = node::ReadAtBuildSeekableRequest { offset: 4096, length: -1, ..Default::default() };
    assert_eq!(
        range.encode_to_vec(),
        [0x18, 0x80, 0x20, 0x20, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]
    );
}

#[test]
fn unknown_fields_of_a_newer_peer_are_skipped() {
    // Field 1 "s", then field 200 (varint 7) that this version does not know.
    let bytes: &[u8] = &[0x0a, 0x01, b's', 0xc0, 0x0c, 0x07];
    let request = node::SandboxDeleteRequest::decode(bytes).unwrap();
    assert_eq!(request.sandbox_id, "s");
    assert_eq!(request.kill_reason, None);
}
