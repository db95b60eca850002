//! The ELF kernel inside a bzImage.
//!
//! The boot protocol's header says where the compressed payload is (Documentation/arch/x86/boot.rst
//! in the kernel tree: `setup_sects`, `payload_offset` and `payload_length`, from protocol 2.08 on);
//! its first bytes tell the compression.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use crate::{Result, VmmError};

/// No kernel is larger than this, compressed or not.
const LIMIT: u64 = 512 << 20;
const ELF: &[u8] = b"\x7fELF";
/// Where the header lies in the file.
const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Writes the ELF kernel of the bzImage `image` to `target`, which appears at once or not at all.
pub(crate) fn extract(image: &Path, target: &Path) -> Result<()> {
    let bad = |reason: String| VmmError::KernelImage { image: image.display().to_string(), reason };
    let mut bytes = Vec::new();
    fs::File::open(image)
        .and_then(|f| f.take(LIMIT + 1).read_to_end(&mut bytes))
        .map_err(|e| VmmError::io(format!("read {}", image.display()), e))?;
    if bytes.len() as u64 > LIMIT {
        return Err(bad(format!("it is larger than {} MiB", LIMIT >> 20)));
    }
    let elf = elf(&bytes).map_err(bad)?;
    let wrap = |e| VmmError::io(format!("write {}", target.display()), e);
    // Of a name of its own: another process may do the same.
    let part = target.with_extension(format!("part-{}", std::process::id()));
    let write = || {
        let mut file = fs::File::create(&part)?;
        file.write_all(&elf)?;
        file.sync_all()?;
        fs::rename(&part, target)
    };
    write().inspect_err(|_| drop(fs::remove_file(&part))).map_err(wrap)
}

/// The ELF in a kernel image.
fn elf(image: &[u8]) -> Result<Vec<u8>, String> {
    if image.starts_with(ELF) {
        return Ok(image.to_vec());
    }
    let payload = payload(image)?;
    let mut out = Vec::new();
    let mut take = |reader: &mut dyn Read| match reader.take(LIMIT).read_to_end(&mut out) {
        Ok(_) => Ok(()),
        Err(e) => Err(format!("its payload is damaged: {e}")),
    };
    match payload {
        [0x1f, 0x8b, ..] => take(&mut flate2::read::GzDecoder::new(payload))?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => take(&mut lzma_rust2::XzReader::new(payload, false))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut reader = ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|e| format!("its payload is damaged: {e}"))?;
            take(&mut reader)?;
        }
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => take(&mut Lz4Legacy { rest, block: io::Cursor::default() })?,
        [b'B', b'Z', b'h', ..] => take(&mut bzip2::read::BzDecoder::new(payload))?,
        [0x5d, 0, ..] => {
            let mut reader = lzma_rust2::LzmaReader::new_mem_limit(payload, 1 << 20, None)
                .map_err(|e| format!("its payload is damaged: {e}"))?;
            take(&mut reader)?;
        }
        [0x89, b'L', b'Z', b'O', ..] => {
            return Err("its payload is compressed by LZO, which is not supported".into());
        }
        _ => return Err("its payload has no known compression".into()),
    }
    if !out.starts_with(ELF) {
        return Err("its payload is no ELF file".into());
    }
    Ok(out)
}

/// The compressed payload of a bzImage.
fn payload(image: &[u8]) -> Result<&[u8], String> {
    let field =
        |at: usize| -> Option<u32> { Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?)) };
    let text = "it is neither an ELF file nor a bzImage";
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err(text.into());
    }
    let protocol = field(PROTOCOL).ok_or(text)? & 0xffff;
    if protocol < 0x208 {
        return Err(format!("its boot protocol {}.{:02} is too old", protocol >> 8, protocol & 0xff));
    }
    // Zero means four, for the oldest loaders.
    let sectors = match image[SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let offset = field(PAYLOAD_OFFSET).ok_or(text)? as usize;
    let length = field(PAYLOAD_LENGTH).ok_or(text)? as usize;
    let start = (sectors + 1) * 512 + offset;
    image
        .get(start..)
        .and_then(|rest| rest.get(..length))
        .filter(|p| !p.is_empty())
        .ok_or_else(|| "its payload lies outside of the file".into())
}

/// The format that `lz4 -l` writes and the kernel uses: after the magic number, blocks of at most
/// 8 MiB, each after its compressed length.
struct Lz4Legacy<'a> {
    rest: &'a [u8],
    block: io::Cursor<Vec<u8>>,
}

impl Lz4Legacy<'_> {
    const BLOCK: usize = 8 << 20;

    fn next_block(&mut self) -> io::Result<Option<Vec<u8>>> {
        let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        let Some((length, rest)) = self.rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        // The kernel's build appends the uncompressed size, which looks like a block's length.
        if length == 0 || rest.is_empty() {
            return Ok(None);
        }
        let data = rest.get(..length).ok_or_else(|| bad("a block is cut short"))?;
        self.rest = &rest[length..];
        lz4_flex::block::decompress(data, Self::BLOCK).map(Some).map_err(|e| bad(&e.to_string()))
    }
}

impl Read for Lz4Legacy<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.block.read(buf)?;
            if n > 0 || buf.is_empty() {
                return Ok(n);
            }
            match self.next_block()? {
                Some(block) => self.block = io::Cursor::new(block),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use flate2::write::GzEncoder;
    use lzma_rust2::{FilterType, LzmaOptions, LzmaWriter, XzOptions, XzWriter};

    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&512u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0xaa; 64]);
        image
    }

    fn kernel() -> Vec<u8> {
        let mut k = ELF.to_vec();
        k.extend((0..200_000u32).flat_map(|n| (n / 7).to_le_bytes()));
        k
    }

    fn gzip(input: &[u8]) -> Vec<u8> {
        let mut out = GzEncoder::new(Vec::new(), flate2::Compression::best());
        out.write_all(input).unwrap();
        out.finish().unwrap()
    }

    /// With the filter for x86 programs, as the kernel's build does it.
    fn xz(input: &[u8]) -> Vec<u8> {
        let mut options = XzOptions::with_preset(6);
        options.prepend_pre_filter(FilterType::BcjX86, 0);
        let mut out = XzWriter::new(Vec::new(), options).unwrap();
        out.write_all(input).unwrap();
        out.finish().unwrap()
    }

    fn lzma(input: &[u8]) -> Vec<u8> {
        let options = LzmaOptions::with_preset(6);
        let mut out = LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
        out.write_all(input).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn every_compression_of_the_kernels_build() {
        assert!(elf(&bzimage(&gzip(&kernel()))).unwrap() == kernel());
        let mut all = vec![xz(&kernel()), lzma(&kernel())];
        let mut bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
        bz.write_all(&kernel()).unwrap();
        all.push(bz.finish().unwrap());
        all.push(ruzstd::encoding::compress_to_vec(
            &kernel()[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        ));
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        for part in kernel().chunks(300_000) {
            let block = lz4_flex::block::compress(part);
            lz4.extend((block.len() as u32).to_le_bytes());
            lz4.extend(block);
        }
        all.push(lz4);
        for mut payload in all {
            // The kernel's build appends the size, except for gzip.
            payload.extend((kernel().len() as u32).to_le_bytes());
            let magic = payload[..4].to_vec();
            let out = elf(&bzimage(&payload)).unwrap_or_else(|e| panic!("{magic:x?}: {e}"));
            assert!(out == kernel(), "{magic:x?}");
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let reason = |image: &[u8]| elf(image).unwrap_err();
        assert!(reason(b"short").contains("neither"));
        assert!(reason(&bzimage(b"????????")).contains("no known compression"));
        assert!(reason(&bzimage(&gzip(b"text"))).contains("no ELF"));
        let mut cut = bzimage(&gzip(&kernel()));
        cut.truncate(3000);
        assert!(reason(&cut).contains("outside"));
        let mut damaged = bzimage(&gzip(&kernel()));
        damaged[5000] ^= 0xff;
        assert!(elf(&damaged).is_err());
    }

    #[test]
    fn it_is_extracted_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmlinuz"), bzimage(&gzip(&kernel()))).unwrap();
        let kernel_dir = crate::guest::Kernel { version: "1".into(), dir: dir.path().into() };
        let path = kernel_dir.elf().unwrap();
        assert_eq!(path, dir.path().join("vmlinux.bin"));
        assert!(fs::read(&path).unwrap() == kernel());
        // Only the ELF is needed from then on.
        fs::remove_file(dir.path().join("vmlinuz")).unwrap();
        assert_eq!(kernel_dir.elf().unwrap(), path);
        assert_eq!(
            crate::guest::Kernel::list(dir.path().parent().unwrap())
                .iter()
                .filter(|k| k.dir == dir.path())
                .count(),
            1
        );
    }
}
