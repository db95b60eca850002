//! `ChunkService`: artifacts of builds on this node's disk, for nodes that do not find them in the
//! object store yet.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use nidus_proto::node::chunk_service_server::ChunkService;
use nidus_proto::node::*;
use nidus_storage::{Artifact, ArtifactFile, BuildId, Builds, Held, StorageError};
use tonic::{Request, Response, Status};

/// Bytes of an artifact in one message. Clients accept 4 MiB.
const PIECE: u64 = 1 << 20;

const NOT_AVAILABLE: PeerAvailability = PeerAvailability { not_available: true, use_storage: false };
const USE_STORAGE: PeerAvailability = PeerAvailability { not_available: false, use_storage: true };

/// The service over the builds of a node. What is still being written is none of them.
pub(crate) struct Chunks(pub Arc<Builds>);

/// What a request comes to.
enum Found {
    File(ArtifactFile),
    Elsewhere(PeerAvailability),
}

/// The artifact of this name. E2B's nodes may add how it is compressed in storage, but want it as it is.
fn artifact(name: &str) -> Result<Artifact, Status> {
    let plain = name.strip_suffix(".zstd").or_else(|| name.strip_suffix(".lz4")).unwrap_or(name);
    let known = Artifact::ALL.into_iter().filter(|a| *a != Artifact::Checksums);
    let unknown = || Status::invalid_argument(format!("'{name}' is not an artifact of a build"));
    known.into_iter().find(|a| a.file_name() == plain).ok_or_else(unknown)
}

fn is_seekable(artifact: Artifact) -> bool {
    matches!(artifact, Artifact::Memfile | Artifact::Rootfs)
}

fn status(e: StorageError) -> Status {
    match e {
        e if e.is_damage() => Status::data_loss(e.to_string()),
        StorageError::Shutdown { .. } => Status::unavailable(e.to_string()),
        e => Status::internal(e.to_string()),
    }
}

/// The range of a request, which must lie within the artifact.
fn range(offset: i64, length: i64, file: &ArtifactFile) -> Result<Range<u64>, Status> {
    let numbers = (u64::try_from(offset), u64::try_from(length));
    let (Ok(offset), Ok(length)) = numbers else {
        return Err(Status::invalid_argument(format!("{length} bytes at {offset} are no range")));
    };
    match offset.checked_add(length) {
        Some(end) if end <= file.size() => Ok(offset..end),
        _ => Err(Status::out_of_range(format!(
            "{length} bytes at {offset} are not within the {} bytes of {} of build {}",
            file.size(),
            file.artifact(),
            file.build()
        ))),
    }
}

/// The range of an artifact, read while it is taken.
fn pieces<T: Send + 'static>(
    file: ArtifactFile,
    range: Range<u64>,
    message: fn(Bytes) -> T,
) -> BoxStream<'static, Result<T, Status>> {
    let file = Arc::new(file);
    stream::try_unfold(range, move |left| {
        let file = file.clone();
        async move {
            if left.is_empty() {
                return Ok(None);
            }
            let end = left.end.min((left.start / PIECE + 1) * PIECE);
            let bytes = file.read_range(left.start..end).await.map_err(status)?;
            Ok(Some((message(bytes.into()), end..left.end)))
        }
    })
    .boxed()
}

fn only<T: Send + 'static>(message: T) -> BoxStream<'static, Result<T, Status>> {
    stream::once(async { Ok(message) }).boxed()
}

impl Chunks {
    async fn find(&self, build: &str, artifact: Artifact) -> Result<Found, Status> {
        let id: Result<BuildId, _> = build.parse();
        let id = id.map_err(|_| Status::invalid_argument(format!("build id '{build}' is not a UUID")))?;
        Ok(match self.0.held(id, artifact).await.map_err(status)? {
            Held::Here(file) => Found::File(file),
            Held::Uploaded => Found::Elsewhere(USE_STORAGE),
            Held::Nowhere => Found::Elsewhere(NOT_AVAILABLE),
        })
    }
}

#[tonic::async_trait]
impl ChunkService for Chunks {
    type ReadAtBuildSeekableStream = BoxStream<'static, Result<ReadAtBuildSeekableResponse, Status>>;
    type GetBuildBlobStream = BoxStream<'static, Result<GetBuildBlobResponse, Status>>;

    async fn get_build_file_size(
        &self,
        request: Request<GetBuildFileSizeRequest>,
    ) -> Result<Response<GetBuildFileSizeResponse>, Status> {
        let GetBuildFileSizeRequest { build_id, name } = request.into_inner();
        let (total_size, availability) = match self.find(&build_id, artifact(&name)?).await? {
            Found::File(file) => (file.size().cast_signed(), None),
            Found::Elsewhere(availability) => (0, Some(availability)),
        };
        Ok(Response::new(GetBuildFileSizeResponse { total_size, availability }))
    }

    async fn get_build_file_exists(
        &self,
        request: Request<GetBuildFileExistsRequest>,
    ) -> Result<Response<GetBuildFileExistsResponse>, Status> {
        let GetBuildFileExistsRequest { build_id, name } = request.into_inner();
        let availability = match self.find(&build_id, artifact(&name)?).await? {
            Found::File(_) => None,
            Found::Elsewhere(availability) => Some(availability),
        };
        Ok(Response::new(GetBuildFileExistsResponse { availability }))
    }

    async fn read_at_build_seekable(
        &self,
        request: Request<ReadAtBuildSeekableRequest>,
    ) -> Result<Response<Self::ReadAtBuildSeekableStream>, Status> {
        let ReadAtBuildSeekableRequest { build_id, name, offset, length } = request.into_inner();
        let artifact = artifact(&name)?;
        if !is_seekable(artifact) {
            return Err(Status::invalid_argument(format!("{name} is read as a whole, with GetBuildBlob")));
        }
        let data = |data| ReadAtBuildSeekableResponse { data, availability: None };
        Ok(Response::new(match self.find(&build_id, artifact).await? {
            Found::File(file) => {
                let range = range(offset, length, &file)?;
                pieces(file, range, data)
            }
            Found::Elsewhere(availability) => {
                only(ReadAtBuildSeekableResponse { availability: Some(availability), ..Default::default() })
            }
        }))
    }

    async fn get_build_blob(
        &self,
        request: Request<GetBuildBlobRequest>,
    ) -> Result<Response<Self::GetBuildBlobStream>, Status> {
        let GetBuildBlobRequest { build_id, name } = request.into_inner();
        let artifact = artifact(&name)?;
        if is_seekable(artifact) {
            return Err(Status::invalid_argument(format!(
                "{name} is read in parts, with ReadAtBuildSeekable"
            )));
        }
        let data = |data| GetBuildBlobResponse { data, availability: None };
        Ok(Response::new(match self.find(&build_id, artifact).await? {
            Found::File(file) => {
                let range = 0..file.size();
                pieces(file, range, data)
            }
            Found::Elsewhere(availability) => {
                only(GetBuildBlobResponse { availability: Some(availability), ..Default::default() })
            }
        }))
    }
}
