//! `VolumeService` of the contract, over the node's directory of volumes.

use std::io::Read;
use std::pin::Pin;
use std::sync::Arc;

use nidus_proto::node::volume_service_server::VolumeService;
use nidus_proto::node::*;
use nidus_volume::{Attributes, Entry, Kind, VolumeError, VolumePath, Volumes};
use prost::Message;
use prost_types::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use uuid::Uuid;

/// Bytes of a piece of a file.
const PIECE: usize = 256 << 10;

/// The service over a node's volumes.
pub(crate) struct VolumesOf(pub Arc<Volumes>);

/// `google.rpc.Status`, which gRPC carries as the details of an error.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// With a detail that says how it is to be told over HTTP.
fn user_error(code: Code, kind: UserErrorCode, http_status: u32, message: String) -> Status {
    let user = UserError { code: kind as i32, message: message.clone(), http_status };
    let detail = prost_types::Any {
        type_url: "type.googleapis.com/UserError".to_owned(),
        value: user.encode_to_vec(),
    };
    let details = RpcStatus { code: code as i32, message: message.clone(), details: vec![detail] };
    Status::with_details(code, message, details.encode_to_vec().into())
}

fn status(e: VolumeError) -> Status {
    let text = e.to_string();
    match e {
        VolumeError::NoVolume(_) => Status::not_found(text),
        VolumeError::NotFound(_) => user_error(Code::NotFound, UserErrorCode::PathNotFound, 404, text),
        VolumeError::NotADirectory(_) | VolumeError::NotAFile(_) => {
            user_error(Code::FailedPrecondition, UserErrorCode::InvalidRequest, 409, text)
        }
        VolumeError::Exists(_) => {
            user_error(Code::AlreadyExists, UserErrorCode::PathAlreadyExists, 409, text)
        }
        VolumeError::Root => user_error(Code::InvalidArgument, UserErrorCode::CannotDeleteRoot, 400, text),
        VolumeError::Depth(..) => {
            user_error(Code::InvalidArgument, UserErrorCode::DepthOutOfRange, 400, text)
        }
        VolumeError::Path(_) | VolumeError::TooMuch { .. } => {
            user_error(Code::InvalidArgument, UserErrorCode::InvalidRequest, 400, text)
        }
        VolumeError::NoSpace(_) => Status::resource_exhausted(text),
        VolumeError::Io { .. } => {
            tracing::error!("a volume failed: {text}");
            Status::internal("the volume's files could not be used")
        }
    }
}

fn stamp(t: chrono::DateTime<chrono::Utc>) -> Option<Timestamp> {
    Some(crate::sandbox_service::from_time(t))
}

fn entry_info(e: Entry) -> EntryInfo {
    let kind = match e.kind {
        Kind::File => FileType::File,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Other => FileType::Unspecified,
    };
    EntryInfo {
        name: e.name,
        r#type: kind as i32,
        path: e.path,
        size: i64::try_from(e.size).unwrap_or(i64::MAX),
        mode: e.mode,
        uid: e.uid,
        gid: e.gid,
        modified_time: stamp(e.modified),
        symlink_target: e.target,
        created_time: stamp(e.created),
        accessed_time: stamp(e.accessed),
    }
}

fn volume_id(volume: Option<VolumeInfo>) -> Result<Uuid, Status> {
    let id = volume.ok_or_else(|| Status::invalid_argument("the request has no volume"))?.volume_id;
    id.parse().map_err(|_| Status::not_found(format!("volume id '{}' is not a UUID", id.escape_debug())))
}

fn path(text: &str) -> Result<VolumePath, Status> {
    VolumePath::parse(text).map_err(status)
}

impl VolumesOf {
    /// Does something with the volumes where it may block.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Volumes) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, Status> {
        let volumes = self.0.clone();
        let done = tokio::task::spawn_blocking(move || work(&volumes)).await;
        done.map_err(|e| Status::internal(format!("the volume's work broke off: {e}")))?.map_err(status)
    }
}

#[tonic::async_trait]
impl VolumeService for VolumesOf {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let id = volume_id(request.into_inner().volume)?;
        self.work(move |v| v.create(id)).await?;
        Ok(Response::new(CreateVolumeResponse { volume_type: Some("local".to_owned()) }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = volume_id(request.into_inner().volume)?;
        self.work(move |v| v.delete(id)).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn create_dir(
        &self,
        request: Request<CreateDirRequest>,
    ) -> Result<Response<CreateDirResponse>, Status> {
        let r = request.into_inner();
        let (id, path) = (volume_id(r.volume)?, path(&r.path)?);
        let attributes = Attributes { mode: r.mode, uid: r.uid, gid: r.gid };
        let made = self.work(move |v| v.make_dir(id, &path, attributes, r.create_parents)).await?;
        Ok(Response::new(CreateDirResponse { entry: Some(entry_info(made)) }))
    }

    async fn list_dir(&self, request: Request<ListDirRequest>) -> Result<Response<ListDirResponse>, Status> {
        let r = request.into_inner();
        let (id, path) = (volume_id(r.volume)?, path(&r.path)?);
        // None said is one level.
        let found = self.work(move |v| v.list(id, &path, r.depth.max(1))).await?;
        let files = found.into_iter().map(|e| VolumeDirectoryItem { entry: Some(entry_info(e)) }).collect();
        Ok(Response::new(ListDirResponse { files }))
    }

    async fn create_file(
        &self,
        request: Request<Streaming<CreateFileRequest>>,
    ) -> Result<Response<CreateFileResponse>, Status> {
        use create_file_request::Message as M;
        let bad = |text| Status::invalid_argument(text);
        let mut pieces = request.into_inner();
        let Some(M::Start(start)) = pieces.message().await?.and_then(|m| m.message) else {
            return Err(bad("a file begins with its start"));
        };
        let (id, path) = (volume_id(start.volume)?, path(&start.path)?);
        let attributes = Attributes { mode: start.mode, uid: start.uid, gid: start.gid };
        let at = path.clone();
        let mut upload = self.work(move |v| v.write(id, &at, attributes, start.force)).await?;
        loop {
            // Without its finish, what has come so far is no file: the upload is dropped.
            match pieces.message().await?.and_then(|m| m.message) {
                Some(M::Content(c)) => {
                    upload = self.work(move |_| upload.write(&c.content).map(|()| upload)).await?;
                }
                Some(M::Finish(_)) => break,
                Some(M::Start(_)) => return Err(bad("a file has one start")),
                None => return Err(bad("a file ends with its finish")),
            }
        }
        let made = self
            .work(move |v| {
                upload.finish()?;
                v.stat(id, &path, false)
            })
            .await?;
        Ok(Response::new(CreateFileResponse { entry: Some(entry_info(made)) }))
    }

    type GetFileStream = Pin<Box<dyn Stream<Item = Result<GetFileResponse, Status>> + Send>>;

    async fn get_file(
        &self,
        request: Request<GetFileRequest>,
    ) -> Result<Response<Self::GetFileStream>, Status> {
        use get_file_response::Message as M;
        let r = request.into_inner();
        let (id, path) = (volume_id(r.volume)?, path(&r.path)?);
        let text = path.text();
        let (mut file, size) = self.work(move |v| v.read(id, &path)).await?;
        let (sender, receiver) = mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            let message = |m| GetFileResponse { message: Some(m) };
            let start = VolumeFileGetResponseStart { size: i64::try_from(size).unwrap_or(i64::MAX) };
            let mut next = Ok(message(M::Start(start)));
            // What is added to the file meanwhile is not of the size that was said.
            let mut left = size;
            // An end of the channel is a client that has gone.
            while sender.blocking_send(next).is_ok() {
                if left == 0 {
                    let _ = sender.blocking_send(Ok(message(M::Finish(VolumeFileGetResponseFinish {}))));
                    return;
                }
                let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
                next = match file.read(&mut piece) {
                    Ok(0) => Err(Status::aborted(format!("{text} became shorter while it was read"))),
                    Ok(n) => {
                        piece.truncate(n);
                        left -= n as u64;
                        Ok(message(M::Content(VolumeFileGetResponseContent { content: piece.into() })))
                    }
                    Err(e) => Err(status(VolumeError::Io { action: "read", path: text.clone(), source: e })),
                };
                if next.is_err() {
                    let _ = sender.blocking_send(next);
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn delete_path(
        &self,
        request: Request<DeletePathRequest>,
    ) -> Result<Response<DeletePathResponse>, Status> {
        let r = request.into_inner();
        let (id, path) = (volume_id(r.volume)?, path(&r.path)?);
        self.work(move |v| v.remove(id, &path)).await?;
        Ok(Response::new(DeletePathResponse {}))
    }

    async fn stat_path(
        &self,
        request: Request<StatPathRequest>,
    ) -> Result<Response<StatPathResponse>, Status> {
        let r = request.into_inner();
        let (id, path) = (volume_id(r.volume)?, path(&r.path)?);
        let found = self.work(move |v| v.stat(id, &path, r.follow_symlinks)).await?;
        Ok(Response::new(StatPathResponse { entry: Some(entry_info(found)) }))
    }

    async fn update_path(
        &self,
        request: Request<UpdatePathRequest>,
    ) -> Result<Response<UpdatePathResponse>, Status> {
        let r = request.into_inner();
        let (id, path) = (volume_id(r.volume)?, path(&r.path)?);
        let attributes = Attributes { mode: r.mode, uid: r.uid, gid: r.gid };
        let changed = self.work(move |v| v.update(id, &path, attributes)).await?;
        Ok(Response::new(UpdatePathResponse { entry: Some(entry_info(changed)) }))
    }
}
