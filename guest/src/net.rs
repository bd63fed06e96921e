//! `guest-network-get-interfaces`, read from the `ip` program.

use serde_json::{Value, json};
use std::process::{Command, Stdio};

/// Interfaces with their addresses.
pub(crate) fn interfaces() -> Result<Value, String> {
    let ended = Command::new("ip")
        .args(["-o", "addr"])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("ip: {e}"))?;
    let mut list = parse(&String::from_utf8_lossy(&ended.stdout));
    for interface in &mut list {
        let name = interface["name"].as_str().unwrap_or_default();
        let path = format!("/sys/class/net/{name}/address");
        if let Ok(mac) = std::fs::read_to_string(path) {
            interface["hardware-address"] = json!(mac.trim());
        }
    }
    Ok(Value::Array(list))
}

/// Lines like `2: eth0    inet 10.0.2.15/24 scope global eth0`.
fn parse(text: &str) -> Vec<Value> {
    let mut list: Vec<Value> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().skip(1);
        let (Some(name), Some(kind)) = (words.next(), words.next()) else {
            continue;
        };
        let name = name
            .trim_end_matches(':')
            .split('@')
            .next()
            .unwrap_or_default();
        if !list.iter().any(|interface| interface["name"] == name) {
            list.push(json!({ "name": name, "ip-addresses": [] }));
        }
        let kind = match kind {
            "inet" => "ipv4",
            "inet6" => "ipv6",
            _ => continue,
        };
        let Some((address, prefix)) = words.next().and_then(|word| word.split_once('/')) else {
            continue;
        };
        let entry = json!({ "ip-address-type": kind, "ip-address": address,
                            "prefix": prefix.parse::<u8>().unwrap_or(0) });
        if let Some(found) = list.iter_mut().find(|interface| interface["name"] == name)
            && let Some(addresses) = found["ip-addresses"].as_array_mut()
        {
            addresses.push(entry);
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dialects_of_ip() {
        let busybox = "1: lo: <LOOPBACK,UP> mtu 65536 qdisc noqueue qlen 1000\\    link/loopback\n\
                       1: lo    inet 127.0.0.1/8 scope host lo\n\
                       2: eth0    inet 10.0.2.15/24 scope global eth0\n\
                       2: eth0    inet6 fec0::1/64 scope site\n\
                       3: veth1@if2    inet 10.9.0.1/30 scope global veth1\n";
        let list = parse(busybox);
        assert_eq!(list.len(), 3);
        assert_eq!(list[1]["name"], "eth0");
        assert_eq!(list[1]["ip-addresses"][0]["ip-address"], "10.0.2.15");
        assert_eq!(list[1]["ip-addresses"][0]["prefix"], 24);
        assert_eq!(list[1]["ip-addresses"][1]["ip-address-type"], "ipv6");
        assert_eq!(list[2]["name"], "veth1");
    }
}
