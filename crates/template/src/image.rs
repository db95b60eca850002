//! Root file system images that a host's owner provides as files: for hosts without a network.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::BuildError;
use crate::build::blocking;
use crate::command::{run, run_and};
use crate::rootfs::{self, ENVD_PATH};

/// An image is read in pieces of so many bytes; pieces of zeros become holes in the copy.
const PIECE: usize = 256 << 10;
/// e2fsck's exit code when it has mended what it found.
const MENDED: i32 = 1;

/// Makes an ext4 image of a Debian suite in the new file `image`, as small as it can be, for
/// [`Source::Image`](crate::Source::Image) of this or another host. Work in progress lies in the
/// directory `work`, which is made and removed.
///
/// # Errors
/// When a program is missing, fails or is cancelled, or a file cannot be written.
pub async fn make(
    suite: &str,
    envd: &Path,
    image: &Path,
    work: &Path,
    cancel: &CancellationToken,
    mut line: impl FnMut(&str),
) -> Result<(), BuildError> {
    fs::create_dir(work).map_err(|e| BuildError::io("make", work, e))?;
    let result = make_in(suite, envd, image, &work.join("rootfs"), cancel, &mut line).await;
    let gone = work.to_owned();
    let removed = blocking(move || fs::remove_dir_all(&gone).map_err(|e| BuildError::io("remove", &gone, e)));
    let removed = removed.await;
    result.and(removed)
}

async fn make_in(
    suite: &str,
    envd: &Path,
    image: &Path,
    root: &Path,
    cancel: &CancellationToken,
    line: &mut impl FnMut(&str),
) -> Result<(), BuildError> {
    /// Room for any base system; what is not used is cut off.
    const ROOM_MB: u32 = 8192;
    rootfs::debian(suite, &[], root, cancel, &mut *line).await?;
    let (tree, envd) = (root.to_owned(), envd.to_owned());
    blocking(move || rootfs::customise(&tree, &envd)).await?;
    rootfs::write_ext4(root, image, ROOM_MB, cancel, &mut *line).await?;
    let mut shrink = Command::new("resize2fs");
    shrink.arg("-M").arg(image);
    run(shrink, "e2fsprogs", cancel, line).await
}

/// Copies the ext4 image `from` to the new file `to`, sees that it is sound, puts the program `envd`
/// into it and makes it `disk_mb` MiB large. `work` is a directory for files in between.
pub(crate) async fn install(
    from: &Path,
    to: &Path,
    envd: &Path,
    work: &Path,
    disk_mb: u32,
    cancel: &CancellationToken,
    mut line: impl FnMut(&str),
) -> Result<(), BuildError> {
    let size = u64::from(disk_mb) << 20;
    let own = fs::metadata(from).map_err(|e| BuildError::io("read the image", from, e))?.len();
    if own > size {
        return Err(BuildError::BadRequest(format!(
            "a disk of {disk_mb} MiB is too small for the image {}, which has {} MiB",
            from.display(),
            own.div_ceil(1 << 20)
        )));
    }
    let (source, target, stop) = (from.to_owned(), to.to_owned(), cancel.clone());
    blocking(move || copy(&source, &target, &stop)).await?;
    let mut check = Command::new("e2fsck");
    check.args(["-f", "-p"]).arg(to);
    run_and(check, "e2fsprogs", cancel, &mut line, |code| code == MENDED).await?;
    put_envd(to, envd, work, cancel, &mut line).await?;
    let file = File::options().write(true).open(to).map_err(|e| BuildError::io("open", to, e))?;
    file.set_len(size).map_err(|e| BuildError::io("size", to, e))?;
    let mut grow = Command::new("resize2fs");
    grow.arg(to);
    run(grow, "e2fsprogs", cancel, line).await
}

/// Sparse, whatever the file system of `from` says about its holes.
fn copy(from: &Path, to: &Path, cancel: &CancellationToken) -> Result<(), BuildError> {
    let mut source = File::open(from).map_err(|e| BuildError::io("open the image", from, e))?;
    let target = File::create_new(to).map_err(|e| BuildError::io("make", to, e))?;
    let mut piece = vec![0; PIECE];
    let mut offset = 0;
    loop {
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        let n = source.read(&mut piece).map_err(|e| BuildError::io("read the image", from, e))?;
        if n == 0 {
            break;
        }
        if piece[..n].iter().any(|b| *b != 0) {
            target.write_all_at(&piece[..n], offset).map_err(|e| BuildError::io("write", to, e))?;
        }
        offset += n as u64;
    }
    target.set_len(offset).map_err(|e| BuildError::io("size", to, e))
}

/// debugfs writes into the image without mounting it. It reports success whatever it did, so what it
/// wrote is read back.
async fn put_envd(
    image: &Path,
    envd: &Path,
    work: &Path,
    cancel: &CancellationToken,
    mut line: impl FnMut(&str),
) -> Result<(), BuildError> {
    // Names without a blank or a quote, which debugfs would understand in its own way.
    let (new, script, back) = (work.join("envd"), work.join("debugfs"), work.join("envd-back"));
    fs::copy(envd, &new).map_err(|e| BuildError::io("copy envd to", &new, e))?;
    let commands = format!(
        "rm /{ENVD_PATH}\nwrite envd /{ENVD_PATH}\nset_inode_field /{ENVD_PATH} mode 0100755\n\
         set_inode_field /{ENVD_PATH} uid 0\nset_inode_field /{ENVD_PATH} gid 0\ndump /{ENVD_PATH} envd-back\n"
    );
    fs::write(&script, commands).map_err(|e| BuildError::io("write", &script, e))?;
    let image = image.canonicalize().map_err(|e| BuildError::io("find", image, e))?;
    let mut command = Command::new("debugfs");
    command.args(["-w", "-f", "debugfs"]).arg(&image).current_dir(work);
    let mut said = String::new();
    let talk = |text: &str| {
        said.push_str(text);
        said.push('\n');
        line(text);
    };
    run(command, "e2fsprogs", cancel, talk).await?;
    let same = blocking({
        let (new, back) = (new.clone(), back.clone());
        move || Ok(same_bytes(&new, &back).unwrap_or(false))
    });
    if !same.await? {
        return Err(BuildError::Tool {
            program: "debugfs".into(),
            status: format!("envd could not be put into {}", image.display()),
            output: said,
        });
    }
    for path in [&new, &script, &back] {
        fs::remove_file(path).map_err(|e| BuildError::io("remove", path, e))?;
    }
    Ok(())
}

fn same_bytes(a: &Path, b: &Path) -> std::io::Result<bool> {
    Ok(fs::read(a)? == fs::read(b)?)
}

/// What tells one image from a later one under the same path: its size and the time of its last
/// change, in nanoseconds of the epoch.
///
/// # Errors
/// When the file is not there, or is no file.
pub fn identity(path: &Path) -> Result<(u64, u128), BuildError> {
    let fail = |e| BuildError::io("read the image", path, e);
    let file = fs::metadata(path).map_err(fail)?;
    if !file.is_file() {
        return Err(fail(std::io::Error::other("it is not a file")));
    }
    let changed = file.modified().map_err(fail)?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok((file.len(), changed.as_nanos()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    async fn output(program: &str, args: &[&str]) -> String {
        let out = Command::new(program).args(args).output().await.unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    async fn small_image(dir: &Path, with_bin: bool) -> PathBuf {
        let (tree, image) = (dir.join("tree"), dir.join("image.ext4"));
        fs::create_dir_all(if with_bin { tree.join("usr/bin") } else { tree.clone() }).unwrap();
        if with_bin {
            fs::write(tree.join(ENVD_PATH), "an old one").unwrap();
        }
        rootfs::write_ext4(&tree, &image, 64, &CancellationToken::new(), |_| {}).await.unwrap();
        image
    }

    #[tokio::test]
    async fn an_image_gets_the_new_envd_and_the_wanted_size() {
        let dir = tempfile::tempdir().unwrap();
        let (image, envd, to) =
            (small_image(dir.path(), true).await, dir.path().join("new envd"), dir.path().join("to"));
        let bytes = vec![7; 300_000];
        fs::write(&envd, &bytes).unwrap();
        let work = dir.path().join("with a blank");
        fs::create_dir(&work).unwrap();
        install(&image, &to, &envd, &work, 600, &CancellationToken::new(), |_| {}).await.unwrap();
        assert_eq!(fs::metadata(&to).unwrap().len(), 600 << 20);
        let to = to.to_str().unwrap();
        let back = dir.path().join("back");
        output("debugfs", &["-R", &format!("dump /{ENVD_PATH} {}", back.display()), to]).await;
        assert_eq!(fs::read(back).unwrap(), bytes);
        let stat = output("debugfs", &["-R", &format!("stat /{ENVD_PATH}"), to]).await;
        assert!(stat.contains("Mode:  0755") && stat.contains("Type: regular"), "{stat}");
        let check = Command::new("e2fsck").args(["-f", "-n", to]).output().await.unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        assert!(output("dumpe2fs", &["-h", to]).await.contains("Block count:              153600"));
    }

    #[tokio::test]
    async fn what_does_not_fit_or_is_no_system_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let image = small_image(dir.path(), false).await;
        let try_it = |from: PathBuf, disk_mb| {
            let (to, work) = (dir.path().join(format!("to-{disk_mb}")), dir.path().to_owned());
            async move {
                let envd = work.join("tree/lost");
                fs::write(&envd, "envd").unwrap();
                install(&from, &to, &envd, &work, disk_mb, &CancellationToken::new(), |_| {}).await
            }
        };
        let text = try_it(image.clone(), 10).await.unwrap_err().to_string();
        assert!(text.contains("10 MiB is too small"), "{text}");
        let text = try_it(image, 70).await.unwrap_err().to_string();
        assert!(text.contains("envd could not be put"), "{text}");
        let text = try_it(dir.path().join("none"), 80).await.unwrap_err().to_string();
        assert!(text.contains("none"), "{text}");
    }
}
