//! The servers of others.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server process; killed when dropped.
pub struct Baseline(Child);

impl Drop for Baseline {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `None`, with a line for the reader, where the program is not installed.
fn start(mut command: Command, package: &str, socket: &Path) -> Option<Baseline> {
    let Ok(child) = command.stdin(Stdio::null()).stderr(Stdio::inherit()).spawn() else {
        let program = command.get_program().display();
        println!("{program} is not installed (Debian package {package}): its column is empty");
        return None;
    };
    let server = Baseline(child);
    let started = Instant::now();
    while !socket.exists() {
        assert!(started.elapsed() < Duration::from_secs(10), "{package} does not come up");
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(server)
}

pub fn qemu_nbd(file: &Path, socket: &Path) -> Option<Baseline> {
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-f", "raw", "-x", "root", "--cache=writeback", "--aio=threads", "-k"]);
    command.args([socket, file]);
    start(command, "qemu-utils", socket)
}

pub fn nbdkit(file: &Path, socket: &Path) -> Option<Baseline> {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket).arg("file").arg(file);
    start(command, "nbdkit", socket)
}
