//! What each request does. Names, arguments and answers are those of the QEMU guest agent; one of
//! our own, `guest-mainstay-reseed`, mixes the host's entropy into the kernel's pool.

use crate::{exec, net};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// All that [`Agent::run`] knows.
const COMMANDS: [&str; 12] = [
    "guest-exec",
    "guest-exec-status",
    "guest-get-host-name",
    "guest-get-time",
    "guest-info",
    "guest-mainstay-reseed",
    "guest-network-get-interfaces",
    "guest-ping",
    "guest-set-time",
    "guest-shutdown",
    "guest-sync",
    "guest-sync-delimited",
];

/// `Ok(None)`: success is not answered.
type Answer = Result<Option<Value>, String>;

/// The agent's state: the programs it has started.
#[derive(Default)]
pub(crate) struct Agent {
    jobs: exec::Jobs,
}

impl Agent {
    /// The bytes to send for a request; `None` if it has no answer.
    pub(crate) fn answer(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let parsed: Result<Value, _> = serde_json::from_slice(request);
        let (name, id, result) = match &parsed {
            Ok(request) => {
                let name = request["execute"].as_str().unwrap_or_default();
                (
                    name,
                    request.get("id"),
                    self.run(name, &request["arguments"]),
                )
            }
            Err(e) => ("", None, Err(format!("not a request: {e}"))),
        };
        let mut answer = match result {
            Ok(None) => return None,
            Ok(Some(value)) => json!({ "return": value }),
            Err(desc) => json!({ "error": { "class": class_of(name), "desc": desc } }),
        };
        if let Some(id) = id {
            answer["id"] = id.clone();
        }
        let mut bytes = Vec::new();
        if name == "guest-sync-delimited" {
            bytes.push(0xff);
        }
        bytes.extend_from_slice(answer.to_string().as_bytes());
        bytes.push(b'\n');
        Some(bytes)
    }

    fn run(&mut self, name: &str, args: &Value) -> Answer {
        match name {
            "guest-ping" => Ok(json!({})),
            "guest-sync" | "guest-sync-delimited" => args
                .get("id")
                .cloned()
                .ok_or_else(|| "parameter 'id' is missing".to_string()),
            "guest-info" => Ok(info()),
            "guest-exec" => self.jobs.start(args),
            "guest-exec-status" => self.jobs.status(args),
            "guest-network-get-interfaces" => net::interfaces(),
            "guest-get-host-name" => host_name(),
            "guest-get-time" => Ok(json!(time_ns())),
            "guest-set-time" => set_time(args),
            "guest-mainstay-reseed" => reseed(args),
            "guest-shutdown" => return shutdown(args).map(|()| None),
            _ => Err(format!("The command {name} has not been found")),
        }
        .map(Some)
    }
}

fn class_of(name: &str) -> &'static str {
    if COMMANDS.contains(&name) || name.is_empty() {
        "GenericError"
    } else {
        "CommandNotFound"
    }
}

fn info() -> Value {
    let commands: Vec<Value> = COMMANDS
        .iter()
        .map(|name| json!({ "name": name, "enabled": true, "success-response": *name != "guest-shutdown" }))
        .collect();
    json!({ "version": env!("CARGO_PKG_VERSION"), "supported_commands": commands })
}

fn host_name() -> Result<Value, String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|e| e.to_string())?;
    Ok(json!({ "host-name": name.trim() }))
}

fn time_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Without a time the protocol means "from the hardware clock".
fn set_time(args: &Value) -> Result<Value, String> {
    let Some(ns) = args["time"].as_i64() else {
        return command("hwclock", &["-s", "-u"]).map(|()| json!({}));
    };
    let time = rustix::time::Timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)
        .map_err(|e| format!("cannot set the clock: {e}"))?;
    Ok(json!({}))
}

fn reseed(args: &Value) -> Result<Value, String> {
    let entropy = args["entropy"]
        .as_str()
        .ok_or("parameter 'entropy' is missing")?;
    let entropy = STANDARD
        .decode(entropy)
        .map_err(|e| format!("entropy: {e}"))?;
    let mut pool = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .map_err(|e| e.to_string())?;
    pool.write_all(&entropy).map_err(|e| e.to_string())?;
    Ok(json!({}))
}

fn shutdown(args: &Value) -> Result<(), String> {
    match args["mode"].as_str().unwrap_or("powerdown") {
        "powerdown" => command("poweroff", &[]),
        "halt" => command("halt", &[]),
        "reboot" => command("reboot", &[]),
        other => Err(format!("mode {other:?} is none of powerdown, halt, reboot")),
    }
}

fn command(program: &str, args: &[&str]) -> Result<(), String> {
    let ended = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if ended.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program}: {}: {}",
        ended.status,
        String::from_utf8_lossy(&ended.stderr).trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(agent: &mut Agent, request: &str) -> Value {
        let bytes = agent.answer(request.as_bytes()).unwrap();
        let start = usize::from(bytes[0] == 0xff);
        serde_json::from_slice(&bytes[start..]).unwrap()
    }

    #[test]
    fn sync_answers_its_number_and_only_the_delimited_one_has_the_sentinel() {
        let mut agent = Agent::default();
        let plain = r#"{"execute":"guest-sync","arguments":{"id":7}}"#;
        assert_eq!(agent.answer(plain.as_bytes()).unwrap(), b"{\"return\":7}\n");
        let delimited = r#"{"execute":"guest-sync-delimited","arguments":{"id":8}}"#;
        assert_eq!(
            agent.answer(delimited.as_bytes()).unwrap(),
            b"\xff{\"return\":8}\n"
        );
    }

    #[test]
    fn errors_are_answers() {
        let mut agent = Agent::default();
        let unknown = ask(&mut agent, r#"{"execute":"guest-nope","id":"x"}"#);
        assert_eq!(unknown["error"]["class"], "CommandNotFound");
        assert_eq!(unknown["id"], "x");
        assert_eq!(
            ask(&mut agent, "nonsense")["error"]["class"],
            "GenericError"
        );
        let mode = r#"{"execute":"guest-shutdown","arguments":{"mode":"dance"}}"#;
        assert_eq!(ask(&mut agent, mode)["error"]["class"], "GenericError");
    }

    #[test]
    fn info_lists_what_is_there() {
        let mut agent = Agent::default();
        let info = ask(&mut agent, r#"{"execute":"guest-info"}"#);
        let listed = info["return"]["supported_commands"].as_array().unwrap();
        assert_eq!(listed.len(), COMMANDS.len());
        for name in COMMANDS
            .iter()
            .filter(|n| !["guest-shutdown", "guest-set-time"].contains(n))
        {
            let answer = ask(&mut agent, &json!({ "execute": name }).to_string());
            assert_ne!(answer["error"]["class"], "CommandNotFound", "{name}");
        }
    }

    #[test]
    fn the_pool_takes_what_the_host_sends() {
        let mut agent = Agent::default();
        let request = r#"{"execute":"guest-mainstay-reseed","arguments":{"entropy":"AAECAw=="}}"#;
        assert_eq!(ask(&mut agent, request), json!({ "return": {} }));
    }
}
