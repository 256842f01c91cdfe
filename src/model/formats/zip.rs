//! Just enough of zip to find the stored entries of a PyTorch file: end record, central directory, local headers
//! (PKWARE APPNOTE 4.3). torch.save compresses nothing, so compressed entries are refused, and with them all bombs.

use super::{Checked, shown};
use std::collections::BTreeMap;

/// How a zip begins: with the first local header.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const LOCATOR64: &[u8] = b"PK\x06\x07";
const END_LEN: usize = 22;
const LOCATOR64_LEN: usize = 20;
const CENTRAL_LEN: usize = 46;

/// Stored entries by name; no two overlap.
pub(super) struct Archive<'a> {
    pub entries: BTreeMap<String, &'a [u8]>,
}

/// Where the central directory lies, and how many entries it says it has.
struct Directory {
    begin: usize,
    end: usize,
    entries: u64,
}

/// Reads little-endian numbers one after another, never past the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Checked<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("a zip record is cut short")?;
        self.0 = rest;
        Ok(head)
    }
    fn number<const N: usize>(&mut self) -> Checked<u64> {
        let mut le = [0; 8];
        le[..N].copy_from_slice(self.bytes(N)?);
        Ok(u64::from_le_bytes(le))
    }
    fn u16(&mut self) -> Checked<u64> {
        self.number::<2>()
    }
    fn u32(&mut self) -> Checked<u64> {
        self.number::<4>()
    }
    fn u64(&mut self) -> Checked<u64> {
        self.number::<8>()
    }
    fn signature(&mut self, signature: &[u8], what: &str) -> Checked<()> {
        if self.bytes(4)? == signature { Ok(()) } else { Err(format!("broken zip: no {what} where there should be one")) }
    }
}

/// The bytes from `at` on, or an error when that is past the end.
fn from(file: &[u8], at: u64) -> Checked<Fields<'_>> {
    let at = usize::try_from(at).ok().filter(|&at| at <= file.len());
    at.map(|at| Fields(&file[at..])).ok_or_else(|| "broken zip: a record lies past the end of the file".into())
}

impl<'a> Archive<'a> {
    /// The entries of a zip. Errors when any record or entry is broken, compressed, encrypted, there twice, overlapping
    /// another or outside the file.
    pub fn parse(file: &'a [u8]) -> Checked<Self> {
        let directory = Directory::find(file)?;
        let mut central = Fields(&file[directory.begin..directory.end]);
        if directory.entries > (central.0.len() / CENTRAL_LEN) as u64 {
            return Err(format!(
                "broken zip: a directory of {} bytes cannot hold {} entries",
                central.0.len(),
                directory.entries
            ));
        }
        let mut entries = BTreeMap::new();
        let mut ranges = Vec::new();
        for _ in 0..directory.entries {
            let entry = Entry::parse(&mut central)?;
            let range =
                entry.locate(&file[..directory.begin]).map_err(|e| format!("zip entry '{}': {e}", shown(&entry.name)))?;
            ranges.push((range.header, range.end));
            if entries.contains_key(&entry.name) {
                return Err(format!("zip entry '{}' is there twice", shown(&entry.name)));
            }
            entries.insert(entry.name, &file[range.data..range.end]);
        }
        if !central.0.is_empty() {
            return Err(format!("broken zip: {} bytes follow its last directory entry", central.0.len()));
        }
        ranges.sort_unstable();
        if ranges.windows(2).any(|w| w[1].0 < w[0].1) {
            return Err("broken zip: two entries overlap".into());
        }
        Ok(Self { entries })
    }
}

impl Directory {
    /// The end record is the file's last 22 bytes: torch.save writes no comment behind it.
    fn find(file: &[u8]) -> Checked<Self> {
        let cut = || "not a whole zip: no end record in its last 22 bytes (cut short, or something appended)".to_string();
        let end_at = file.len().checked_sub(END_LEN).filter(|&at| file[at..].starts_with(END)).ok_or_else(cut)?;
        let mut end = Fields(&file[end_at + 4..]);
        let (disk, directory_disk, here) = (end.u16()?, end.u16()?, end.u16()?);
        let (entries, size, begin, comment) = (end.u16()?, end.u32()?, end.u32()?, end.u16()?);
        if comment != 0 {
            return Err(cut());
        }
        let single = |disk: u64, directory_disk: u64, here: u64, entries: u64| {
            let one = disk == 0 && directory_disk == 0 && here == entries;
            if one { Ok(()) } else { Err("broken zip: it says it is one of several volumes".to_string()) }
        };
        let locator_at = end_at.checked_sub(LOCATOR64_LEN).filter(|&at| file[at..].starts_with(LOCATOR64));
        let (entries, size, begin, records_at) = match locator_at {
            None => {
                single(disk, directory_disk, here, entries)?;
                (entries, size, begin, end_at)
            }
            Some(locator_at) => {
                let mut locator = Fields(&file[locator_at + 4..]);
                locator.u32()?;
                let end64_at = locator.u64()?;
                let mut end64 = from(&file[..locator_at], end64_at)?;
                end64.signature(END64, "zip64 end record")?;
                end64.bytes(8 + 2 + 2)?; // its size and two versions
                let (disk, directory_disk, here) = (end64.u32()?, end64.u32()?, end64.u64()?);
                let (entries, size, begin) = (end64.u64()?, end64.u64()?, end64.u64()?);
                single(disk, directory_disk, here, entries)?;
                (entries, size, begin, end64_at as usize)
            }
        };
        // The directory ends where the end records begin, so that nothing hides between them.
        match begin.checked_add(size) {
            Some(end) if end == records_at as u64 => Ok(Self { begin: begin as usize, end: records_at, entries }),
            _ => Err("broken zip: its directory does not end where its end record begins".into()),
        }
    }
}

/// What the central directory says of an entry.
struct Entry {
    name: String,
    flags: u64,
    method: u64,
    packed: u64,
    size: u64,
    header_at: u64,
}

/// Byte positions of an entry: its local header, its data, the end of its data.
struct Range {
    header: usize,
    data: usize,
    end: usize,
}

impl Entry {
    fn parse(central: &mut Fields<'_>) -> Checked<Self> {
        central.signature(CENTRAL, "directory entry")?;
        central.bytes(2 + 2)?; // versions
        let (flags, method) = (central.u16()?, central.u16()?);
        central.bytes(2 + 2 + 4)?; // time, date, CRC-32 (which torch can be told not to compute)
        let (mut packed, mut size) = (central.u32()?, central.u32()?);
        let (name_len, extra_len, comment_len) = (central.u16()?, central.u16()?, central.u16()?);
        central.bytes(2 + 2 + 4)?; // volume, attributes
        let mut header_at = central.u32()?;
        let name = std::str::from_utf8(central.bytes(name_len as usize)?);
        let name = name.map_err(|_| "broken zip: an entry's name is not UTF-8")?.to_string();
        let mut extra = Fields(central.bytes(extra_len as usize)?);
        central.bytes(comment_len as usize)?;
        // Fields that are all ones stand in the zip64 extra field instead, in this order.
        while !extra.0.is_empty() {
            let (id, len) = (extra.u16()?, extra.u16()?);
            let mut field = Fields(extra.bytes(len as usize)?);
            if id == 1 {
                for value in [&mut size, &mut packed, &mut header_at] {
                    if *value == u32::MAX as u64 {
                        *value = field.u64()?;
                    }
                }
            }
        }
        Ok(Self { name, flags, method, packed, size, header_at })
    }

    /// Where the data lies in `area`, all of the file before the directory.
    fn locate(&self, area: &[u8]) -> Checked<Range> {
        const ENCRYPTED: u64 = 1 | 1 << 6 | 1 << 13;
        if self.method != 0 || self.packed != self.size {
            return Err("is compressed, which torch.save never does: save it again with torch.save".into());
        }
        if self.flags & ENCRYPTED != 0 {
            return Err("is encrypted".into());
        }
        let mut local = from(area, self.header_at)?;
        local.signature(MAGIC, "local header")?;
        local.bytes(2)?; // version
        let (flags, method) = (local.u16()?, local.u16()?);
        local.bytes(2 + 2 + 4 + 4 + 4)?; // time, date, CRC-32, sizes (which may stand behind the data instead)
        let (name_len, extra_len) = (local.u16()?, local.u16()?);
        if local.bytes(name_len as usize)? != self.name.as_bytes() || method != self.method || flags & ENCRYPTED != 0 {
            return Err("has a local header that contradicts the directory".into());
        }
        local.bytes(extra_len as usize)?;
        let data = area.len() - local.0.len();
        match usize::try_from(self.size).ok().filter(|&size| size <= local.0.len()) {
            Some(size) => Ok(Range { header: self.header_at as usize, data, end: data + size }),
            None => Err(format!("says {} bytes, more than the file holds", self.size)),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A zip of stored entries, after a change to its directory's fields `(flags, method, packed, size, header_at)`.
    pub fn zip(entries: &[(&str, &[u8])], change: impl Fn(usize, &mut [u32; 5])) -> Vec<u8> {
        let (mut file, mut directory) = (Vec::new(), Vec::new());
        for (i, (name, data)) in entries.iter().enumerate() {
            let mut f = [0, 0, data.len() as u32, data.len() as u32, file.len() as u32];
            change(i, &mut f);
            let [flags, method, packed, size, at] = f;
            let half = |x: u32| (x as u16).to_le_bytes();
            let lens = [half(name.len() as u32), half(0)].concat();
            let sizes = [[0; 4], packed.to_le_bytes(), size.to_le_bytes()].concat(); // CRC-32 first
            let common = [[0; 2], half(flags), half(method), [0; 2], [0; 2]].concat();
            for part in [MAGIC, &common, &sizes, &lens, name.as_bytes(), data] {
                file.extend_from_slice(part);
            }
            for part in [CENTRAL, &[0; 2], &common, &sizes, &lens, &[0; 10], &at.to_le_bytes(), name.as_bytes()] {
                directory.extend_from_slice(part);
            }
        }
        let n = (entries.len() as u16).to_le_bytes();
        let (begin, size) = (file.len() as u32, directory.len() as u32);
        for part in [&directory, END, &[0; 4], &n, &n, &size.to_le_bytes(), &begin.to_le_bytes(), &[0; 2]] {
            file.extend_from_slice(part);
        }
        file
    }

    fn refused(file: &[u8]) -> String {
        Archive::parse(file).map(|a| a.entries.len()).unwrap_err()
    }

    #[test]
    fn stored_entries_are_found() {
        let file = zip(&[("a", b"one"), ("b/c", b""), ("d", b"three")], |_, _| ());
        let entries = Archive::parse(&file).unwrap().entries;
        assert_eq!(entries["a"], b"one");
        assert_eq!(entries["b/c"], b"");
        assert_eq!(entries["d"], b"three");
        assert!(Archive::parse(&zip(&[], |_, _| ())).unwrap().entries.is_empty());
    }

    #[test]
    fn bombs_are_refused() {
        let two: &[(&str, &[u8])] = &[("a", &[7; 100]), ("b", b"xyz")];
        assert!(refused(&zip(two, |i, f| f[1] = 8 * i as u32)).contains("'b': is compressed"));
        assert!(refused(&zip(two, |_, f| f[3] = 1 << 30)).contains("compressed"));
        assert!(refused(&zip(two, |_, f| (f[2], f[3]) = (1 << 30, 1 << 30))).contains("more than the file holds"));
        assert!(refused(&zip(two, |_, f| f[0] = 1)).contains("encrypted"));
        assert!(refused(&zip(two, |_, f| f[4] = 1 << 30)).contains("past the end"));
        assert!(refused(&zip(two, |_, f| f[4] = 1)).contains("no local header"));
        // "a" says it goes on through "b"
        assert!(refused(&zip(two, |i, f| (f[2], f[3]) = if i == 0 { (110, 110) } else { (3, 3) })).contains("overlap"));
        // both names lead to the same local header
        assert!(refused(&zip(two, |_, f| f[4] = 0)).contains("contradicts"));
        assert!(refused(&zip(&[("a", b"1"), ("a", b"2")], |_, _| ())).contains("twice"));
    }

    #[test]
    fn broken_ends_are_refused() {
        let good = zip(&[("a", b"1")], |_, _| ());
        let end = good.len() - END_LEN;
        assert!(refused(b"").contains("not a whole zip"));
        assert!(refused(&[&good[..], b"!"].concat()).contains("not a whole zip"));
        for (at, value, what) in
            [(4, 1, "volumes"), (10, 9, "volumes"), (12, 9, "end record"), (16, 9, "end record"), (20, 1, "whole")]
        {
            let mut bad = good.clone();
            bad[end + at] = value;
            assert!(refused(&bad).contains(what), "{at}");
        }
        let mut many = good.clone();
        many[end + 8..end + 12].fill(0xfe);
        assert!(refused(&many).contains("cannot hold 65278 entries"));
    }
}
