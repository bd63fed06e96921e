//! Starts a VM's QEMU: ports, the process, and what is written down about it.

use super::super::DriverError;
use super::dir::{Run, Spec};
use super::{QemuDriver, Vm, args, process, qmp, tools};
use crate::wire::PortRule;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;

/// QEMU has its devices and sockets by then, or never.
const LAUNCH_MAX: Duration = Duration::from_secs(60);
/// Other programs may take the ports we chose before QEMU does.
const PORT_ATTEMPTS: u32 = 10;

impl QemuDriver {
    /// Start QEMU for the folder of `vm`, which must have none.
    pub(super) async fn launch(&self, vm: &Arc<Vm>, spec: &Spec) -> Result<Run, DriverError> {
        for attempt in 1.. {
            // Who knows a VM by its ports finds it there after a restart.
            let same = attempt == 1 && !spec.had.is_empty();
            let forwards = if same {
                spec.had.clone()
            } else {
                choose_ports(&spec.forwards, self.config.bind, self.config.ports)?
            };
            match self.spawn(vm, spec, &forwards).await {
                Ok(()) => break,
                Err(e) if !e.to_string().contains("host forwarding rule") => return Err(e),
                Err(e) if !same && (forwards == spec.forwards || attempt == PORT_ATTEMPTS) => {
                    return Err(DriverError::Busy(format!(
                        "a port is in use on this node: {e}"
                    )));
                }
                Err(e) => tracing::info!(vm = %vm.dir.id, error = %e, "choosing other ports"),
            }
        }
        self.started(vm, spec).await
    }

    async fn spawn(
        &self,
        vm: &Arc<Vm>,
        spec: &Spec,
        forwards: &[PortRule],
    ) -> Result<(), DriverError> {
        let arguments = args::arguments(
            &vm.dir,
            spec,
            &self.acceleration,
            self.config.bind,
            forwards,
        );
        // `-daemonize`: a session of its own, and an exit status that says whether the VM came to be.
        let child = Command::new(&self.tools.qemu)
            .args(arguments)
            .current_dir(vm.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let child = child.map_err(|e| DriverError::Busy(format!("QEMU does not start: {e}")))?;
        let ended = tokio::time::timeout(LAUNCH_MAX, child.wait_with_output()).await;
        match ended {
            Ok(Ok(ended)) if ended.status.success() => Ok(()),
            Ok(Ok(ended)) => Err(tools::complaint("QEMU", &ended.stderr)),
            Ok(Err(e)) => Err(DriverError::Busy(format!("QEMU: {e}"))),
            Err(_) => {
                if let Ok(Some(pid)) = process::find(&vm.dir.pidfile()) {
                    process::kill(pid, &vm.dir.pidfile()).await;
                }
                Err(DriverError::Busy("QEMU does not finish starting".into()))
            }
        }
    }

    /// Write down that QEMU runs, with the ports it really has.
    pub(super) async fn started(&self, vm: &Arc<Vm>, spec: &Spec) -> Result<Run, DriverError> {
        let busy = |e: String| DriverError::Busy(format!("QEMU does not answer: {e}"));
        let forwards = if spec.forwards.is_empty() {
            Vec::new()
        } else {
            let qmp = self.qmp(vm).await.map_err(busy)?;
            let text = qmp.human("info usernet").await.map_err(busy)?;
            ports_in_force(&spec.forwards, &text)
                .map_err(|guest| DriverError::Busy(format!("port {guest} is not forwarded")))?
        };
        let run = Run::new(self.acceleration.label(), forwards);
        vm.dir.set_run(&run)?;
        tracing::info!(vm = %vm.dir.id, generation = spec.generation, "vm started");
        Ok(run)
    }

    /// The control connection, made again if it was lost.
    pub(super) async fn qmp(&self, vm: &Arc<Vm>) -> Result<Arc<qmp::Qmp>, String> {
        let mut slot = vm.qmp.lock().await;
        if let Some(qmp) = slot.as_ref().filter(|qmp| !qmp.closed()) {
            return Ok(qmp.clone());
        }
        // QEMU serves one client: ours must be gone before the next can be greeted.
        *slot = None;
        let qmp = Arc::new(qmp::Qmp::connect(&vm.dir.path()).await?);
        *slot = Some(qmp.clone());
        Ok(qmp)
    }
}

/// Replace 0 by a port that is free now; without a range leave it to QEMU, which cannot fail.
fn choose_ports(
    rules: &[PortRule],
    bind: Ipv4Addr,
    range: Option<(u16, u16)>,
) -> Result<Vec<PortRule>, DriverError> {
    let mut rules = rules.to_vec();
    let Some((first, last)) = range else {
        return Ok(rules);
    };
    let mut taken: Vec<u16> = rules.iter().map(|rule| rule.host_port).collect();
    for rule in rules.iter_mut().filter(|rule| rule.host_port == 0) {
        let free = |port: &u16| !taken.contains(port) && TcpListener::bind((bind, *port)).is_ok();
        let port = (first..=last)
            .find(free)
            .ok_or_else(|| DriverError::Busy(format!("no free port between {first} and {last}")))?;
        taken.push(port);
        rule.host_port = port;
    }
    Ok(rules)
}

/// Read from `info usernet` which host port each rule got; the error is a guest port without one.
fn ports_in_force(rules: &[PortRule], text: &str) -> Result<Vec<PortRule>, u16> {
    // TCP[HOST_FORWARD]  FD  SOURCE  PORT  DEST  PORT  RECVQ  SENDQ
    let mut pairs: Vec<(u16, u16)> = text
        .lines()
        .filter(|line| line.trim_start().starts_with("TCP[HOST_FORWARD]"))
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Some((words.get(3)?.parse().ok()?, words.get(5)?.parse().ok()?))
        })
        .collect();
    // Rules that name their port first, so that the others get what is left.
    let mut order: Vec<usize> = (0..rules.len()).collect();
    order.sort_by_key(|at| rules[*at].host_port == 0);
    let mut out = rules.to_vec();
    for at in order {
        let rule = &mut out[at];
        let fits = |(host, guest): &(u16, u16)| {
            *guest == rule.guest_port && (rule.host_port == 0 || *host == rule.host_port)
        };
        let found = pairs.iter().position(fits).ok_or(rule.guest_port)?;
        rule.host_port = pairs.swap_remove(found).0;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(guest_port: u16, host_port: u16) -> PortRule {
        PortRule {
            name: format!("{guest_port}"),
            guest_port,
            host_port,
        }
    }

    #[test]
    fn ports_are_read_back() {
        let text = "Hub -1 (net0):\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\n  \
            TCP[ESTABLISHED]   19       127.0.0.1 40001       10.0.2.15    80     0     0\n  \
            TCP[HOST_FORWARD]  15               * 40001       10.0.2.15    80     0     0\n  \
            TCP[HOST_FORWARD]  14               * 10022       10.0.2.15    22     0     0\n  \
            TCP[HOST_FORWARD]  13       127.0.0.1  8080       10.0.2.15    80     0     0\n";
        let rules = [rule(80, 0), rule(80, 8080), rule(22, 0)];
        let got = ports_in_force(&rules, text).unwrap();
        assert_eq!(
            got,
            [rule(80, 40001), rule(80, 8080), rule(22, 10022)].map(|mut r| {
                r.name = r.guest_port.to_string();
                r
            })
        );
        assert_eq!(ports_in_force(&[rule(5900, 0)], text), Err(5900));
    }

    #[test]
    fn chosen_ports_are_free_and_distinct() {
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        let only = choose_ports(&[rule(1, 0)], Ipv4Addr::LOCALHOST, Some((port, port)));
        assert!(matches!(only, Err(DriverError::Busy(_))));
        let rules = [rule(1, 0), rule(2, 0), rule(3, 0)];
        let got = choose_ports(&rules, Ipv4Addr::LOCALHOST, Some((20_000, 60_000))).unwrap();
        assert!(got[0].host_port < got[1].host_port && got[1].host_port < got[2].host_port);
        let kept = choose_ports(&rules, Ipv4Addr::LOCALHOST, None).unwrap();
        assert_eq!(kept, rules);
    }
}
