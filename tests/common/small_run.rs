//! A run of a few steps on a few kilobytes of text.

use felid::train::TrainConfig;
use std::path::Path;

/// Reads and writes inside `dir`; `more` is TOML put over the settings.
pub fn small(dir: &Path, more: &str) -> TrainConfig {
    let text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. ".repeat(300);
    let data = dir.join("text.txt");
    std::fs::write(&data, text).unwrap();
    let toml = format!(
        "preset = 'nano'\ndata = {:?}\nout = {:?}\nbatch_size = 4\nseq_len = 64\nsteps = 40\nwarmup = 4\n{more}",
        data.display().to_string(),
        dir.join("run").display().to_string(),
    );
    let table = TrainConfig::parse_table(&toml, Path::new("test")).unwrap();
    TrainConfig::from_table(table, Path::new("test"), "nano").unwrap()
}
