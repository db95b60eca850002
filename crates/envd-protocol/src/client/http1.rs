//! One HTTP/1.1 exchange over one connection.

use std::future::Future;
use std::io;
use std::pin::Pin;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::EnvdError;

type Driver = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A response whose connection is driven as the body is read; dropping it closes the connection.
pub(super) struct Exchange {
    pub response: Response<Incoming>,
    driver: Driver,
    driver_done: bool,
}

/// Sends `request` over `stream`. No task is spawned: the connection lives and dies with the
/// returned value, so that a dropped call leaves nothing behind.
pub(super) async fn exchange<B>(
    stream: TcpStream,
    address: &str,
    request: Request<B>,
) -> Result<Exchange, EnvdError>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let wrap = |source| EnvdError::Http { address: address.to_owned(), source };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(wrap)?;
    let mut driver: Driver = Box::pin(async move {
        // A broken connection shows as an error of the request or of its body.
        let _ = connection.await;
    });
    let mut send = Box::pin(sender.send_request(request));
    let mut driver_done = false;
    let response = std::future::poll_fn(|cx| {
        if !driver_done && driver.as_mut().poll(cx).is_ready() {
            driver_done = true;
        }
        send.as_mut().poll(cx)
    })
    .await
    .map_err(wrap)?;
    Ok(Exchange { response, driver, driver_done })
}

impl Exchange {
    /// The next bytes of the body; `None` at its end.
    pub async fn data(&mut self) -> Option<Result<Bytes, hyper::Error>> {
        loop {
            let body = self.response.body_mut();
            let (driver, done) = (&mut self.driver, &mut self.driver_done);
            let mut frame = std::pin::pin!(body.frame());
            let next = std::future::poll_fn(|cx| {
                if !*done && driver.as_mut().poll(cx).is_ready() {
                    *done = true;
                }
                frame.as_mut().poll(cx)
            })
            .await;
            match next? {
                // Trailers say nothing in Connect.
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_) => continue,
                },
                Err(e) => return Some(Err(e)),
            }
        }
    }

    /// The rest of the body, as far as `limit` bytes.
    pub async fn collect(&mut self, limit: usize) -> Result<Collected, hyper::Error> {
        let mut out = Vec::new();
        while let Some(data) = self.data().await {
            out.extend_from_slice(&data?);
            if out.len() > limit {
                out.truncate(limit);
                return Ok(Collected { bytes: out, truncated: true });
            }
        }
        Ok(Collected { bytes: out, truncated: false })
    }
}

/// A body, or its beginning.
pub(super) struct Collected {
    pub bytes: Vec<u8>,
    pub truncated: bool,
}

/// Connects without Nagle's delay: requests are small and wanted at once.
pub(super) async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
