//! The service through gRPC, over builds on a disk.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use nidus_proto::node::chunk_service_client::ChunkServiceClient;
use nidus_proto::node::chunk_service_server::ChunkServiceServer;
use nidus_proto::node::*;
use nidus_storage::{Artifact, BuildId, Builds};
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Status};

use crate::chunk_service::Chunks;

const SIZE: usize = 2_500_001;

type Client = ChunkServiceClient<Channel>;

/// A node with one build, which has a memfile, metadata and no other artifact.
async fn node(dir: &Path) -> (Client, Arc<Builds>, BuildId, Vec<u8>) {
    let builds = Arc::new(Builds::open(dir).unwrap());
    let (build, memfile) = (BuildId::random(), (0..SIZE).map(|_| rand::random()).collect::<Vec<u8>>());
    let staged = builds.stage(build).await.unwrap();
    staged.write(Artifact::Metadata, "{}").await.unwrap();
    staged.write(Artifact::Memfile, memfile.clone()).await.unwrap();
    staged.commit().await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server =
        tonic::transport::Server::builder().add_service(ChunkServiceServer::new(Chunks(builds.clone())));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    (Client::connect(address).await.unwrap(), builds, build, memfile)
}

/// The bytes of all messages, of which none has more than 1 MiB, or what is said of where they are.
async fn read(
    client: &mut Client,
    build_id: &str,
    name: &str,
    offset: i64,
    length: i64,
) -> Result<Result<Vec<u8>, PeerAvailability>, Status> {
    let (build_id, name) = (build_id.to_owned(), name.to_owned());
    let request = ReadAtBuildSeekableRequest { build_id, name, offset, length };
    let mut messages = client.read_at_build_seekable(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(message) = messages.message().await? {
        if let Some(availability) = message.availability {
            return Ok(Err(availability));
        }
        assert!((1..=1 << 20).contains(&message.data.len()));
        bytes.extend(message.data);
    }
    Ok(Ok(bytes))
}

async fn blob(client: &mut Client, build_id: &str, name: &str) -> Result<Vec<GetBuildBlobResponse>, Status> {
    let request = GetBuildBlobRequest { build_id: build_id.to_owned(), name: name.to_owned() };
    let mut messages = client.get_build_blob(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(message) = messages.message().await? {
        all.push(message);
    }
    Ok(all)
}

fn absent() -> PeerAvailability {
    PeerAvailability { not_available: true, use_storage: false }
}

#[tokio::test]
async fn ranges_are_read_exactly() {
    let dir = TempDir::new().unwrap();
    let (mut client, _, build, memfile) = node(dir.path()).await;
    let id = build.to_string();
    let size = GetBuildFileSizeRequest { build_id: id.clone(), name: "memfile.zstd".into() };
    let size = client.get_build_file_size(size).await.unwrap().into_inner();
    assert_eq!(size, GetBuildFileSizeResponse { total_size: SIZE as i64, availability: None });
    for (offset, length) in [
        (0, SIZE),
        (0, 4096),
        (4095, 2),
        (1, SIZE - 1),
        (SIZE - 1, 1),
        (1 << 20, 1 << 20),
        ((1 << 20) - 1, 2),
        (SIZE, 0),
    ] {
        let bytes = read(&mut client, &id, "memfile", offset as i64, length as i64).await.unwrap().unwrap();
        assert!(bytes == memfile[offset..offset + length], "{length} bytes at {offset}");
    }
    for (offset, length, code) in [
        (0, SIZE as i64 + 1, Code::OutOfRange),
        (SIZE as i64, 1, Code::OutOfRange),
        (i64::MAX, i64::MAX, Code::OutOfRange),
        (-1, 1, Code::InvalidArgument),
        (0, -1, Code::InvalidArgument),
    ] {
        let error = read(&mut client, &id, "memfile", offset, length).await.unwrap_err();
        assert_eq!(error.code(), code, "{length} bytes at {offset}");
    }
    let metadata = blob(&mut client, &id, "metadata.json").await.unwrap();
    assert_eq!(metadata, [GetBuildBlobResponse { data: "{}".into(), availability: None }]);
}

#[tokio::test]
async fn what_is_not_here_is_said_and_what_cannot_be_is_refused() {
    let dir = TempDir::new().unwrap();
    let (mut client, builds, build, _) = node(dir.path()).await;
    let (id, other) = (build.to_string(), BuildId::random().to_string());
    // One that is still being written, one that has no such artifact, one that is nowhere.
    let half = BuildId::random();
    let staged = builds.stage(half).await.unwrap();
    staged.write(Artifact::Memfile, "half").await.unwrap();
    for (build_id, name) in
        [(half.to_string(), "memfile"), (id.clone(), "rootfs.ext4"), (other.clone(), "memfile")]
    {
        assert_eq!(read(&mut client, &build_id, name, 0, 4).await.unwrap(), Err(absent()));
        let request = GetBuildFileSizeRequest { build_id: build_id.clone(), name: name.into() };
        let size = client.get_build_file_size(request).await.unwrap().into_inner();
        assert_eq!(size.availability, Some(absent()));
        let request = GetBuildFileExistsRequest { build_id, name: name.into() };
        let exists = client.get_build_file_exists(request).await.unwrap().into_inner();
        assert_eq!(exists.availability, Some(absent()));
    }
    let messages = blob(&mut client, &other, "snapfile").await.unwrap();
    assert_eq!(messages, [GetBuildBlobResponse { data: Default::default(), availability: Some(absent()) }]);
    let request = GetBuildFileExistsRequest { build_id: id.clone(), name: "metadata.json".into() };
    assert_eq!(client.get_build_file_exists(request).await.unwrap().into_inner().availability, None);

    for (build_id, name) in
        [(&id[..], "../memfile"), (&id, ""), (&id, "checksums"), (&id, "snapfile"), ("../x", "memfile")]
    {
        let error = read(&mut client, build_id, name, 0, 1).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{build_id} {name}");
    }
    assert_eq!(blob(&mut client, &id, "memfile").await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_flipped_bit_is_an_error_that_names_the_artifact() {
    let dir = TempDir::new().unwrap();
    let (mut client, builds, build, mut memfile) = node(dir.path()).await;
    let path = builds.local().path(build, Artifact::Memfile);
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    memfile[2_000_000] ^= 4;
    fs::write(&path, &memfile).unwrap();
    let id = build.to_string();
    let good = read(&mut client, &id, "memfile", 0, 1_900_000).await.unwrap().unwrap();
    assert!(good == memfile[..1_900_000]);
    for (offset, length) in [(0, SIZE as i64), (2_000_001, 1)] {
        let error = read(&mut client, &id, "memfile", offset, length).await.unwrap_err();
        assert_eq!(error.code(), Code::DataLoss);
        assert!(error.message().contains("memfile") && error.message().contains(&id), "{error}");
    }
    fs::write(&path, &memfile[1..]).unwrap();
    assert_eq!(read(&mut client, &id, "memfile", 0, 1).await.unwrap_err().code(), Code::DataLoss);
}
