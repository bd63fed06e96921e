//! What we want of a guest: that it answers, that it has fresh randomness and the right time, that it
//! has an address, that it runs a script, that it shuts down.

use super::super::{DriverError, kept_output, now_ms};
use super::qga::{self, Qga, QgaError};
use super::{QemuDriver, Vm, lifecycle, renew};
use crate::wire::{Script, ScriptResult, VmFacts};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How often a guest is asked whether something is so: first, and at most.
const ASK: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// How often to look whether the process still lives while nothing is heard.
const LIVES_EVERY: Duration = Duration::from_millis(500);
/// How long a guest that loses its connection in the middle of a script may stay away.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// A script's time where none is given.
const SCRIPT_DEFAULT: Duration = Duration::from_secs(30);

/// Runs its input as a program of its own, in a session of its own (so that all of it can be killed),
/// with nothing to read: a script that reads its standard input must not read itself.
const RUNNER: &str = r#"f=$(mktemp 2>/dev/null) || exec /bin/sh -s
cat >"$f" && chmod 700 "$f"
IFS= read -r first <"$f" || :
case "$first" in '#!'*) "$f" </dev/null ;; *) /bin/sh "$f" </dev/null ;; esac
code=$?
rm -f "$f"
exit "$code""#;
const SESSION: &str = r#"command -v setsid >/dev/null 2>&1 && exec setsid /bin/sh -c "$0"
exec /bin/sh -c "$0""#;

impl QemuDriver {
    /// Until the guest answers; `fresh`: it has just come to life in a saved memory. The caller bounds it.
    pub(super) async fn wait_ready(
        &self,
        vm: &Arc<Vm>,
        fresh: bool,
        need_network: bool,
    ) -> Result<VmFacts, DriverError> {
        if !fresh {
            self.wait_agent(vm).await?;
            self.freshen(vm).await?;
        }
        let spec = vm.dir.spec()?.ok_or_else(|| gone(vm))?;
        let mut run = vm.dir.run()?.ok_or_else(|| gone(vm))?;
        if spec.cloned && !run.renewed {
            // It booted, so that its randomness is its own in any case.
            if let Err(why) = self.renew(vm, &spec).await {
                tracing::warn!(vm = %vm.dir.id, why, "a clone keeps its image's identity");
            }
            run.renewed = true;
            vm.dir.set_run(&run)?;
        }
        if need_network {
            let mut pause = ASK.0;
            let ip = loop {
                match self
                    .ask(vm, "guest-network-get-interfaces", json!({}))
                    .await
                {
                    Ok(answer) => match address(&answer) {
                        Some(ip) => break ip,
                        None => self.check_lives(vm).await?,
                    },
                    Err(QgaError::Lost(_)) => self.wait_agent(vm).await?,
                    Err(e) => return Err(DriverError::Failed(e.to_string())),
                }
                sleep(pause).await;
                pause = (pause * 2).min(ASK.1);
            };
            if run.ip != ip {
                run.ip = ip;
                vm.dir.set_run(&run)?;
            }
        }
        Ok(lifecycle::facts(&spec, &run, "running"))
    }

    /// Until the guest has its port open and is in step.
    pub(super) async fn wait_agent(&self, vm: &Arc<Vm>) -> Result<(), DriverError> {
        loop {
            self.check_lives(vm).await?;
            let Ok(qmp) = self.qmp(vm).await else {
                sleep(ASK.1).await;
                continue;
            };
            let mut picture = qmp.picture();
            let open = picture.wait_for(|p| p.guest_open || p.closed);
            match timeout(LIVES_EVERY, open).await {
                Ok(Ok(picture)) if picture.guest_open => {}
                _ => continue,
            }
            match self.ask(vm, "guest-ping", json!({})).await {
                Ok(_) => return Ok(()),
                Err(e) => tracing::debug!(vm = %vm.dir.id, error = %e, "guest agent"),
            }
            sleep(ASK.0).await;
        }
    }

    /// Running, or the reason why not.
    async fn check_lives(&self, vm: &Arc<Vm>) -> Result<(), DriverError> {
        // Where the system cannot say, it is not dead: whoever waits for it has a bound.
        if !matches!(vm.process(), Ok(None)) {
            if let Some(qmp) = vm.qmp.lock().await.clone()
                && let Ok(status) = qmp.status().await
                && matches!(
                    status.as_str(),
                    "internal-error" | "io-error" | "guest-panicked"
                )
            {
                return Err(DriverError::Failed(format!(
                    "QEMU has stopped the VM: {status}"
                )));
            }
            return Ok(());
        }
        let why = match self.seen(vm).await? {
            Some(seen) => seen.message,
            None => "there is no such VM".into(),
        };
        Err(DriverError::Failed(format!("the VM does not run: {why}")))
    }

    /// Fresh randomness (clones of one image must not share it) and the node's time.
    async fn freshen(&self, vm: &Arc<Vm>) -> Result<(), DriverError> {
        let entropy = STANDARD.encode(renew::entropy());
        let ours = self
            .ask(vm, "guest-mainstay-reseed", json!({ "entropy": entropy }))
            .await;
        if matches!(ours, Err(QgaError::Refused(_))) {
            // Not our agent: any agent can run a program.
            let args = json!({ "path": "/bin/sh", "arg": ["-c", "cat >/dev/urandom"],
                               "input-data": entropy });
            note(vm, "reseed", self.ask(vm, "guest-exec", args).await)?;
        } else {
            note(vm, "reseed", ours)?;
        }
        let time = json!({ "time": now_ms() * 1_000_000 });
        note(vm, "set-time", self.ask(vm, "guest-set-time", time).await)
    }

    /// One question to the guest agent, on a connection that is made if there is none.
    pub(super) async fn ask(
        &self,
        vm: &Arc<Vm>,
        name: &str,
        args: Value,
    ) -> Result<Value, QgaError> {
        let mut slot = vm.qga.lock().await;
        // Taken out: if this future is dropped half way, so is the connection, which is then out of step.
        let mut qga = match slot.take() {
            Some(qga) => qga,
            None => self.dial(vm).await?,
        };
        let answer = qga.call(name, args).await;
        if !matches!(answer, Err(QgaError::Lost(_))) {
            *slot = Some(qga);
        }
        answer
    }

    async fn dial(&self, vm: &Arc<Vm>) -> Result<Qga, QgaError> {
        let qmp = self.qmp(vm).await.map_err(QgaError::Lost)?;
        if !qmp.picture().borrow().guest_open {
            return Err(QgaError::Lost("it has not opened its port".into()));
        }
        Qga::connect(&vm.dir.path(), qga::ANSWER_MAX).await
    }

    /// Ask the guest to shut down; it does not answer if it does.
    pub(super) async fn guest_shutdown(&self, vm: &Arc<Vm>) {
        let mut slot = vm.qga.lock().await;
        let qga = match slot.take() {
            Some(qga) => Ok(qga),
            None => self.dial(vm).await,
        };
        let asked = match qga {
            Ok(mut qga) => {
                qga.send("guest-shutdown", json!({ "mode": "powerdown" }))
                    .await
            }
            Err(e) => Err(e),
        };
        if let Err(e) = asked {
            tracing::debug!(vm = %vm.dir.id, error = %e, "guest-shutdown");
        }
    }

    pub(super) async fn script(
        &self,
        vm: &Arc<Vm>,
        script: &Script,
        keep: usize,
    ) -> Result<ScriptResult, DriverError> {
        let failed = |e: QgaError| DriverError::Failed(e.to_string());
        STANDARD
            .decode(&script.body)
            .map_err(|e| DriverError::Failed(format!("the script is not base64: {e}")))?;
        self.check_lives(vm).await?;
        let allowed = match script.timeout_s {
            0 => SCRIPT_DEFAULT,
            seconds => Duration::from_secs(seconds.into()),
        };
        let args = json!({ "path": "/bin/sh", "arg": ["-c", SESSION, RUNNER],
                           "input-data": script.body, "capture-output": true });
        let started = self.ask(vm, "guest-exec", args).await.map_err(failed)?;
        let pid = started["pid"].as_u64().ok_or_else(|| {
            DriverError::Failed("the guest agent does not say which process it started".into())
        })?;
        let deadline = Instant::now() + allowed;
        if let Some(ended) = self.wait_exec(vm, pid, deadline).await? {
            return Ok(result(&ended, false, keep));
        }
        self.kill_exec(vm, pid).await?;
        let ended = self.wait_exec(vm, pid, Instant::now() + AWAY_MAX).await?;
        Ok(result(&ended.unwrap_or_default(), true, keep))
    }

    /// Kill a program with its session, or in a guest without `setsid` at least its first process.
    pub(super) async fn kill_exec(&self, vm: &Arc<Vm>, pid: u64) -> Result<(), DriverError> {
        let kill = format!("kill -KILL -{pid} 2>/dev/null || kill -KILL {pid}");
        let args = json!({ "path": "/bin/sh", "arg": ["-c", kill] });
        let asked = self.ask(vm, "guest-exec", args).await;
        asked.map_err(|e| DriverError::Failed(e.to_string()))?;
        Ok(())
    }

    /// The last `guest-exec-status` of a program, or `None` at the deadline.
    pub(super) async fn wait_exec(
        &self,
        vm: &Arc<Vm>,
        pid: u64,
        deadline: Instant,
    ) -> Result<Option<Value>, DriverError> {
        let mut pause = ASK.0;
        let mut heard = Instant::now();
        loop {
            match self
                .ask(vm, "guest-exec-status", json!({ "pid": pid }))
                .await
            {
                Ok(status) if status["exited"] == true => return Ok(Some(status)),
                Ok(_) => heard = Instant::now(),
                Err(QgaError::Lost(_)) if heard.elapsed() < AWAY_MAX => {
                    self.check_lives(vm).await?
                }
                Err(e) => return Err(DriverError::Failed(e.to_string())),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            sleep(pause.min(left)).await;
            pause = (pause * 2).min(ASK.1);
        }
    }
}

fn gone(vm: &Vm) -> DriverError {
    DriverError::Failed(format!("there is no VM {}", vm.dir.id))
}

/// An agent that lacks a command is no reason to refuse a guest; one that is lost is.
fn note(vm: &Vm, what: &str, answer: Result<Value, QgaError>) -> Result<(), DriverError> {
    match answer {
        Ok(_) => Ok(()),
        Err(QgaError::Refused(why)) => {
            tracing::warn!(vm = %vm.dir.id, what, why, "the guest agent cannot");
            Ok(())
        }
        Err(e) => Err(DriverError::Failed(e.to_string())),
    }
}

/// The first IPv4 address that others could use.
fn address(interfaces: &Value) -> Option<String> {
    let all = interfaces
        .as_array()?
        .iter()
        .filter_map(|i| i["ip-addresses"].as_array())
        .flatten();
    let v4 = all.filter(|a| a["ip-address-type"] == "ipv4");
    v4.filter_map(|a| a["ip-address"].as_str())
        .find(|ip| !ip.starts_with("127.") && !ip.starts_with("169.254."))
        .map(str::to_string)
}

fn result(status: &Value, did_timeout: bool, keep: usize) -> ScriptResult {
    ScriptResult {
        return_code: code(status),
        did_timeout,
        stdout: output(&status["out-data"], keep),
        stderr: output(&status["err-data"], keep),
    }
}

/// Exit code of a program by its last status.
pub(super) fn code(status: &Value) -> i32 {
    let signal = status["signal"].as_i64().map(|signal| 128 + signal);
    let code = status["exitcode"].as_i64().or(signal).unwrap_or(-1);
    i32::try_from(code).unwrap_or(-1)
}

/// What it wrote.
pub(super) fn bytes(data: &Value) -> Vec<u8> {
    let text = data.as_str().unwrap_or_default();
    STANDARD.decode(text).unwrap_or_default()
}

pub(super) fn output(data: &Value, keep: usize) -> String {
    let bytes = bytes(data);
    let from = bytes.len().saturating_sub(keep);
    // Broken characters take more room than they had: cut once more.
    kept_output(&String::from_utf8_lossy(&bytes[from..]), keep).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::super::OUTPUT_KEPT;
    use super::*;

    #[test]
    fn loopback_and_link_local_are_no_addresses() {
        let v4 = |ip: &str| json!({ "ip-address-type": "ipv4", "ip-address": ip });
        let list = json!([
            { "name": "lo", "ip-addresses": [v4("127.0.0.1")] },
            { "name": "eth1" },
            { "name": "eth0", "ip-addresses": [
                { "ip-address-type": "ipv6", "ip-address": "fe80::1" },
                v4("169.254.3.4"), v4("10.0.2.15") ] },
        ]);
        assert_eq!(address(&list).unwrap(), "10.0.2.15");
        assert_eq!(address(&json!([])), None);
    }

    #[test]
    fn results_of_both_kinds_of_end() {
        let ended = json!({ "exited": true, "exitcode": 7, "err-data": STANDARD.encode("no\n") });
        let ended = result(&ended, false, OUTPUT_KEPT);
        assert_eq!(
            (ended.return_code, ended.stderr.as_str(), ended.did_timeout),
            (7, "no\n", false)
        );
        assert_eq!(
            result(&json!({ "exited": true, "signal": 9 }), true, OUTPUT_KEPT).return_code,
            137
        );
        let long = "x".repeat(OUTPUT_KEPT) + "end";
        let kept = output(&json!(STANDARD.encode(&long)), OUTPUT_KEPT);
        assert_eq!(kept.len(), OUTPUT_KEPT);
        assert!(kept.ends_with("end"));
    }
}
