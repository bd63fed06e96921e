//! An identity of its own for the guest of a clone: randomness that no other clone has, the node's time, a name,
//! a machine id and host keys. All clones of a memory are the same guest until this is done, so it is done before
//! anybody is told that the guest is there.
//!
//! Writing to `/dev/urandom` is not enough: the kernel mixes that in and goes on with the generator it has, for up to a
//! minute. It must be told to take a new seed, which only a system call does; guests have no program for it. So one
//! is brought along.

use super::super::{DriverError, OUTPUT_KEPT, now_ms};
use super::dir::Spec;
use super::qga::QgaError;
use super::{QemuDriver, Vm};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The guest may have to make new host keys, in emulation.
pub(super) const RENEW_MAX: Duration = Duration::from_secs(120);
/// Bytes of entropy.
pub(super) const ENTROPY: usize = 64;
/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// Bytes of its headers.
const HEAD: u64 = 64 + 56;

/// Writes the 64 bytes behind it to the kernel's pool, and has the generator seeded anew from there.
const PROGRAM: [u8; 82] = [
    0x48, 0x8d, 0x3d, 0x3e, 0x00, 0x00, 0x00, // lea rdi, [path]
    0xbe, 0x01, 0x00, 0x00, 0x00, // mov esi, O_WRONLY
    0xb8, 0x02, 0x00, 0x00, 0x00, // mov eax, open
    0x0f, 0x05, // syscall
    0x89, 0xc7, // mov edi, eax
    0x48, 0x8d, 0x35, 0x36, 0x00, 0x00, 0x00, // lea rsi, [what follows]
    0xba, 0x40, 0x00, 0x00, 0x00, // mov edx, 64
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, write
    0x0f, 0x05, // syscall
    0xbe, 0x07, 0x52, 0x00, 0x00, // mov esi, RNDRESEEDCRNG
    0x31, 0xd2, // xor edx, edx
    0xb8, 0x10, 0x00, 0x00, 0x00, // mov eax, ioctl
    0x0f, 0x05, // syscall
    0x31, 0xff, // xor edi, edi
    0x85, 0xc0, // test eax, eax
    0x40, 0x0f, 0x95, 0xc7, // setne dil
    0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, exit
    0x0f, 0x05, // syscall
    b'/', b'd', b'e', b'v', b'/', b'u', b'r', b'a', b'n', b'd', b'o', b'm', 0,
];

/// An x86-64 program for Linux: [`PROGRAM`] with its entropy.
fn program(entropy: &[u8; ENTROPY]) -> Vec<u8> {
    let length = HEAD + (PROGRAM.len() + ENTROPY) as u64;
    // 64 bits, little-endian, version 1; executable, x86-64.
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Entry, program headers, no section headers.
    for value in [BASE + HEAD, 64, 0] {
        out.extend(value.to_le_bytes());
    }
    out.extend(0_u32.to_le_bytes());
    for value in [64_u16, 56, 1, 0, 0, 0] {
        out.extend(value.to_le_bytes());
    }
    // One part, all of the file, to be read and executed.
    for value in [1_u32, 5] {
        out.extend(value.to_le_bytes());
    }
    for value in [0, BASE, BASE, length, length, 0x1000] {
        out.extend(value.to_le_bytes());
    }
    out.extend(PROGRAM);
    out.extend(entropy);
    out
}

/// Gets the program as its input; `$0` is the name, `$1` the machine id, `$2` the time. Output is what could not be
/// done; only time and randomness must be. Some folders may hold no programs.
const SCRIPT: &str = r#"off=$(($(date +%s) - $2))
[ "${off#-}" -le 10 ] || date -s "@$2" >/dev/null || { echo "the clock cannot be set"; exit 1; }
code=127 first=
for dir in /tmp /run /var/tmp /dev/shm /root; do
    f=$(mktemp "$dir/.mainstay-XXXXXX" 2>/dev/null) || continue
    if [ -z "$first" ]; then cat >"$f"; else cat "$first" >"$f"; fi
    chmod 700 "$f" && "$f" 2>/dev/null
    code=$?
    if [ -z "$first" ]; then first=$f; else rm -f "$f"; fi
    [ "$code" = 126 ] || break
done
[ -z "$first" ] || rm -f "$first"
[ "$code" = 0 ] || { echo "the random generator takes no new seed ($code)"; exit 1; }
read -r old </proc/sys/kernel/hostname
echo "$0" >/proc/sys/kernel/hostname || echo "no host name"
[ ! -e /etc/hostname ] || echo "$0" >/etc/hostname
if [ -e /etc/hosts ] && grep -qw -e "$old" /etc/hosts; then
    sed "s/\([[:space:]]\)$old\([[:space:]]\|\$\)/\1$0\2/g" /etc/hosts >/etc/hosts.new && cat /etc/hosts.new >/etc/hosts
    rm -f /etc/hosts.new
fi
for id in /etc/machine-id /var/lib/dbus/machine-id; do
    [ ! -f "$id" ] || [ -L "$id" ] || echo "$1" >"$id" || echo "no machine id"
done
for key in /etc/ssh/ssh_host_*_key; do
    [ -e "$key" ] || continue
    rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
    ssh-keygen -A >/dev/null 2>&1 || echo "no host keys"
    for pid in /run/sshd.pid /var/run/sshd.pid; do
        [ ! -e "$pid" ] || { kill -HUP "$(cat "$pid")" && break; }
    done
done
# A guest that is restarted at once must still be the one it is now.
sync
exit 0"#;

impl QemuDriver {
    /// Give the guest an identity of its own. May be done again: it comes to the same but for host keys. The
    /// error is a sentence.
    pub(super) async fn renew(&self, vm: &Arc<Vm>, spec: &Spec) -> Result<(), String> {
        let said = |e: QgaError| e.to_string();
        // First, for all that follows may be dated or signed. An agent without `hwclock` sets the time and then
        // complains; what came of it, the script looks at.
        let time = json!({ "time": now_ms() * 1_000_000 });
        match self.ask(vm, "guest-set-time", time).await {
            Err(QgaError::Refused(why)) => tracing::debug!(vm = %vm.dir.id, why, "set-time"),
            asked => drop(asked.map_err(said)?),
        }
        let input = STANDARD.encode(program(&entropy()));
        let (name, id) = (host_name(spec), spec.uuid.replace('-', ""));
        let time = (now_ms() / 1000).to_string();
        let args = json!({ "path": "/bin/sh", "arg": ["-c", SCRIPT, name, id, time],
                           "input-data": input, "capture-output": true });
        let begun = self.ask(vm, "guest-exec", args).await.map_err(said)?;
        let pid = begun["pid"].as_u64().ok_or("guest-exec names no process")?;
        let until = Instant::now() + RENEW_MAX;
        let ended = self.wait_exec(vm, pid, until).await;
        let ended = ended.map_err(|e: DriverError| e.to_string())?;
        let ended = ended.ok_or("it takes too long to give the guest an identity")?;
        let said = super::guest::output(&ended["out-data"], OUTPUT_KEPT);
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        if ended["exitcode"] != 0 {
            return Err(format!("the guest cannot be given an identity: {said}"));
        }
        if !said.is_empty() {
            tracing::warn!(vm = %vm.dir.id, said, "not all of the guest's identity is new");
        }
        Ok(())
    }
}

pub(super) fn entropy() -> [u8; ENTROPY] {
    let mut out = [0; ENTROPY];
    for part in out.chunks_mut(16) {
        part.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    }
    out
}

/// Of the VM's name what a host may be called.
fn host_name(spec: &Spec) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = spec.name.chars().map(plain).take(63).collect();
    match name.trim_matches('-') {
        "" => format!("vm-{}", spec.uuid),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::VmSpec;
    use super::*;

    /// Runs here what runs in guests. Whether this kernel may be told to take a new seed depends on who we are;
    /// that it is asked for, and nothing else, does not.
    #[test]
    fn the_program_runs_and_tells_whether_it_could() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reseed");
        std::fs::write(&path, program(&entropy())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        let ended = std::process::Command::new(&path).output().unwrap();
        assert!(matches!(ended.status.code(), Some(0 | 1)), "{ended:?}");
        assert!(ended.stdout.is_empty() && ended.stderr.is_empty());
        assert_ne!(program(&entropy()), program(&entropy()));
    }

    #[test]
    fn names_of_vms_become_names_of_hosts() {
        let name = |name: &str| {
            let wanted = VmSpec {
                id: "11111111-2222-4333-8444-555555555555".into(),
                name: name.into(),
                ..VmSpec::default()
            };
            host_name(&Spec::new(&wanted, "pc", 1, 1))
        };
        assert_eq!(name("ci-7"), "ci-7");
        assert_eq!(name("mgmtManaged ü_7!"), "mgmtManaged---7");
        assert_eq!(name("$(reboot)"), "reboot");
        assert_eq!(name("_"), "vm-11111111-2222-4333-8444-555555555555");
        assert_eq!(name(&"x".repeat(100)).len(), 63);
    }
}
