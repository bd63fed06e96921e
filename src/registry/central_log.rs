//! The central log: lines that other programs send to any member (`POST /log`), kept by the member that got
//! them, in two files a service and within bounds. A line that was answered is in its file, not durably: it is
//! a log. A line that is sent twice is there twice. Knows files; refuses to know what a line means.

use super::Service;
use super::answer::{Answer, Params, bad, done, fail, ok};
use crate::http::time::Rfc3339;
use crate::stamp;
use axum::extract::{Request, State};
use axum::response::IntoResponse;
use http::{StatusCode, header};
use parking_lot::Mutex;
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// Longest text of a line.
const CONTENT_BYTES_MAX: usize = 64 << 10;
/// Longest name of a machine, a host or a service: three times that is a file's name.
const NAME_BYTES_MAX: usize = 80;
/// A file that is longer is put aside, in the place of the one that was put aside before.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most services.
const SERVICES_MAX: usize = 64;
/// Most of a service's newest lines that are shown at once, and how much without a word.
const SHOWN_BYTES_MAX: u64 = 1 << 20;
const SHOWN_BYTES: u64 = 64 << 10;
/// The file that was put aside.
const ASIDE: &str = "1";

/// The lines that one member got.
#[derive(Debug)]
pub struct CentralLog {
    dir: PathBuf,
    /// Lines are written one after another.
    writing: Mutex<()>,
}

/// What `GET /log` says of a service.
#[derive(Debug, Serialize)]
struct Kept {
    service: String,
    /// Of both its files.
    bytes: u64,
    /// Seconds since the Unix epoch.
    last_write: u64,
}

impl CentralLog {
    /// In this directory, which is made with the first line.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            writing: Mutex::new(()),
        }
    }

    fn path(&self, service: &str) -> PathBuf {
        self.dir.join(file_name(service))
    }

    /// Append one line. `Ok(false)`: it would be one service too many.
    fn append(&self, service: &str, line: &str) -> io::Result<bool> {
        let _one = self.writing.lock();
        fs::create_dir_all(&self.dir)?;
        let path = self.path(service);
        if !path.exists() && self.services()?.len() >= SERVICES_MAX {
            return Ok(false);
        }
        let mut file = File::options()
            .create(true)
            .append(true)
            .read(true)
            .open(&path)?;
        let len = file.metadata()?.len();
        if len >= FILE_BYTES_MAX {
            fs::rename(&path, path.with_extension(ASIDE))?;
            file = File::options()
                .create(true)
                .append(true)
                .read(true)
                .open(&path)?;
        } else if len > 0 {
            // A line that was cut off by the end of the process does not spoil the next one.
            let mut last = [0];
            file.read_exact_at(&mut last, len - 1)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
        file.write_all(line.as_bytes())?;
        Ok(true)
    }

    /// Names of the files that lines are written to.
    fn services(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            found.extend(name.strip_suffix(".log").map(service_name));
        }
        found.sort();
        Ok(found)
    }

    fn kept(&self) -> io::Result<Vec<Kept>> {
        let one = |service: String| {
            let path = self.path(&service);
            let written = fs::metadata(&path)?;
            let since = written.modified()?.duration_since(UNIX_EPOCH);
            Ok(Kept {
                bytes: written.len() + len(&path.with_extension(ASIDE)),
                last_write: since.map_or(0, |since| since.as_secs()),
                service,
            })
        };
        self.services()?.into_iter().map(one).collect()
    }

    /// The newest lines, at most so many bytes of them; `None` for an unknown service.
    fn newest(&self, service: &str, bytes: u64) -> io::Result<Option<String>> {
        let path = self.path(service);
        let Some(mut text) = tail(&path, bytes)? else {
            return Ok(None);
        };
        let left = bytes.saturating_sub(text.len() as u64);
        if let Some(before) = tail(&path.with_extension(ASIDE), left)? {
            text = [before, text].concat();
        }
        Ok(Some(String::from_utf8_lossy(&text).into_owned()))
    }
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

/// Whole lines at the end of a file, at most so many bytes; `None` if it is not there.
fn tail(path: &Path, bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let from = file.metadata()?.len().saturating_sub(bytes);
    // One byte before: is that the end of a line?
    file.seek(SeekFrom::Start(from.saturating_sub(1)))?;
    let mut text = Vec::new();
    file.take(bytes + 1).read_to_end(&mut text)?;
    if from > 0 {
        let end = text.iter().position(|byte| *byte == b'\n');
        text.drain(..end.map_or(text.len(), |at| at + 1));
    }
    Ok(Some(text))
}

/// A service's name as that of a file: letters, digits, `-` and `_` as they are, the rest by its bytes.
fn file_name(service: &str) -> String {
    let mut name = String::new();
    for byte in service.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
            other => name.push_str(&format!("%{other:02x}")),
        }
    }
    name + ".log"
}

fn service_name(file: &str) -> String {
    let bytes: Vec<u8> = form_urlencoded::parse(file.as_bytes())
        .flat_map(|(name, _)| name.into_owned().into_bytes())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One line: ends of lines and other control characters inside it are written as Rust writes them.
fn line(params: &Params) -> Result<(String, String), super::answer::Refused> {
    let name = |of: &str| {
        let text = params.get(of).unwrap_or_default();
        if text.len() > NAME_BYTES_MAX {
            return Err(bad(format!("{of} is longer than {NAME_BYTES_MAX} bytes")));
        }
        Ok(plain(text))
    };
    let service = params
        .get("service")
        .ok_or_else(|| bad("service is missing"))?;
    name("service")?;
    let content = params.get("content").unwrap_or_default();
    if content.len() > CONTENT_BYTES_MAX {
        return Err(bad(format!(
            "content is longer than {CONTENT_BYTES_MAX} bytes"
        )));
    }
    let at = Rfc3339(stamp::now_ms());
    let (machine, host) = (name("machine_name")?, name("host")?);
    let text = format!("{at} [{machine}] [{host}] {}\n", plain(content.trim_end()));
    Ok((service.to_owned(), text))
}

fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// `POST /log`: one line more.
pub(super) async fn append(State(service): Service, request: Request) -> Answer {
    let params = Params::read(request).await?;
    let (of, line) = line(&params)?;
    (service.room)().map_err(|why| fail(StatusCode::INSUFFICIENT_STORAGE, why))?;
    match on_disk(&service, move |log| log.append(&of, &line)).await? {
        true => Ok(done()),
        false => Err(fail(
            StatusCode::OK,
            format!("there are {SERVICES_MAX} services already"),
        )),
    }
}

/// `GET /log`: what there is; with `service`, its newest lines (`bytes`: at most so many of them).
pub(super) async fn show(State(service): Service, request: Request) -> Answer {
    let params = Params::from_query(request.uri());
    let Some(of) = params.get("service").map(str::to_owned) else {
        let kept = on_disk(&service, CentralLog::kept).await?;
        return Ok(ok(kept));
    };
    let bytes = params.number("bytes")?.unwrap_or(SHOWN_BYTES);
    let newest = move |log: &CentralLog| log.newest(&of, bytes.min(SHOWN_BYTES_MAX));
    let Some(text) = on_disk(&service, newest).await? else {
        return Err(fail(StatusCode::OK, "Not found"));
    };
    let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((kind, text).into_response())
}

async fn on_disk<T: Send + 'static>(
    service: &super::RegistryService,
    work: impl FnOnce(&CentralLog) -> io::Result<T> + Send + 'static,
) -> Result<T, super::answer::Refused> {
    let log = Arc::clone(&service.central_log);
    match tokio::task::spawn_blocking(move || work(&log)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(e)) => Err(fail(
            StatusCode::INSUFFICIENT_STORAGE,
            format!("the central log cannot be kept: {e}"),
        )),
        Err(e) => Err(fail(StatusCode::SERVICE_UNAVAILABLE, e.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (tempfile::TempDir, CentralLog) {
        let dir = tempfile::tempdir().unwrap();
        let log = CentralLog::new(dir.path().join("central-logs"));
        (dir, log)
    }

    #[test]
    fn any_name_is_one_file_here_and_comes_back() {
        let (_dir, log) = log();
        for name in [
            "a",
            "AWS Cloud Connect Service",
            "../../etc/x",
            "%41+b",
            "é/.log",
            ".",
        ] {
            assert!(log.append(name, "one\n").unwrap());
            assert!(log.append(name, "two\n").unwrap());
            assert_eq!(log.newest(name, 100).unwrap().unwrap(), "one\ntwo\n");
        }
        let mut names = log.services().unwrap();
        names.sort();
        let mut all = vec![
            "%41+b",
            ".",
            "../../etc/x",
            "AWS Cloud Connect Service",
            "a",
            "é/.log",
        ];
        all.sort_unstable();
        assert_eq!(names, all);
        assert_eq!(fs::read_dir(&log.dir).unwrap().count(), all.len());
        assert_eq!(log.newest("b", 100).unwrap(), None);
    }

    #[test]
    fn files_and_services_are_bounded_and_a_cut_line_ends() {
        let (_dir, log) = log();
        let line = format!("{}\n", "x".repeat(60_000));
        for _ in 0..285 {
            log.append("a", &line).unwrap();
        }
        let kept = log.kept().unwrap();
        let most = 2 * (FILE_BYTES_MAX + line.len() as u64);
        assert!(
            kept[0].bytes > FILE_BYTES_MAX && kept[0].bytes <= most,
            "{kept:?}"
        );
        // Whole lines only, over the border between the files too.
        let shown = log.newest("a", SHOWN_BYTES_MAX).unwrap().unwrap();
        assert!(shown.len() as u64 <= SHOWN_BYTES_MAX && shown.len() > 900_000);
        assert!(shown.lines().all(|l| l.len() == 60_000));
        fs::write(log.path("a"), "cut of").unwrap();
        log.append("a", "whole\n").unwrap();
        assert_eq!(log.newest("a", 13).unwrap().unwrap(), "cut of\nwhole\n");
        assert_eq!(log.newest("a", 12).unwrap().unwrap(), "whole\n");
        for n in 1..SERVICES_MAX {
            assert!(log.append(&format!("s{n}"), "x\n").unwrap());
        }
        assert!(!log.append("one more", "x\n").unwrap());
        assert!(log.append("s1", "x\n").unwrap());
    }
}
