//! The store's tests run on both: a file of SQLite, and a database of a real Postgres server.
//!
//! The server is Debian's, started once for a test program in a directory of its own; it listens on a socket
//! there and nowhere else, and ends with the program. `make setup` installs it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Store, StoreError};

/// A store for a test, and what it takes to open it once more.
pub(crate) struct Made {
    pub store: Store,
    place: Place,
}

enum Place {
    File(tempfile::TempDir),
    Server(String),
}

impl Made {
    /// Opens the same once more.
    pub async fn again(&self) -> Result<Store, StoreError> {
        match &self.place {
            Place::File(dir) => Store::open(&dir.path().join("db")).await,
            Place::Server(url) => Store::connect(url).await,
        }
    }
}

/// An empty store of each kind.
pub(crate) async fn stores() -> [Made; 2] {
    let dir = tempfile::tempdir().unwrap();
    let sqlite = Store::open(&dir.path().join("db")).await.unwrap();
    let url = server().database();
    let postgres = Store::connect(&url).await.unwrap();
    [Made { store: sqlite, place: Place::File(dir) }, Made { store: postgres, place: Place::Server(url) }]
}

struct Server {
    /// Removed by the server's keeper when we end.
    dir: PathBuf,
    _keeper: Child,
    databases: AtomicU32,
}

/// Keeps the server until it is told to end, and then removes its directory. `$1` is that, the rest the server.
const KEEPER: &str = r#"dir=$1; shift; "$@" & trap 'kill -INT $!; wait; rm -rf "$dir"; exit' TERM; wait"#;

fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("Postgres is missing: run make setup");
    let newest = versions.filter_map(|v| v.ok()?.file_name().into_string().ok()?.parse::<u32>().ok()).max();
    Path::new("/usr/lib/postgresql").join(newest.unwrap().to_string()).join("bin")
}

/// How a program runs as the user that Postgres insists on: it does not run as root.
const AS_POSTGRES: [&str; 7] =
    ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"];

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn as_postgres(program: &Path) -> Command {
    let mut command = command(&AS_POSTGRES);
    command.arg(program);
    command
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap().keep();
        let owned = Command::new("chown").arg("postgres").arg(&dir).status().unwrap();
        assert!(owned.success());
        let data = dir.join("data");
        let made = as_postgres(&programs().join("initdb"))
            .args(["--auth", "trust", "--no-sync", "--encoding", "UTF8", "--pgdata"])
            .arg(&data)
            .status()
            .unwrap();
        assert!(made.success(), "initdb failed");
        let log = std::fs::File::create(dir.join("log")).unwrap();
        // A thread of the test's would take the server with it when it ends (PR_SET_PDEATHSIG), so this one stays.
        let (tell, started) = std::sync::mpsc::channel();
        let socket = dir.clone();
        std::thread::spawn(move || {
            let keeper = command(&["setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", KEEPER, "keeper"])
                .arg(&socket)
                .args(AS_POSTGRES)
                .arg(programs().join("postgres"))
                .arg("-D")
                .arg(&data)
                .arg("-k")
                .arg(&socket)
                .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=300"])
                .stderr(log)
                .spawn();
            tell.send(keeper.unwrap()).unwrap();
            loop {
                std::thread::park();
            }
        });
        let keeper = started.recv().unwrap();
        let server = Server { dir, _keeper: keeper, databases: AtomicU32::new(0) };
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !server.run(&["pg_isready", "-q"]) {
            let log = std::fs::read_to_string(server.dir.join("log")).unwrap_or_default();
            assert!(std::time::Instant::now() < end, "Postgres did not start: {log}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        server
    })
}

impl Server {
    fn run(&self, command: &[&str]) -> bool {
        let done = as_postgres(&programs().join(command[0]))
            .arg("-h")
            .arg(&self.dir)
            .args(&command[1..])
            .stderr(Stdio::null())
            .status();
        done.unwrap().success()
    }

    /// The URL of a new database.
    fn database(&self) -> String {
        let name = format!("t{}", self.databases.fetch_add(1, Ordering::Relaxed));
        assert!(self.run(&["createdb", &name]));
        format!("postgres://postgres@localhost/{name}?host={}", self.dir.display())
    }
}
