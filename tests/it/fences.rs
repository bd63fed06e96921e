//! The house's fences: which crate may know which, which file may name which library, which words a
//! layer may use, where dependencies come from and under which licence. See ARCHITECTURE.md.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn metadata() -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let out = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", &platform])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(
        out.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON")
}

/// Normal (not dev, not build) dependencies of our packages, by name.
fn direct_dependencies(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let members = metadata["workspace_members"].as_array().unwrap();
    let ours: BTreeSet<&str> = members.iter().filter_map(Value::as_str).collect();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .filter(|p| ours.contains(p["id"].as_str().unwrap()))
        .map(|p| {
            let dependencies = p["dependencies"].as_array().unwrap().iter();
            let names = dependencies
                .filter(|d| d["kind"].is_null())
                .map(|d| d["name"].as_str().unwrap().to_owned())
                .collect();
            (p["name"].as_str().unwrap().to_owned(), names)
        })
        .collect()
}

#[test]
fn crates_know_only_what_they_may() {
    let direct = direct_dependencies(&metadata());
    let may: &[(&str, &[&str])] = &[
        ("mainstay-model", &[]),
        ("mainstay-storage", &[]),
        ("mainstay-raft", &["mainstay-storage"]),
        ("base2histogram", &[]),
        ("mainstay-agent", &[]),
        ("mainstay-guest", &[]),
        ("mainstay-checker", &[]),
        (
            "mainstay",
            &[
                "mainstay-model",
                "mainstay-storage",
                "mainstay-raft",
                "mainstay-agent",
            ],
        ),
    ];
    let listed: BTreeSet<&str> = may.iter().map(|(name, _)| *name).collect();
    let found: BTreeSet<&str> = direct.keys().map(String::as_str).collect();
    assert_eq!(
        listed, found,
        "a new crate needs its edges written here and in ARCHITECTURE.md"
    );
    for (name, allowed) in may {
        for edge in direct[*name].iter().filter(|d| d.starts_with("mainstay")) {
            assert!(
                allowed.contains(&edge.as_str()),
                "{name} may not depend on {edge}"
            );
        }
    }
}

#[test]
fn layers_compile_without_what_they_must_not_know() {
    let direct = direct_dependencies(&metadata());
    let banned: &[(&str, &[&str])] = &[
        (
            "mainstay-model",
            &[
                "tokio", "axum", "reqwest", "sled", "rand", "uuid", "time", "openraft",
            ],
        ),
        (
            "mainstay-storage",
            &["axum", "reqwest", "openraft", "tokio", "hyper"],
        ),
        ("mainstay-raft", &["axum", "reqwest", "sled", "hyper"]),
        ("mainstay-agent", &["openraft", "sled", "axum"]),
        ("mainstay", &["openraft", "sled"]),
    ];
    for (name, libraries) in banned {
        for library in *libraries {
            assert!(
                !direct[*name].contains(*library),
                "{name} may not depend on {library}"
            );
        }
    }
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn source_files(dirs: &[&str]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for dir in dirs {
        rust_files(&root().join(dir), &mut files);
    }
    assert!(!files.is_empty(), "{dirs:?} have no source");
    files
}

/// Code of a file without its comments, split into lower-case words at case changes and underscores.
fn words(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or("");
        let mut word = String::new();
        for c in code.chars().chain([' ']) {
            if c.is_ascii_lowercase() || c.is_ascii_digit() {
                word.push(c);
                continue;
            }
            if !word.is_empty() {
                found.insert(std::mem::take(&mut word));
            }
            if c.is_ascii_uppercase() {
                word.push(c.to_ascii_lowercase());
            }
        }
    }
    found
}

#[test]
fn consensus_and_storage_never_speak_of_vms() {
    for file in source_files(&["raft/src", "storage/src"]) {
        let found = words(&std::fs::read_to_string(&file).unwrap());
        for word in ["vm", "vms", "template", "templates", "qemu"] {
            assert!(
                !found.contains(word),
                "{} uses the word {word:?}",
                file.display()
            );
        }
    }
}

#[test]
fn one_file_names_sled_and_raft_alone_names_openraft() {
    let files = source_files(&[
        "src",
        "model/src",
        "storage/src",
        "raft/src",
        "agent/src",
        "guest/src",
    ]);
    let naming = |library: &str| -> Vec<PathBuf> {
        let needle = format!("{library}::");
        let names = |f: &&PathBuf| {
            let text = std::fs::read_to_string(f).unwrap();
            text.lines().any(|l| {
                let code = l.split("//").next().unwrap_or("");
                // Our own module of that name is not the library.
                code.replace(&format!("self::{needle}"), "")
                    .contains(&needle)
            })
        };
        files
            .iter()
            .filter(names)
            .map(|f| f.strip_prefix(root()).unwrap().to_owned())
            .collect()
    };
    assert_eq!(
        naming("sled").len(),
        1,
        "one file names sled: {:?}",
        naming("sled")
    );
    assert_eq!(
        naming("object_store"),
        [PathBuf::from("src/bucket.rs")],
        "one file speaks to buckets"
    );
    for file in naming("openraft") {
        assert!(
            file.starts_with("raft/src"),
            "{} names openraft",
            file.display()
        );
    }
}

#[test]
fn dependencies_come_from_the_registry_under_known_licences() {
    const LICENCES: &[&str] = &[
        "MIT",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "Zlib",
        "Unicode-3.0",
        "0BSD",
        "CC0-1.0",
        "Unlicense",
        "BSL-1.0",
        "MIT-0",
        "Apache-2.0 WITH LLVM-exception",
    ];
    for package in metadata()["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        // The second is ours too: see raft/base2histogram.
        if name.starts_with("mainstay") || name == "base2histogram" {
            assert_eq!(package["license"], "Apache-2.0", "{name}");
            continue;
        }
        let source = package["source"].as_str().unwrap_or("a path");
        assert!(
            source.starts_with("registry+"),
            "{name} comes from {source}"
        );
        let licence = package["license"]
            .as_str()
            .unwrap_or("")
            .replace('/', " OR ");
        let known = licence.split(" OR ").any(|choice| {
            choice
                .split(" AND ")
                .all(|l| LICENCES.contains(&l.trim_matches(['(', ')', ' '])))
        });
        assert!(
            known,
            "{name} has licence {licence:?}: decide, and write it here"
        );
    }
}

#[test]
fn what_is_alpha_or_abandoned_is_pinned_exactly() {
    let text = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for pin in ["=0.10.0-alpha.37", "=0.34.7", "=2.0.1"] {
        assert!(
            text.contains(pin),
            "Cargo.toml lost the exact pin {pin}; see docs/decisions"
        );
    }
}

#[test]
fn every_source_file_says_its_job_first_and_is_one_thing() {
    let dirs = ["src", "model", "storage", "raft", "agent", "guest", "tests"];
    for file in source_files(&dirs) {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("//!"), "{} has no header", file.display());
        assert!(
            text.lines().count() <= 800,
            "{} is over 800 lines: split it",
            file.display()
        );
    }
}
