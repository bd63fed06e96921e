//! Programs that the host has started: `guest-exec` and `guest-exec-status`.
//!
//! A program counts as ended when its process has ended and its output is read; output that a
//! process it left behind may still write is waited for only briefly.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Programs at once; the ended ones count until their end was asked for.
const JOBS_MAX: usize = 64;
/// Output kept of each stream: its end.
const KEPT: usize = 1 << 20;
/// How long output may outlive its program.
const LINGER: Duration = Duration::from_millis(500);

/// The programs by process id.
#[derive(Default)]
pub(crate) struct Jobs(BTreeMap<u32, Job>);

struct Job {
    child: Child,
    ended: Option<(ExitStatus, Instant)>,
    streams: Option<(Stream, Stream)>,
}

impl Jobs {
    /// `guest-exec`.
    pub(crate) fn start(&mut self, args: &Value) -> Result<Value, String> {
        if self.0.len() >= JOBS_MAX {
            self.make_room()?;
        }
        let path = args["path"].as_str().ok_or("parameter 'path' is missing")?;
        let input = args["input-data"]
            .as_str()
            .map(|text| STANDARD.decode(text));
        let input = input.transpose().map_err(|e| format!("input-data: {e}"))?;
        // Newer hosts may say how instead of whether.
        let capture = args["capture-output"]
            .as_bool()
            .unwrap_or(args["capture-output"].is_string());
        let pipe = |wanted| {
            if wanted {
                Stdio::piped()
            } else {
                Stdio::null()
            }
        };
        let mut command = Command::new(path);
        command.args(strings(&args["arg"])?);
        if args["env"].is_array() {
            command.env_clear();
            for pair in strings(&args["env"])? {
                let (name, value) = pair.split_once('=').ok_or("env: not NAME=VALUE")?;
                command.env(name, value);
            }
        }
        command
            .stdin(pipe(input.is_some()))
            .stdout(pipe(capture))
            .stderr(pipe(capture));
        let mut child = command
            .spawn()
            .map_err(|e| format!("cannot start {path}: {e}"))?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            // A program that does not read its input is its own affair.
            thread::spawn(move || stdin.write_all(&input).is_ok());
        }
        let streams = child.stdout.take().zip(child.stderr.take());
        let streams = streams.map(|(out, err)| (Stream::of(out), Stream::of(err)));
        let pid = child.id();
        self.0.insert(
            pid,
            Job {
                child,
                ended: None,
                streams,
            },
        );
        Ok(json!({ "pid": pid }))
    }

    /// `guest-exec-status`; the answer that says `exited` is given once.
    pub(crate) fn status(&mut self, args: &Value) -> Result<Value, String> {
        let pid = args["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let pid = pid.ok_or("parameter 'pid' is missing")?;
        let job = self
            .0
            .get_mut(&pid)
            .ok_or_else(|| format!("PID {pid} does not exist"))?;
        let Some(status) = job.poll()? else {
            return Ok(json!({ "exited": false }));
        };
        let mut answer = json!({ "exited": true });
        if let Some(code) = status.code() {
            answer["exitcode"] = json!(code);
        }
        if let Some(signal) = status.signal() {
            answer["signal"] = json!(signal);
        }
        if let Some((out, err)) = &job.streams {
            out.tell(&mut answer, "out");
            err.tell(&mut answer, "err");
        }
        self.0.remove(&pid);
        Ok(answer)
    }

    /// Drop the oldest ended program that nobody asked for.
    fn make_room(&mut self) -> Result<(), String> {
        let ended = self.0.iter_mut().filter_map(|(pid, job)| {
            job.poll().ok()?;
            job.ended.map(|(_, at)| (at, *pid))
        });
        let (_, pid) = ended.min().ok_or("too many programs run")?;
        self.0.remove(&pid);
        Ok(())
    }
}

impl Job {
    /// Its status, once it has ended and its output is complete (or late).
    fn poll(&mut self) -> Result<Option<ExitStatus>, String> {
        if self.ended.is_none() {
            let status = self.child.try_wait().map_err(|e| format!("wait: {e}"))?;
            self.ended = status.map(|status| (status, Instant::now()));
        }
        let Some((status, at)) = self.ended else {
            return Ok(None);
        };
        let read = self
            .streams
            .as_ref()
            .is_none_or(|(out, err)| out.closed() && err.closed());
        Ok((read || at.elapsed() >= LINGER).then_some(status))
    }
}

fn strings(list: &Value) -> Result<Vec<String>, String> {
    let Some(list) = list.as_array() else {
        return Ok(Vec::new());
    };
    let text = |item: &Value| item.as_str().map(str::to_string);
    list.iter()
        .map(|item| text(item).ok_or_else(|| "a list of strings, please".into()))
        .collect()
}

/// One output stream: a thread reads it, the last [`KEPT`] bytes stay.
#[derive(Clone, Default)]
struct Stream(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    bytes: VecDeque<u8>,
    truncated: bool,
    closed: bool,
}

impl Stream {
    fn of(mut pipe: impl Read + Send + 'static) -> Stream {
        let stream = Stream::default();
        let reader = stream.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; 32 << 10];
            while let Ok(read @ 1..) = pipe.read(&mut chunk) {
                let mut kept = reader.lock();
                kept.bytes.extend(&chunk[..read]);
                let over = kept.bytes.len().saturating_sub(KEPT);
                kept.bytes.drain(..over);
                kept.truncated |= over > 0;
            }
            reader.lock().closed = true;
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closed(&self) -> bool {
        self.lock().closed
    }

    fn tell(&self, answer: &mut Value, name: &str) {
        let mut kept = self.lock();
        if !kept.bytes.is_empty() {
            answer[format!("{name}-data")] = json!(STANDARD.encode(kept.bytes.make_contiguous()));
        }
        if kept.truncated {
            answer[format!("{name}-truncated")] = json!(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(jobs: &mut Jobs, args: &Value) -> Value {
        let pid = jobs.start(args).unwrap();
        for _ in 0..1000 {
            let status = jobs.status(&pid).unwrap();
            if status["exited"] == true {
                assert!(jobs.status(&pid).is_err(), "told once");
                return status;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }

    fn shell(script: &str) -> Value {
        json!({ "path": "/bin/sh", "arg": ["-s"], "capture-output": true,
                "input-data": STANDARD.encode(script) })
    }

    fn text(value: &Value) -> String {
        String::from_utf8(STANDARD.decode(value.as_str().unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn code_and_both_outputs() {
        let status = finish(
            &mut Jobs::default(),
            &shell("echo out; echo err >&2; exit 7"),
        );
        assert_eq!(status["exitcode"], 7);
        assert_eq!(text(&status["out-data"]), "out\n");
        assert_eq!(text(&status["err-data"]), "err\n");
    }

    #[test]
    fn a_signal_is_not_a_code() {
        let status = finish(&mut Jobs::default(), &shell("kill -9 $$"));
        assert_eq!(status["signal"], 9);
        assert!(status.get("exitcode").is_none());
    }

    #[test]
    fn only_the_end_of_long_output_is_kept() {
        let status = finish(
            &mut Jobs::default(),
            &shell("yes | head -c 3000000; echo END"),
        );
        assert_eq!(status["out-truncated"], true);
        let out = text(&status["out-data"]);
        assert_eq!(out.len(), KEPT);
        assert!(out.ends_with("END\n"));
    }

    #[test]
    fn what_a_program_leaves_behind_does_not_hold_its_end() {
        let start = Instant::now();
        let status = finish(&mut Jobs::default(), &shell("sleep 20 & echo left"));
        assert_eq!(text(&status["out-data"]), "left\n");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_cannot_start_says_so_and_programs_are_bounded() {
        let mut jobs = Jobs::default();
        assert!(
            jobs.start(&json!({ "path": "/no/such" }))
                .unwrap_err()
                .contains("/no/such")
        );
        for _ in 0..JOBS_MAX {
            jobs.start(&json!({ "path": "/bin/cat", "input-data": "" }))
                .unwrap();
        }
        for _ in 0..1000 {
            if jobs.start(&json!({ "path": "/bin/true" })).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("ended programs do not make room");
    }
}
