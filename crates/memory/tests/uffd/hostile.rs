//! First messages that are not as they should be.

use std::{
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nidus_memory::uffd::{Handshake, HandshakeError, LayoutError, MAX_MESSAGE};
use tokio::runtime::Runtime;

use crate::{
    child::{EVENT_FORK, EVENT_REMOVE, send, userfaultfd},
    rig::receive,
};

const GOOD: &str = r#"[{"base_host_virt_addr":1048576,"size":8192,"offset":0,"page_size":4096}]"#;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What comes of a message with these descriptors, after which the sender hangs up.
fn outcome(bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Handshake, HandshakeError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&theirs, bytes, fds);
    theirs.shutdown(Shutdown::Write).unwrap();
    receive(&runtime(), ours, 8192)
}

#[test]
fn one_userfaultfd_and_a_layout_or_nothing() {
    let uffd = userfaultfd(EVENT_REMOVE);
    let file = tempfile::tempfile().unwrap();
    let (uffd, file) = (uffd.as_fd(), file.as_fd());
    assert_eq!(outcome(GOOD.as_bytes(), &[uffd]).unwrap().layout().pages(), 2);

    let text = GOOD.as_bytes();
    let refused = |bytes, fds: &[BorrowedFd<'_>]| outcome(bytes, fds).unwrap_err();
    assert!(matches!(refused(text, &[]), HandshakeError::Descriptors { count: 0 }));
    assert!(matches!(refused(text, &[uffd, file]), HandshakeError::Descriptors { count: 2 }));
    assert!(matches!(refused(text, &[uffd; 16]), HandshakeError::Descriptors { .. }));
    assert!(matches!(refused(text, &[file]), HandshakeError::NotUserfaultfd));
    assert!(matches!(refused(&text[..30], &[uffd]), HandshakeError::Closed { received: 30 }));
    assert!(matches!(refused(b"{}", &[uffd]), HandshakeError::Layout(LayoutError::Json(_))));
    assert!(matches!(refused(b"[]", &[uffd]), HandshakeError::Layout(LayoutError::Count { count: 0 })));
    let too_long = [b' '; MAX_MESSAGE + 1];
    assert!(matches!(refused(&too_long, &[uffd]), HandshakeError::TooLong));
    let outside = GOOD.replace("8192", "12288");
    assert!(matches!(
        refused(outside.as_bytes(), &[uffd]),
        HandshakeError::Layout(LayoutError::Outside { .. })
    ));
}

#[test]
fn descriptors_in_a_wrong_state() {
    let forking = userfaultfd(EVENT_REMOVE | EVENT_FORK);
    let error = outcome(GOOD.as_bytes(), &[forking.as_fd()]).unwrap_err();
    assert!(matches!(error, HandshakeError::Features { features: 0xa, refused: 0x2 }), "{error}");
    // SAFETY: plain values; the result is checked and is a new descriptor.
    let raw = unsafe {
        use std::os::fd::FromRawFd;
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
        assert!(fd >= 0);
        std::os::fd::OwnedFd::from_raw_fd(fd)
    };
    let error = outcome(GOOD.as_bytes(), &[raw.as_fd()]).unwrap_err();
    assert!(matches!(error, HandshakeError::NotUserfaultfd), "{error}");
}

#[test]
fn a_message_in_pieces_and_one_that_never_ends() {
    let uffd = userfaultfd(EVENT_REMOVE);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let runtime = runtime();
    ours.set_nonblocking(true).unwrap();
    let received = runtime.block_on(async {
        let ours = tokio::net::UnixStream::from_std(ours).unwrap();
        let task = tokio::spawn(Handshake::receive(ours, 8192, Duration::from_secs(60)));
        for (number, byte) in GOOD.as_bytes().iter().enumerate() {
            let fds = [uffd.as_fd()];
            send(&theirs, &[*byte], if number == 0 { &fds } else { &[] });
            tokio::task::yield_now().await;
        }
        task.await.unwrap()
    });
    assert_eq!(received.unwrap().layout().pages(), 2);

    let (ours, _silent) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let error = runtime.block_on(async {
        let ours = tokio::net::UnixStream::from_std(ours).unwrap();
        Handshake::receive(ours, 8192, Duration::from_millis(20)).await.unwrap_err()
    });
    assert!(matches!(error, HandshakeError::Timeout { .. }));
}

#[test]
fn what_was_sent_is_closed_again() {
    // Other tests of this process open and close descriptors: count in a process of its own.
    if std::env::var_os("NIDUS_UFFD_ALONE").is_none() {
        let name = "hostile::what_was_sent_is_closed_again";
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--test-threads=1"])
            .env("NIDUS_UFFD_ALONE", "1")
            .output()
            .unwrap();
        assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
        return;
    }
    let uffd = userfaultfd(EVENT_REMOVE);
    // What the runtime keeps open for good it opens with the first.
    drop(outcome(GOOD.as_bytes(), &[]));
    let before = open_descriptors();
    for (text, count) in [(GOOD, 1), (GOOD, 3), (GOOD, 16), ("{", 1), ("x", 2)] {
        drop(outcome(text.as_bytes(), &vec![uffd.as_fd(); count]));
        assert_eq!(open_descriptors(), before, "{text} with {count}");
    }
}
