//! What a start request may say, and what each wrong one is answered.

use super::*;
use axum::body::Body;
use axum::extract::{FromRequest as _, Request};
use http::StatusCode;
use serde_json::json;

async fn parse(body: Json) -> Result<(usize, StartRequest), ApiError> {
    let request = Request::post("/api/v1/vm")
        .body(Body::from(body.to_string()))
        .unwrap();
    let call = Call::from_request(request, &()).await.unwrap();
    match command(&call)?.0 {
        Command::StartInstances { ids, request } => Ok((ids.len(), *request)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn defaults() {
    let (count, request) = parse(json!({"vmid": "t1"})).await.unwrap();
    assert_eq!(
        (count, request.template.as_str(), request.priority),
        (1, "t1", 1000)
    );
    assert_eq!(
        (&request.tag, &request.node, &request.group),
        (&None, &None, &None)
    );
    assert_eq!((request.script, request.port_forwarding), (None, None));
}

#[tokio::test]
async fn everything_that_clients_send() {
    let body = json!({
        "vmid": "t1", "tag": "v1+x", "version": "3", "count": "2", "name": "n", "name_template": "$ts",
        "external_id": "http://ci/1", "node_id": "", "group_id": null, "priority": 1,
        "startup_script": "ZWNobyBoaQo=", "startup_script_condition": 1, "script_monitoring": true,
        "script_timeout": 300, "script_fail_handler": 1, "vcpu": 4, "vram": 8192, "usb_device": "",
        "network_mode": "shared", "group": "admins", "hvapic": "forceOn", "new_member": {"x": [1]},
        "metadata": {"job": "a", "n": -3, "ok": true, "none": null},
        "port_forwarding_override": [
            {"name": "ssh", "guest_port": "22"},
            {"name": "web", "guest_port": 80, "host_port": "8080", "host_ip": "0.0.0.0"},
        ],
    });
    let (count, request) = parse(body).await.unwrap();
    let rule = |name: &str, guest_port, host_port| PortRule {
        name: name.into(),
        guest_port,
        host_port,
    };
    let expected = StartRequest {
        template: "t1".into(),
        tag: Some("v1+x".into()),
        version: Some(3),
        name: Some("n".into()),
        name_template: Some("$ts".into()),
        external_id: Some("http://ci/1".into()),
        node: None,
        group: None,
        priority: 1,
        script: Some(Box::new(Script {
            body: b"echo hi\n".to_vec(),
            monitored: true,
            timeout_s: 300,
            at_boot: true,
            on_failure: ScriptFailure::Keep,
        })),
        vcpu: Some(4),
        vram_mb: Some(8192),
        metadata: [
            ("job".into(), Value::Text("a".into())),
            ("n".into(), Value::Int(-3)),
            ("ok".into(), Value::Bool(true)),
        ]
        .into_iter()
        .collect(),
        port_forwarding: Some(vec![rule("ssh", 22, 0), rule("web", 80, 8080)]),
    };
    assert_eq!((count, request), (2, expected));
}

#[tokio::test]
async fn wrong_values_are_named() {
    let cases = [
        (json!({}), "vmid is required"),
        (json!({"vmid": ""}), "vmid is required"),
        (json!({"vmid": 5}), "vmid must be a string"),
        (
            json!({"vmid": "t", "count": 0}),
            "count must be a whole number from 1 to 1000",
        ),
        (
            json!({"vmid": "t", "count": 1001}),
            "count must be a whole number from 1 to 1000",
        ),
        (
            json!({"vmid": "t", "count": -1}),
            "count must be a whole number from 1 to 1000",
        ),
        (
            json!({"vmid": "t", "count": 1.5}),
            "count must be a whole number from 1 to 1000",
        ),
        (
            json!({"vmid": "t", "count": [1]}),
            "count must be a whole number from 1 to 1000",
        ),
        (
            json!({"vmid": "t", "priority": 0}),
            "priority must be a whole number from 1 to 10000",
        ),
        (
            json!({"vmid": "t", "priority": "10001"}),
            "priority must be a whole number from 1 to 10000",
        ),
        (json!({"vmid": "t", "tag": ["v1"]}), "tag must be a string"),
        (
            json!({"vmid": "t", "vcpu": "many"}),
            "vcpu must be a whole number from 0 to 4096",
        ),
        (
            json!({"vmid": "t", "script_monitoring": 1}),
            "script_monitoring must be true or false",
        ),
        (
            json!({"vmid": "t", "script_fail_handler": 3}),
            "script_fail_handler must be a whole number from 0 to 2",
        ),
        (
            json!({"vmid": "t", "metadata": []}),
            "metadata must be an object",
        ),
        (
            json!({"vmid": "t", "metadata": {"a": 1.5}}),
            "metadata.a must be a string, a whole number or a bool",
        ),
        (
            json!({"vmid": "t", "port_forwarding_override": {}}),
            "port_forwarding_override must be an array",
        ),
        (
            json!({"vmid": "t", "port_forwarding_override": [{"guest_port": 22}]}),
            "port_forwarding_override[].name must be a string that is not empty",
        ),
        (
            json!({"vmid": "t", "port_forwarding_override": [{"name": "ssh"}]}),
            "port_forwarding_override[].guest_port is required",
        ),
        (
            json!({"vmid": "t", "port_forwarding_override": [{"name": "ssh", "guest_port": 65536}]}),
            "port_forwarding_override[].guest_port must be a whole number from 1 to 65535",
        ),
    ];
    for (body, text) in cases {
        assert_eq!(
            parse(body.clone()).await.unwrap_err(),
            ApiError::bad(text),
            "{body}"
        );
    }
}

#[tokio::test]
async fn promises_that_cannot_be_kept_are_refused() {
    for body in [
        json!({"vmid": "t", "disk": {"size": "256G"}}),
        json!({"vmid": "t", "vlan_tag": "7"}),
        json!({"vmid": "t", "network_mode": "bridge"}),
    ] {
        let error = parse(body).await.unwrap_err();
        assert_eq!(error.status, StatusCode::OK);
        assert!(
            error.message.ends_with("is not supported; leave it out"),
            "{}",
            error.message
        );
    }
    let script = parse(json!({"vmid": "t", "startup_script": "%%%"}))
        .await
        .unwrap_err();
    assert_eq!(script.status, StatusCode::OK);
    assert!(
        script
            .message
            .starts_with("startup_script is not valid base64")
    );
}
