//! Whole files: mapped for reading, replaced atomically for writing.

use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

/// A regular file's bytes, read as they are asked for.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    // Asked before opening: opening a pipe waits for its writer.
    let kind = fs::metadata(path).map_err(Error::io("read", path))?;
    if !kind.is_file() {
        return Err(Error::format(path, "not a regular file: name a weight file or a model folder"));
    }
    let file = File::open(path).map_err(Error::io("read", path))?;
    // SAFETY: the map is private, read-only and as long as the file is now. It must not be written in place meanwhile:
    // Felid replaces files whole (`write_atomically`), which leaves an existing map as it was, and whatever decides on
    // memory accesses (headers, names) is copied out before it is checked.
    unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))
}

/// Write a file so that it appears whole or not at all: into a temporary file of the same folder, synced to disk and
/// renamed over `path`. When `write` fails, the temporary file goes and what `path` held before stays.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".felid-").suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private by default; this one is to become an ordinary file, as the umask allows.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let temp = builder.tempfile_in(dir).map_err(Error::io("create a file in", dir))?;
    let mut out = BufWriter::with_capacity(1 << 20, temp.as_file());
    write(&mut out)?;
    out.flush().map_err(Error::io("write", path))?;
    drop(out);
    temp.as_file().sync_all().map_err(Error::io("write", path))?;
    temp.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    sync_dir(dir);
    Ok(())
}

/// Make renames and removals in a folder last through a power cut. Not all file systems can, and none needs it for the
/// files to be whole, so that failing is no error.
pub(super) fn sync_dir(dir: &Path) {
    if cfg!(unix)
        && let Ok(dir) = File::open(dir)
    {
        dir.sync_all().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_atomically(&path, |out| out.write_all(b"old").map_err(Error::io("write", "f"))).unwrap();
        let failed = write_atomically(&path, |out| {
            out.write_all(b"half").map_err(Error::io("write", "f"))?;
            Err(Error::config("stop here"))
        });
        assert!(matches!(failed, Err(Error::Config(_))));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn written_files_have_the_permissions_of_ordinary_files() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write_atomically(&ours, |_| Ok(())).unwrap();
        fs::write(&plain, b"").unwrap();
        let mode = |p| fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(map(dir.path()), Err(Error::Format { .. })));
        assert!(matches!(map(&dir.path().join("none")), Err(Error::Io { .. })));
        assert!(matches!(write_atomically(&dir.path().join("no/folder"), |_| Ok(())), Err(Error::Io { .. })));
        let empty = dir.path().join("empty");
        fs::write(&empty, b"").unwrap();
        assert!(map(&empty).unwrap().is_empty());
    }
}
