//! A model in several safetensors files, and the index that names them.

use super::safetensors::UniqueMap;
use super::{INDEX, TensorFile, WEIGHTS, file, listed, read_safetensors, shown, write_atomically, write_safetensors};
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path};

#[derive(serde::Deserialize)]
struct Index {
    /// Tensor name to file name.
    weight_map: UniqueMap,
}

/// File name of each tensor. File names are plain names: the index cannot lead out of its folder.
fn weight_map(path: &Path) -> Result<BTreeMap<String, String>> {
    let map = file::map(path)?;
    let index: Index =
        serde_json::from_slice(&map).map_err(|e| Error::format(path, format!("broken index: {}", shown(&e.to_string()))))?;
    let files = index.weight_map.0;
    let plain = |f: &str| {
        let mut parts = Path::new(f).components();
        !f.contains(['/', '\\', '\0']) && matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
    };
    match files.values().find(|f| !plain(f)) {
        Some(f) => Err(Error::format(path, format!("'{}' is no plain file name of its folder", shown(f)))),
        None => Ok(files),
    }
}

/// The tensors that an index (`model.safetensors.index.json`) names, out of the shards beside it.
///
/// Errors when the index leads out of its folder, and names all shards that are missing or all tensors that their
/// shards lack. Tensors that the index does not name are left out.
pub fn read_index(path: &Path) -> Result<TensorFile> {
    let names = weight_map(path)?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let shards: BTreeSet<&str> = names.values().map(String::as_str).collect();
    let missing: Vec<&str> = shards.iter().copied().filter(|s| !dir.join(s).is_file()).collect();
    if !missing.is_empty() {
        return Err(Error::format(path, format!("these shards are missing from its folder: {}", listed(missing))));
    }
    let mut all = TensorFile::default();
    for shard in shards {
        let mut file = read_safetensors(&dir.join(shard))?;
        file.tensors.retain(|name, _| names.get(name).is_some_and(|s| s == shard));
        all.tensors.append(&mut file.tensors);
        all.metadata.append(&mut file.metadata);
    }
    let lacking: Vec<&str> = names.keys().filter(|n| !all.tensors.contains_key(*n)).map(String::as_str).collect();
    if !lacking.is_empty() {
        return Err(Error::format(path, format!("its shards lack these tensors: {}", listed(lacking))));
    }
    Ok(all)
}

/// Save tensors into a model folder, made if need be: as `model.safetensors` if they fit into `max_shard_bytes`, else
/// as `model-00001-of-0000n.safetensors` and so on with an index. A tensor larger than that gets a shard of its own.
///
/// Until all new files are complete the folder holds what it held before; then one rename or removal turns to the new
/// weights, and files of the old ones are removed. (Where shards of the same names are in use, the new ones are called
/// `model-00001-of-0000n.1.safetensors`.)
pub fn save_sharded(
    dir: &Path,
    tensors: &[(&str, &Tensor)],
    metadata: &BTreeMap<String, String>,
    max_shard_bytes: usize,
) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let (shards, total_size) = split(tensors, max_shard_bytes);
    if shards.len() <= 1 {
        // Readers prefer this file to an index, so that its rename is the turn.
        write_safetensors(&dir.join(WEIGHTS), tensors, metadata)?;
        return remove_stale(dir, &BTreeSet::from([WEIGHTS.to_string()]));
    }

    let in_use: BTreeSet<String> = weight_map(&dir.join(INDEX)).unwrap_or_default().into_values().collect();
    let named = |attempt: usize| -> Vec<String> {
        let suffix = if attempt == 0 { String::new() } else { format!(".{attempt}") };
        (1..=shards.len()).map(|i| format!("model-{i:05}-of-{:05}{suffix}.safetensors", shards.len())).collect()
    };
    let mut attempt = 0;
    let mut files = named(0);
    while files.iter().any(|f| in_use.contains(f)) {
        attempt += 1;
        files = named(attempt);
    }

    let mut map = BTreeMap::new();
    for (file, shard) in files.iter().zip(&shards) {
        write_safetensors(&dir.join(file), shard, metadata)?;
        for (name, _) in *shard {
            if map.insert(*name, file).is_some() {
                return Err(Error::format(dir, format!("cannot write two tensors named '{}'", shown(name))));
            }
        }
    }
    let path = dir.join(INDEX);
    let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": map });
    write_atomically(&path, |out| out.write_all(format!("{index:#}\n").as_bytes()).map_err(Error::io("write", &path)))?;
    remove_stale(dir, &files.into_iter().chain([INDEX.to_string()]).collect())
}

/// Runs of tensors of at most `max` bytes (or one tensor), and the bytes of all.
fn split<'a, 't>(tensors: &'a [(&'t str, &'t Tensor)], max: usize) -> (Vec<&'a [(&'t str, &'t Tensor)]>, usize) {
    let (mut shards, mut start, mut held, mut total) = (Vec::new(), 0, 0usize, 0usize);
    for (i, (_, t)) in tensors.iter().enumerate() {
        let bytes = t.numel() * t.dtype().size();
        if i > start && held + bytes > max {
            shards.push(&tensors[start..i]);
            (start, held) = (i, 0);
        }
        held += bytes;
        total += bytes;
    }
    shards.push(&tensors[start..]);
    (shards, total)
}

/// Remove the weights of an earlier save: first what readers look for, then its shards.
fn remove_stale(dir: &Path, keep: &BTreeSet<String>) -> Result<()> {
    let mut stale: Vec<String> = [WEIGHTS, INDEX].map(String::from).into_iter().filter(|f| dir.join(f).exists()).collect();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let name = entry.map_err(Error::io("read", dir))?.file_name();
        stale.extend(name.to_str().filter(|n| is_shard(n)).map(String::from));
    }
    for name in stale.iter().filter(|n| !keep.contains(*n)) {
        let path = dir.join(name);
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    file::sync_dir(dir);
    Ok(())
}

/// True for the names that [`save_sharded`] gives to shards.
fn is_shard(name: &str) -> bool {
    let digits = |s: &str| s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit());
    let middle = name.strip_prefix("model-").and_then(|n| n.strip_suffix(".safetensors"));
    middle.and_then(|m| m.split_once("-of-")).is_some_and(|(i, n)| {
        let (n, attempt) = n.split_once('.').unwrap_or((n, "1"));
        digits(i) && digits(n) && !attempt.is_empty() && attempt.bytes().all(|b| b.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_shards_count_as_stale() {
        for name in ["model-00001-of-00002.safetensors", "model-00001-of-00002.1.safetensors"] {
            assert!(is_shard(name), "{name}");
        }
        for name in ["model.safetensors", "model-1-of-2.safetensors", "model-a-of-00002.safetensors", "x-00001-of-00002"] {
            assert!(!is_shard(name), "{name}");
        }
    }

    #[test]
    fn shards_fill_up_to_their_limit() {
        let t = Tensor::from_vec(vec![0f32; 4], &[4]).unwrap();
        let tensors: Vec<_> = ["a", "b", "c", "d", "e"].iter().map(|n| (*n, &t)).collect();
        let sizes = |max| split(&tensors, max).0.iter().map(|s| s.len()).collect::<Vec<_>>();
        assert_eq!(sizes(80), [5]);
        assert_eq!(sizes(79), [4, 1]);
        assert_eq!(sizes(32), [2, 2, 1]);
        assert_eq!(sizes(0), [1; 5]);
        assert_eq!(split(&[], 9).0.len(), 1);
    }
}
