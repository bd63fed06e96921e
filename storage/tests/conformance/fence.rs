//! Fences of this crate: one file names the state store's library, and nothing here knows HTTP, consensus or
//! virtual machines.

use std::path::{Path, PathBuf};

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for item in std::fs::read_dir(dir).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn naming(words: &[&str]) -> Vec<String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 10, "the fence looks at the wrong place");
    let mut found: Vec<_> = files
        .iter()
        .filter(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            words.iter().any(|word| text.contains(word))
        })
        .map(|path| path.strip_prefix(&src).unwrap().display().to_string())
        .collect();
    found.sort();
    found
}

#[test]
fn one_file_names_sled() {
    assert_eq!(naming(&["sled::"]), ["engine.rs", "engine/sled.rs"]);
    // `engine.rs` only names our module of that name.
    let engine =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine.rs"));
    let engine = engine.unwrap();
    let lines: Vec<_> = engine.lines().filter(|l| l.contains("sled::")).collect();
    assert_eq!(lines, ["pub use self::sled::SledEngine;"]);
}

#[test]
fn nothing_here_knows_consensus_http_or_machines() {
    let words = [
        "openraft::",
        "axum::",
        "reqwest::",
        "struct Instance",
        "struct Template",
        "struct Vm",
    ];
    assert_eq!(naming(&words), [""; 0]);
}
