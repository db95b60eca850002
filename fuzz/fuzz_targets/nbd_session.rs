//! A whole NBD connection whose client sends arbitrary bytes to a real overlay: it must end.
#![no_main]

use std::{sync::Arc, time::Duration};

use libfuzzer_sys::fuzz_target;
use nidus_block::{
    FileDevice, Overlay,
    nbd::{Export, serve},
};
use tokio::io::{AsyncWriteExt, copy, sink};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

fuzz_target!(|input: (u8, &[u8])| {
    let (opening, bytes) = input;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let dir = tempfile::TempDir::new().expect("a directory");
        std::fs::write(dir.path().join("base"), [7; 70_000]).expect("a base file");
        let base = FileDevice::open(dir.path().join("base")).await.expect("a base device");
        let overlay = Overlay::create(Arc::new(base), dir.path().join("cache")).await.expect("an overlay");
        let export = Export::new("root", Arc::new(overlay));
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let (mut from_server, mut to_server) = ours.into_split();
        let client = async {
            let mut start: Vec<u8> = Vec::new();
            if opening % 3 > 0 {
                start.extend(b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0");
            }
            if opening % 3 > 1 {
                start.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04root\0\0");
            }
            let send = async {
                // The server may leave first.
                let _ = to_server.write_all(&start).await;
                let _ = to_server.write_all(bytes).await;
                let _ = to_server.shutdown().await;
            };
            let mut nowhere = sink();
            let _ = tokio::join!(send, copy(&mut from_server, &mut nowhere));
        };
        let stop = CancellationToken::new();
        let server = serve(theirs, &export, &stop);
        tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(server, client) })
            .await
            .expect("the session hangs");
    });
});
