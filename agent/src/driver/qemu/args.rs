//! QEMU's command line for a VM. Pure.

use super::accel::Acceleration;
use super::dir::{Spec, VmDir};
use crate::wire::PortRule;
use serde_json::json;
use std::ffi::OsString;
use std::net::Ipv4Addr;

/// Character device of the guest agent.
pub(super) const GUEST_CHARDEV: &str = "guest";
/// Where the serial console is, for one at a time.
pub(super) const CONSOLE_SOCKET: &str = "console.sock";
/// What it said.
pub(super) const CONSOLE_LOG: &str = "console.log";
/// Where the screen is.
pub(super) const VNC_SOCKET: &str = "vnc.sock";
/// The guest's network.
pub(super) const NETWORK: &str = "net0";
/// Emulate all that can be: newer distributions refuse the oldest CPUs.
pub(super) const TCG_CPU: &str = "max";
/// What the guest sees, in the order of its places on the bus. A saved memory is of use with the same only.
pub(super) const DEVICES: [&str; 7] = [
    "virtio-blk-pci,drive=disk0",
    // Without a ROM: nobody boots from this network.
    "virtio-net-pci,netdev=net0,romfile=",
    "virtio-serial-pci",
    // The id makes QEMU tell when the guest opens the port; guests find it by its name.
    "virtserialport,chardev=guest,id=port0,name=org.qemu.guest_agent.0",
    "virtio-rng-pci,rng=rng0",
    "VGA,vgamem_mb=8",
    // Tells kernels that know it that they are a clone.
    "vmgenid,guid=auto",
];

/// The arguments. Socket paths are relative to the VM's folder, QEMU's working directory at start:
/// the system allows a socket's path only 107 bytes.
pub(super) fn arguments(
    dir: &VmDir,
    spec: &Spec,
    acceleration: &Acceleration,
    bind: Ipv4Addr,
    forwards: &[PortRule],
) -> Vec<OsString> {
    let (accel, cpu) = match acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        Acceleration::Tcg(_) => ("tcg,thread=multi", TCG_CPU),
    };
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |flag: &str, value: &str| args.extend([flag.into(), value.into()]);
    add("-name", &format!("guest=mainstay-{}", spec.id));
    add("-uuid", &spec.uuid);
    add("-machine", &spec.machine);
    add("-accel", accel);
    add("-cpu", cpu);
    add("-smp", &spec.vcpu.to_string());
    add("-m", &spec.ram_mb.to_string());
    add("-rtc", "base=utc");
    add("-blockdev", &disk(dir));
    add("-netdev", &network(bind, forwards));
    add(
        "-chardev",
        &format!("socket,id={GUEST_CHARDEV},path=qga.sock,server=on,wait=off"),
    );
    add("-object", "rng-builtin,id=rng0");
    for device in DEVICES {
        match device.starts_with("virtio-net") {
            true => add("-device", &format!("{device},mac={}", mac(&spec.id))),
            false => add("-device", device),
        }
    }
    add("-vnc", &format!("unix:{VNC_SOCKET}"));
    // What is at the other end of the port is none of the guest's business, nor of a saved memory's. Nobody
    // connected: the log is written all the same.
    add(
        "-chardev",
        &format!(
            "socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,logfile={CONSOLE_LOG},logappend=on"
        ),
    );
    add("-serial", "chardev:console");
    add("-qmp", "unix:qmp.sock,server=on,wait=off");
    args.extend(["-pidfile".into(), dir.pidfile().into_os_string()]);
    if spec.memory.is_some() {
        // Told later what to load, and does not go on by itself.
        args.extend(["-incoming", "defer", "-S"].map(OsString::from));
    }
    args.extend(["-nodefaults", "-no-user-config", "-daemonize"].map(OsString::from));
    args
}

/// Writes of zeros and trims free space on the node. Flushes need not reach the disk: a VM does not
/// outlive its node's power, and the page cache outlives QEMU.
fn disk(dir: &VmDir) -> String {
    json!({
        "node-name": "disk0",
        "driver": "qcow2",
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": { "no-flush": true },
        "file": {
            "driver": "file",
            "filename": dir.file("overlay.qcow2"),
            "discard": "unmap",
            "cache": { "no-flush": true },
        },
    })
    .to_string()
}

fn network(bind: Ipv4Addr, forwards: &[PortRule]) -> String {
    let bind = if bind.is_unspecified() {
        String::new()
    } else {
        bind.to_string()
    };
    let mut text = format!("user,id={NETWORK}");
    for rule in forwards {
        text += &format!(
            ",hostfwd=tcp:{bind}:{}-:{}",
            rule.host_port, rule.guest_port
        );
    }
    text
}

/// In QEMU's own range, the same for the same VM.
fn mac(id: &str) -> String {
    let hash = blake3::hash(id.as_bytes());
    let [a, b, c, ..] = hash.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

#[cfg(test)]
mod tests {
    use super::super::super::VmSpec;
    use super::*;
    use std::path::Path;

    #[test]
    fn nothing_is_left_to_defaults_and_forwards_are_all_there() {
        let dir = VmDir::new(Path::new("/state, with comma"), "i7");
        let rule = |guest_port, host_port| PortRule {
            name: String::new(),
            guest_port,
            host_port,
        };
        let spec = VmSpec {
            id: "i7".into(),
            name: "a".into(),
            ..VmSpec::default()
        };
        let spec = Spec::new(&spec, "pc-i440fx-9.2", 2, 300);
        let forwards = [rule(22, 10022), rule(80, 0)];
        let tcg = Acceleration::Tcg(String::new());
        let args = arguments(&dir, &spec, &tcg, Ipv4Addr::LOCALHOST, &forwards);
        let text: Vec<_> = args.iter().map(|a| a.to_str().unwrap()).collect();
        let line = text.join(" ");
        assert!(
            line.contains(
                "user,id=net0,hostfwd=tcp:127.0.0.1:10022-:22,hostfwd=tcp:127.0.0.1:0-:80"
            )
        );
        assert!(line.contains("-machine pc-i440fx-9.2 "));
        assert!(line.contains("-smp 2 -m 300"));
        assert!(line.contains("-pidfile /state, with comma/vms/i7/pid"));
        assert!(line.contains(r#""filename":"/state, with comma/vms/i7/overlay.qcow2""#));
        for flag in ["-nodefaults", "-no-user-config", "-daemonize"] {
            assert!(text.contains(&flag));
        }
        assert_eq!(mac("i7"), mac("i7"));
        assert_ne!(mac("i7"), mac("i8"));
    }
}
